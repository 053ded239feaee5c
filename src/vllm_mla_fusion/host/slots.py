# SPDX-License-Identifier: Apache-2.0
"""Whether a vLLM fills the slots behind a step's tokens with -1, which makes a captured cache write safe.

A captured graph writes a cache row for each token that it was captured for, also where a step has fewer tokens. vLLM
itself needs no -1 there in piecewise graphs, whose cache writes it leaves outside; ours stand on it. What is looked up
here as source text, `tests/versions/slots.py` runs in each release.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2_TABLES = "vllm.v1.worker.gpu.block_table"


@dataclass(frozen=True)
class _Fill:
    """One place where vLLM fills unused slots: in which function, by what."""

    what: str
    module: str
    function: str
    pattern: str


_FILLS = (
    _Fill(
        "steps", _V1_RUNNER, "_get_slot_mappings", r"\[\s*\w*unpadded\w*\s*:\s*\w*padded\w*\s*\]\s*\.fill_\(\s*-1\s*\)"
    ),
    _Fill(
        "dummy runs", _V1_RUNNER, "_dummy_run", r"for (\w+) in \w*slot_mappings\w*\.values\(\):\s+\1\.fill_\(\s*-1\s*\)"
    ),
    _Fill("steps", _V2_TABLES, "_compute_slot_mappings_kernel", r"tl\.store\(\s*slot_mapping_ptr \+ \w+,\s*PAD_ID,"),
    _Fill("steps", _V2_TABLES, "compute_slot_mappings", r"PAD_ID=PAD_SLOT_ID"),
    _Fill("dummy runs", _V2_TABLES, "get_dummy_slot_mappings", r"slot_mappings\.fill_\(\s*PAD_SLOT_ID\s*\)"),
)


def missing_fill() -> str | None:
    """Where this vLLM does not visibly fill unused slots with -1; None if it does everywhere."""
    package = Path(importlib.import_module("vllm").__path__[0])
    for fill in _FILLS:
        source = package.parent.joinpath(*fill.module.split(".")).with_suffix(".py")
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        if not any(re.search(fill.pattern, body) for body in _bodies(text, fill.function)):
            return (
                f"fill of unused slots with -1 in {fill.what} ({fill.function} in {fill.module}), without which a "
                "captured cache write would overwrite other requests' rows"
            )
    return None


def _bodies(text: str, function: str) -> list[str]:
    """The source of each function of this name: its lines up to the next one that is indented no deeper."""
    found = []
    for start in re.finditer(rf"^([ ]*)def {function}\(", text, re.MULTILINE):
        end = re.compile(rf"^[ ]{{0,{len(start[1])}}}(?:def|class|@|[A-Za-z_])", re.MULTILINE).search(text, start.end())
        found.append(text[start.start() : end.start() if end else None])
    return found
