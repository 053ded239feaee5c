# SPDX-License-Identifier: Apache-2.0
"""What makes a module of the tests a plugin of vLLM."""

from __future__ import annotations

from pathlib import Path


def write_plugin_metadata(site: Path, group: str, module: str, function: str) -> Path:
    """Writes, into a folder for Python, the metadata of a package whose entry point in `group` is `module:function`.

    Returns:
        The folder of the metadata.
    """
    metadata = site / f"{module}-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}:{function}\n")
    return metadata
