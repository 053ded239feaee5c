# SPDX-License-Identifier: Apache-2.0
"""The trial as on a GPU, on the CPU: `python backend_trial.py FOLDER` has vLLM's own backend cut the model into graphs,
which the CPU's platform would not, and prints what the trial finds and what the pass did in each graph."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform

from vllm_mla_fusion.fx import fusion
from vllm_mla_fusion.host import trial

# vLLM has no ops for these on a CPU.
NO_PASSES = dict.fromkeys(("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant", "eliminate_noops"), False)
stock_check, stock_fuse = CpuPlatform.check_and_update_config.__func__, fusion.fuse
graphs: list[int] = []


def with_the_backend(cls: type, vllm_config: Any) -> None:
    stock_check(cls, vllm_config)
    vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE


def fuse(graph: Any, ops: Any) -> fusion.FusionResult:
    result = stock_fuse(graph, ops)
    graphs.append(result.fused)
    return result


CpuPlatform.check_and_update_config = classmethod(with_the_backend)
FixFunctionalizationPass.__call__ = lambda self, graph: None
fusion.fuse = fuse
outcome = trial.trial(Path(sys.argv[1]), {"compilation_config": {"pass_config": NO_PASSES}})
print(json.dumps({**dataclasses.asdict(outcome), "graphs": graphs}))
