# SPDX-License-Identifier: Apache-2.0
"""Traces whole models of stock vLLM on a pretended AMD GPU, in the forms of checkpoint that AMD and its users publish.

Prints a JSON line for each.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from vllm.plugins import load_general_plugins

from tests.versions import checkpoints
from tests.versions.checkpoints import Checkpoint
from tests.versions.configurations import Case, Configuration
from tests.versions.models import DEEPSEEK_V3, Model
from tests.versions.probe import report_check
from vllm_mla_fusion import kernel

MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}


def _quark(exclude: list[str]) -> dict[str, object]:
    weight = MXFP4 | {"is_dynamic": False, "symmetric": None}
    activation = MXFP4 | {"is_dynamic": True, "symmetric": None}
    tensors = {"weight": weight, "input_tensors": activation, "output_tensors": None, "bias": None}
    return {
        "quant_method": "quark",
        "global_quant_config": tensors,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": exclude,
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
    }


# amd/Kimi-K2-Thinking-MXFP4: the routed experts only
QUARK_EXPERTS = Checkpoint(
    "Quark MXFP4 experts",
    "",
    _quark(["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|down|gate_up)_proj.*"]),
)
QUARK_ALL = Checkpoint("Quark MXFP4", "", _quark(["lm_head", "re:.*mlp.gate$"]))
KIMI_K2 = Model(DEEPSEEK_V3.architecture, {"model_type": "kimi_k2"})
AITER = Configuration("AITER")
PLAIN = Configuration("no AITER")
CONFIGURATION = AITER if os.environ.get("VLLM_ROCM_USE_AITER") == "1" else PLAIN
# (what is traced, by which regular expression its graphs show its form)
CASES = [
    (Case(DEEPSEEK_V3, checkpoints.UNQUANTISED, CONFIGURATION), "vllm.rocm_unquantized_gemm"),
    (Case(DEEPSEEK_V3, checkpoints.FP8_BLOCK, CONFIGURATION), "block"),
    (Case(DEEPSEEK_V3, checkpoints.FP8_TOKEN, CONFIGURATION), "float8_e4m3"),
    (Case(KIMI_K2, QUARK_EXPERTS, CONFIGURATION), "vllm.rocm_unquantized_gemm"),
    (Case(KIMI_K2, QUARK_ALL, CONFIGURATION), "mxfp4|gemm_with_dynamic_quant"),
]
if CONFIGURATION is AITER:
    # vLLM up to 0.26 quantises the attention of a DeepSeek-R1-MXFP4 when it loads it.
    CASES.append((Case(DEEPSEEK_V3, QUARK_EXPERTS, Configuration("AITER, DeepSeek")), ""))


def main() -> None:
    # The kernel is not run here.
    patch.multiple(kernel, failure=lambda: None, load=lambda: SimpleNamespace(backend="rocm", archs=["gfx942"])).start()
    load_general_plugins()
    with tempfile.TemporaryDirectory() as scratch:
        for case, shows in CASES:
            report_check(str(case), partial(_problems, case, shows, Path(scratch)))


def _problems(case: Case, shows: str, scratch: Path) -> Iterator[str]:
    from tests.versions import judge  # after the plugin was loaded

    yield from judge.problems_of_case(case, scratch / "model", scratch)
    graphs = (scratch / f"{case}.txt").read_text()
    if not re.search(shows, graphs):
        yield f"nothing called {shows} is in the graphs"
    if ("aiter" in graphs) != (case.configuration is not PLAIN):
        yield "AITER is used where it should not be, or the other way round"


if __name__ == "__main__":
    main()
