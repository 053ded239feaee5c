# SPDX-License-Identifier: Apache-2.0
"""What a layer costs the host in steps outside CUDA graphs: our layer ops, and the stock ops that they replace.

Stock is given its cheapest: RoPE and norms as ready ops, as many launches as a profile of vLLM 0.26.0 has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("vllm")

from mla_layer import Attention, forward_context
from vllm.utils.torch_utils import _encode_layer_name

from vllm_mla_fusion.arguments import NORM, NORMS, Op
from vllm_mla_fusion.host import layer_ops, layer_state
from vllm_mla_fusion.tools import bench_cells
from vllm_mla_fusion.tools.bench_cells import EPSILON, GROUP, LORA_RANK, Q_LORA_RANK, ROT_DIM, Cell, Tensors

NAME, CALLS, ROUNDS = "layers.0", 1000, 7

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.hip is not None, reason="stock has these ops on CUDA only"),
]


@pytest.fixture
def tensors() -> Tensors:
    """Of a decode step of 8 tokens in a TP8 rank of DeepSeek-V3."""
    return next(bench_cells.sets(Cell(num_tokens=8, num_heads=16), 1, "cuda"))


@pytest.fixture
def layer(tensors: Tensors) -> Attention:
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLAImpl

    layer = Attention(TritonMLAImpl)
    layer.kv_cache = tensors["kv_cache"]
    layer.kv_lora_rank, layer.qk_rope_head_dim = LORA_RANK, ROT_DIM
    layer_state.of(layer).is_watched = False
    return layer


def ours(op: Op, s: Tensors, quant: str) -> Callable[[], object]:
    """The layer op, and the one after `q_b` where the model has one."""
    given = {
        **s,
        "q_c_weight": s["q_weight"],
        "q_epsilon": EPSILON,
        "kv_c_weight": s["weight"],
        "epsilon": EPSILON,
        "is_neox": False,
        "kv_cache_dtype": "auto",
        "kv_cache_scale": s["scale"],
        "q_quant": quant,
        "q_rounds_twice": True,
        "q_smallest": 1 / 512,
        "q_static_scale": None,
        "q_scales_layout": "columns",
    }
    ops, name = layer_ops.register(), _encode_layer_name(NAME)
    values = [given[each.name] for each in op.layer_arguments]
    if op is NORM:
        return lambda: ops.norm(*values, name)

    def around_q_b() -> None:
        ops.norms(*values, name)
        ops.rope_query(s["positions"], s["q_pe"], s["cos_sin_cache"], False, name)

    return around_q_b


def stock(op: Op, s: Tensors, quant: str) -> Callable[[], object]:
    native, name = torch.ops._C, _encode_layer_name(NAME)
    norm, block_quant = native.rms_norm.default, native.rms_norm_per_block_quant.default
    rope, update = native.rotary_embedding.default, torch.ops.vllm.unified_mla_kv_cache_update.default
    positions, q_pe, k_pe, kv_c, q_c = (s[each] for each in ("positions", "q_pe", "k_pe", "kv_c", "q_c"))
    tokens = len(positions)

    def rotate(first: torch.Tensor, second: torch.Tensor | None) -> None:
        rope(positions, first, second, ROT_DIM, s["cos_sin_cache"], False)

    def call() -> None:
        if quant != "none":
            copied = q_c.clone(memory_format=torch.contiguous_format)
            values = torch.empty(tokens, Q_LORA_RANK, dtype=torch.float8_e4m3fn, device="cuda")
            scales = torch.empty(Q_LORA_RANK // GROUP, tokens, device="cuda").T
            block_quant(values, copied, s["q_weight"], scales, EPSILON, None, None, GROUP, True)
        normed = torch.empty(tokens, LORA_RANK, dtype=kv_c.dtype, device="cuda")
        norm(normed, kv_c, s["weight"], EPSILON)
        if op is NORM:
            rotate(q_pe, k_pe)
        else:
            rotate(k_pe, None)
            rotate(q_pe, None)
        update(normed, k_pe, name, "auto", s["scale"])

    return call


def microseconds(call: Callable[[], object]) -> float:
    """Of the host per call: nothing waits for the GPU, whose queue takes more calls than are timed at once."""
    times = []
    for _ in range(CALLS // 50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            call()
        times.append((time.perf_counter() - start) / 50 * 1e6)
    return statistics.median(times)


@pytest.mark.parametrize(
    ("op", "quant"),
    [(NORM, "none"), (NORMS, "none"), (NORMS, "group")],
    ids=["one op", "two ops", "two ops, fp8 block"],
)
def test_host_time(op: Op, quant: str, tensors: Tensors, layer: Attention) -> None:
    with forward_context({NAME: layer}, tensors["slots"]), torch.inference_mode():
        calls = {"ours": ours(op, tensors, quant), "stock": stock(op, tensors, quant)}
        for call in calls.values():
            call()
        assert not layer_state.of(layer).reasons
        rounds = [{name: microseconds(call) for name, call in calls.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in calls}
    ratio = statistics.median(each["ours"] / each["stock"] for each in rounds)
    print(f"\nhost, us per layer and call: {medians}, ratio {ratio:.2f}")
    assert ratio <= 0.6
