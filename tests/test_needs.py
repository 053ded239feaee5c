# SPDX-License-Identifier: Apache-2.0
"""Tests whose needs are not there skip themselves and say why; for CI they fail, but for those that need a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
ONE_OF_EACH = {
    "gpu": "kernel/test_kernel.py::test_cuda_graph_and_current_stream",
    "engine": "engine/test_engine.py::test_unknown_value",
    "hip": "kernel/test_hip.py::test_a_compile_error_fails",
    "versions": "versions/test_matrix.py::test_release[0.26.0]",
}


@pytest.fixture(scope="module")
def needy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that has none of what the tests of `ONE_OF_EACH` need."""
    empty = str(tmp_path_factory.mktemp("empty"))
    nothing = {"CUDA_VISIBLE_DEVICES": "", "PATH": empty}
    nothing |= {"MLA_TEST_MODEL": empty, "MLA_TEST_MATRIX_DIR": empty}
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": empty, "PIP_CONFIG_FILE": os.devnull}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MLA_TEST"))}
    return inherited | nothing | index


def run(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env=environ, capture_output=True, text=True, check=False)


def test_reasons(needy: dict[str, str]) -> None:
    """Whatever is selected: here by name."""
    done = run(needy, *(f"tests/{name}" for name in ONE_OF_EACH.values()))
    assert done.returncode == 0, done.stdout
    for reason in (
        "no CUDA or ROCm GPU",
        f"no model in {needy['MLA_TEST_MODEL']}: put tiny-mla there, or name its folder in MLA_TEST_MODEL",
        "the compilers for AMD GPUs are missing: run .ci/install_hip_toolchain.sh as root",
        f"the matrix's wheels are not all in {needy['MLA_TEST_MATRIX_DIR']}, and pip finds no index: ",
    ):
        assert len(re.findall(rf"^SKIPPED \[1\] .*{re.escape(reason)}", done.stdout, re.MULTILINE)) == 1, done.stdout


def test_ci_fails_where_a_need_is_not_there(needy: dict[str, str]) -> None:
    done = run(needy | {"MLA_TEST_LEAVE_NONE_OUT": "1"}, *(f"tests/{name}" for name in ONE_OF_EACH.values()))
    assert done.returncode == 1, done.stdout
    failed = re.findall(r"^ERROR tests/(\S+)", done.stdout, re.MULTILINE)
    assert sorted(failed) == sorted(name for marker, name in ONE_OF_EACH.items() if marker != "gpu")
    assert "1 skipped" in done.stdout


def test_light_is_what_needs_nothing() -> None:
    files = {f"tests/{name.split('::')[0]}" for name in ONE_OF_EACH.values()}
    done = run(dict(os.environ), "--collect-only", "-m", "light", *sorted(files))
    assert done.returncode == 0, done.stdout
    assert "tests/kernel/test_kernel.py::test_opcheck[cpu-False]" in done.stdout
    assert not [name for name in ONE_OF_EACH.values() if f"{name}\n" in done.stdout]
