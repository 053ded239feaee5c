# SPDX-License-Identifier: Apache-2.0
"""The look for vLLM's filling of unused slots finds each place where a release would no longer do it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vllm_mla_fusion.host import slots, support

pytest.importorskip("vllm")

RUNNER, TABLES = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/block_table.py"
# What a release that no longer fills would lack: the file, the text, and how often it stands there.
LOST = {
    "_get_slot_mappings": (RUNNER, "slot_mapping[num_tokens_unpadded:num_tokens_padded].fill_(-1)", "pass"),
    "_dummy_run": (RUNNER, "sm.fill_(-1)", "pass"),
    "_compute_slot_mappings_kernel": (TABLES, "tl.store(slot_mapping_ptr + offset, PAD_ID,", "tl.store(offset, 0,"),
    "compute_slot_mappings": (TABLES, "PAD_ID=PAD_SLOT_ID", "PAD_ID=0"),
    "get_dummy_slot_mappings": (TABLES, "self.slot_mappings.fill_(PAD_SLOT_ID)", "pass"),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the two files of the installed vLLM."""
    installed = Path(importlib.util.find_spec("vllm").origin).parent
    for name in (RUNNER, TABLES):
        target = tmp_path / "vllm" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((installed / name).read_text())
    made = ModuleType("vllm")
    made.__path__ = [str(tmp_path / "vllm")]
    monkeypatch.setitem(__import__("sys").modules, "vllm", made)
    return tmp_path / "vllm"


def test_installed_release_fills(package: Path) -> None:
    assert slots.missing_fill() is None


@pytest.mark.parametrize("function", list(LOST))
def test_release_that_does_not_fill(function: str, package: Path) -> None:
    name, fill, instead = LOST[function]
    source = (package / name).read_text()
    assert source.count(fill) == 1
    (package / name).write_text(source.replace(fill, instead))
    assert f"({function} in vllm." in slots.missing_fill()


def test_such_a_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert support.failed_probe() is None
    monkeypatch.setattr(slots, "missing_fill", lambda: "fill of unused slots")
    assert support.failed_probe() == "fill of unused slots"


def test_same_words_in_another_function_do_not_count(package: Path) -> None:
    source = (package / RUNNER).read_text()
    fill = LOST["_get_slot_mappings"][1]
    other = f"\n\ndef elsewhere(slot_mapping, num_tokens_unpadded, num_tokens_padded):\n    {fill}\n"
    (package / RUNNER).write_text(source.replace(fill, "pass") + other)
    assert "_get_slot_mappings" in slots.missing_fill()


def test_file_that_moved(package: Path) -> None:
    (package / TABLES).unlink()
    assert "block_table" in slots.missing_fill()
