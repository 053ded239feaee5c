# SPDX-License-Identifier: Apache-2.0
"""The platform wheel on a GPU host that has no compilers. MLA_TEST_DIST names the folder that .ci/release made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from engines import run as engine

DIST = os.environ.get("MLA_TEST_DIST", "")
COMPILERS = ("nvcc", "ninja", "ccache", "c++", "g++", "clang++")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not DIST, reason="MLA_TEST_DIST does not name a folder with the platform wheel"),
]


@pytest.fixture
def site(tmp_path) -> Path:
    """The wheel, which nothing here may write."""
    (wheel,) = Path(DIST).glob("*-py3-none-manylinux*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)
    return site


@pytest.fixture
def bare(site, tmp_path) -> dict[str, str]:
    """PATH without C++ compiler, nvcc and ninja (Triton keeps its gcc), no toolkit, and no home for our cache."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if not any(name in program.name for name in COMPILERS):
                (tools / program.name).unlink(missing_ok=True)
                (tools / program.name).symlink_to(program)
    environ = dict.fromkeys(("CUDA_HOME", "CUDA_PATH", "CXX"), "")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    cache = {"MLA_FUSION_CACHE_DIR": "/proc/self/none"}
    assert shutil.which("g++", path=str(tools)) is None
    return {**environ, **cache, "PATH": str(tools), "PYTHONPATH": path}


def test_it_serves_without_compilers_and_starts_as_fast_as_stock(bare, tmp_path):
    """The better of two first starts each, all of them with empty caches of vLLM's."""
    seconds: dict[str, list[float]] = {"": [], "strict": []}
    tokens = {}
    for index in range(2):
        for mode in seconds:
            cache = tmp_path / f"cache-{mode}-{index}"
            cache.mkdir()
            done = engine(mode, cache, environ=bare, prompts=16)
            assert done.returncode == 0, done.log[-3000:]
            seconds[mode].append(done.result["start_seconds"])
            tokens[mode] = done.result["tokens"]
            if mode:
                (line,) = (line for line in done.plugin_lines() if "MLA layers fused" in line)
                assert ", prebuilt): 6 of 6 MLA layers fused" in line
    print(f"first starts in seconds: {seconds}")
    assert tokens["strict"] == tokens[""]
    assert min(seconds["strict"]) - min(seconds[""]) <= 1.0, seconds


def test_another_architecture_without_compilers_runs_as_stock_with_one_warning(bare, site, tmp_path):
    path = site / "vllm_mla_fusion/prebuilt/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "archs": ["7.5"], "ptx": "99.0"}))
    tmp_path.joinpath("cache").mkdir()
    done = engine("1", tmp_path / "cache", environ=bare, prompts=2)
    assert done.returncode == 0, done.log[-3000:]
    (warning,) = done.plugin_lines("WARNING")
    assert "No C++ compiler found" in warning
    assert "The wheel's own kernel is passed over: it is for 7.5, wanted is" in done.log
    assert "What to do: Install a C++ compiler" in done.log


def test_another_architecture_with_compilers_is_built(site, tmp_path):
    path = site / "vllm_mla_fusion/prebuilt/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "archs": ["7.5"], "ptx": "99.0"}))
    tmp_path.joinpath("cache").mkdir()
    environ = {
        "MLA_FUSION_CACHE_DIR": str(tmp_path / "kernels"),
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
    }
    done = engine("strict", tmp_path / "cache", environ=environ, prompts=2)
    assert done.returncode == 0, done.log[-3000:]
    assert ", JIT): 6 of 6 MLA layers fused" in done.log
