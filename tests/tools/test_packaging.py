# SPDX-License-Identifier: Apache-2.0
"""What is published has the kernel's sources: the sdist, and the wheel that is built from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("src", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"


def python(code: str, path: Path, cwd: Path) -> str:
    """The last line that ``code`` prints, with ``path`` before everything that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_sdist_and_wheel_have_the_kernel_sources(tmp_path):
    checkout, tools, wheel = tmp_path / "checkout", tmp_path / "tools", tmp_path / "wheel"
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        checkout.mkdir(exist_ok=True)
        copy(ROOT / part, checkout / part)
    shutil.rmtree(checkout / "src/vllm_mla_fusion.egg-info", ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), "setuptools>=77"]
    subprocess.run(install, check=True)

    sdist = python(BUILD.format("sdist", str(tmp_path)), tools, checkout)
    shutil.unpack_archive(tmp_path / sdist, tmp_path / "sdist")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    stale = unpacked / "build/lib/vllm_mla_fusion/of_an_earlier_build.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    name = python(BUILD.format("wheel", str(tmp_path)), tools, unpacked)
    with zipfile.ZipFile(tmp_path / name) as archive:
        archive.extractall(wheel)

    found = Path(python("from vllm_mla_fusion.jit import compiling; print(compiling.csrc_dir())", wheel, tmp_path))
    assert found == wheel / "vllm_mla_fusion/csrc"
    assert not (wheel / "vllm_mla_fusion" / stale.name).exists()
    stock = ROOT / "csrc"
    files = [path.relative_to(stock) for path in sorted(stock.rglob("*")) if path.is_file() and path.suffix != ".md"]
    assert {path: (found / path).read_bytes() for path in files} == {
        path: (stock / path).read_bytes() for path in files
    }
