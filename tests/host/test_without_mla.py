# SPDX-License-Identifier: Apache-2.0
"""A process that has no MLA layer to fuse never builds the kernel."""

import threading

import pytest
import torch
from torch import fx

pytest.importorskip("vllm")

from vllm_mla_fusion import identity, kernel
from vllm_mla_fusion.host import passes


def test_no_build_without_a_model_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the compile-cache key nor the passes ask for it before a configuration with MLA graphs has come."""
    built = []
    monkeypatch.setattr(identity, "_kernel_expected", threading.Event())
    monkeypatch.setattr(kernel, "failure", lambda: built.append(True) or "no compiler")
    graph = fx.symbolic_trace(torch.nn.Linear(2, 2)).graph
    without_kernel = identity.compile_cache_key()
    passes.fuse(graph)
    passes.defunctionalise(graph)
    assert not built
    identity.expect_kernel()
    unavailable = identity.compile_cache_key()
    assert built
    monkeypatch.setattr(kernel, "failure", lambda: None)
    assert len({without_kernel, unavailable, identity.compile_cache_key()}) == 3
