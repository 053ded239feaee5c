# SPDX-License-Identifier: Apache-2.0
"""The report for AMD users: it counts, names what failed, and says so when nothing ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples/amd_report.py"
TESTS = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


def report(out: Path, *arguments: object) -> tuple[int, str, dict]:
    command = [sys.executable, SCRIPT, "--out", out, "--", *arguments, "-p", "no:cacheprovider"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, (out / "amd_report.md").read_text(), json.loads((out / "amd_report.json").read_text())


def test_report(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    code, text, data = report(tmp_path / "out", tmp_path / "test_some.py")
    assert code == data["pytest"] == 1
    assert [result["outcome"] for result in data["tests"]] == ["passed", "failure", "skipped"]
    for line in ("| passed | 1 |", "| failure | 1 |", "| skipped | 1 |", "test_bad: AssertionError: one is not two"):
        assert line in text
    assert "HIP of torch" in text
    assert "vllm-mla-fusion" in (tmp_path / "out/amd_report.doctor.log").read_text()


def test_nothing_ran(tmp_path: Path) -> None:
    code, text, data = report(tmp_path / "out", tmp_path / "test_missing.py")
    assert code != 0
    assert data["tests"] == []
    assert "test_missing.py" in text
