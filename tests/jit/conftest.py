# SPDX-License-Identifier: Apache-2.0
"""The tiny csrc/ and its cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_build import CPU, write_sources

from vllm_mla_fusion.jit import build, compiling


@pytest.fixture
def csrc(tmp_path, monkeypatch) -> Path:
    """A csrc/ that compiles in a moment, and an empty cache directory."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    write_sources(folder)
    for module in (build, compiling):
        monkeypatch.setattr(module, "csrc_dir", lambda: folder)
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MLA_FUSION_ARCH", raising=False)
    return folder


@pytest.fixture
def root() -> Path:
    return build.cache_dir()


@pytest.fixture(scope="session")
def prebuilt(tmp_path_factory) -> Path:
    """A cache with a finished build of the tiny csrc/, compiled once for all tests that only need one."""
    csrc, root = tmp_path_factory.mktemp("csrc"), tmp_path_factory.mktemp("prebuilt")
    write_sources(csrc)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLA_FUSION_CACHE_DIR", str(root))
        for module in (build, compiling):
            patch.setattr(module, "csrc_dir", lambda: csrc)
        build.build(CPU)
    return root


@pytest.fixture
def library(root, prebuilt) -> Path:
    """The finished library in this test's own cache."""
    shutil.copytree(prebuilt, root)
    return build.library_path(CPU)
