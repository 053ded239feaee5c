# SPDX-License-Identifier: Apache-2.0
"""The machine on which the commands are tried."""

from __future__ import annotations

import importlib.metadata

import pytest
from commands import plugins

from vllm_mla_fusion.host import support
from vllm_mla_fusion.jit import build, compiling, target
from vllm_mla_fusion.tools import trial


@pytest.fixture
def healthy(tmp_path, monkeypatch):
    """A machine with nothing to complain about, an empty cache, and a vLLM in which every model fuses."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "empty.cpp").write_text("int nothing;\n")
    for module in (build, compiling):
        monkeypatch.setattr(module, "csrc_dir", lambda: csrc)
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLA_FUSION", "1")
    for name in ("VLLM_PLUGINS", "VLLM_MLA_DISABLE", "MLA_FUSION_ARCH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", plugins(["mla_fusion"]))
    monkeypatch.setattr(support, "installed_vllm_version", lambda: "0.33.0")
    monkeypatch.setattr(support, "failed_probe", lambda: None)
    monkeypatch.setattr(support, "platform_problem", lambda: None)
    monkeypatch.setattr(target, "torch_backend", lambda: "cpu")
    everything = trial.Trial(layers=3, fused=3, with_norm=3, where="vLLM 0.33.0 on cpu")
    monkeypatch.setattr(trial, "try_config", lambda config, beside, engine_arguments: everything)
