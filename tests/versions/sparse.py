# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3.2's layers: stand-ins for what their indexer needs of a GPU, and what must hold for their graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm.model_executor.models import deepseek_v2
from vllm.v1.worker import workspace

from . import codegen, graphs
from .tracing import Trace
from .variants import SPARSE


@contextmanager
def pretended_kernels() -> Iterator[None]:
    """The indexer quantises with torch's ops instead of its own kernel."""
    with patch.object(deepseek_v2, "per_token_group_quant_fp8", _quantised):
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(torch.device("cuda"))
        yield


def prepare(model: torch.nn.Module) -> None:
    """Turns the indexer's fused kernel off, where the release has one."""
    for module in model.modules():
        if hasattr(module, "use_fused_indexer_q"):
            module.use_fused_indexer_q = False


def problems_of(trace: Trace) -> Iterator[str]:
    """What is wrong with the layers' RoPE and cache writes; the indexer has a RoPE of its own, which stays."""
    yield from graphs.fused_problems(SPARSE, trace.after)
    yield from graphs.other_meaning(trace)
    yield from codegen.copies(trace.code)


def _quantised(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.to(torch.float8_e4m3fn), x.float().view(*x.shape[:-1], -1, 128).abs().amax(-1)
