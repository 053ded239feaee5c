# SPDX-License-Identifier: Apache-2.0
"""How this package came here, and so what pip is to be told to complete it or to install it again."""

import importlib.metadata
import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

DISTRIBUTION = "vllm-mla-fusion"


def install_extra(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml asks for.

    It names those distributions and not this one, which no index need have, however it came here.
    """
    marker = re.compile(rf"""\s*;\s*extra\s*==\s*["']{re.escape(extra)}["']""")
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return shlex.join(["pip", "install", f"{_checkout()}[{extra}]"])
    return shlex.join(["pip", "install", *(marker.split(line)[0] for line in declared if marker.search(line))])


def install_again() -> str:
    """The command that repairs the installation from where it came, and leaves torch and vLLM as they are.

    Without an installation (PYTHONPATH alone), the one that makes it.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return shlex.join(["pip", "install", _checkout()])
    source = _source(json.loads(distribution.read_text("direct_url.json") or "{}"))
    return shlex.join(["pip", "install", "--no-deps", "--force-reinstall", *source])


def _checkout() -> str:
    """The checkout that these modules are in; what stands for it where they are copied from one."""
    root = Path(__file__).resolve().parents[2]
    return str(root) if (root / "pyproject.toml").is_file() else "CHECKOUT_OR_WHEEL_FILE"


def _source(origin: dict[str, Any]) -> list[str]:
    """What to give to pip, by the direct_url.json of the installation (PEP 610); without one it came from an index."""
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return [f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"]
    path = unquote(urlparse(url).path) if url.startswith("file:") else url
    editable = origin.get("dir_info", {}).get("editable", False)
    return ["--editable", path] if editable else [path or DISTRIBUTION]
