# SPDX-License-Identifier: Apache-2.0
"""What is written down beside a finished library, and whether the library is still that."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def library_facts(library: Path) -> dict[str, object]:
    """What `flaw_of` compares."""
    content = library.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "machine": platform.machine()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished library.

    Raises:
        OSError, ValueError: It cannot be read, or is none.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is not an object")
    return manifest


def flaw_of(folder: Path, library: str, **expected: object) -> str | None:
    """What is wrong with a finished library; None if it can be loaded.

    Args:
        folder: Where it lies beside its manifest.
        library: Its name.
        expected: What the manifest must say besides.
    """
    try:
        manifest = read_manifest(folder)
        facts = library_facts(folder / library)
    except (OSError, ValueError) as error:
        return f"unreadable ({error})"
    here = {"machine": facts["machine"], **expected}
    if any(manifest.get(name) != value for name, value in here.items()):
        return f"is for {' on '.join(str(manifest.get(name)) for name in reversed(here))}"
    changed = [name for name in ("size", "sha256") if manifest.get(name) != facts[name]]
    return f"{library} was changed or cut short ({', '.join(changed)})" if changed else None
