# SPDX-License-Identifier: Apache-2.0
"""What a layer costs the host in steps outside CUDA graphs: our layer ops, and what of stock vLLM they replace. `-s`
prints the figures; hosts differ by a factor of two from hour to hour, hence the loose bounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

pytest.importorskip("vllm")

from mla_layer import HEADS, HIDDEN, LORA, NOPE, ROT, Attention, Layer, forward_context, inputs
from vllm.utils.torch_utils import _encode_layer_name

from vllm_mla_fusion.activation import NORM_VARIABLE
from vllm_mla_fusion.arguments import NORM, NORMS, Op
from vllm_mla_fusion.host import layer_ops, layer_state, passes
from vllm_mla_fusion.tools import bench_cells
from vllm_mla_fusion.tools.bench_cells import EPSILON, GROUP, LORA_RANK, Q_LORA_RANK, ROT_DIM, Cell, Tensors

LAYERS, ROUNDS, CALLS = 8, 15, 150
NAME = "layers.0"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.hip is not None, reason="stock has these ops on CUDA only"),
]


def attention() -> Attention:
    from vllm.v1.attention.backends.mla.triton_mla import TritonMLAImpl

    layer = Attention(TritonMLAImpl)
    layer.kv_cache = layer.kv_cache.cuda()
    layer_state.of(layer).is_watched = False
    return layer


def microseconds(call: Callable[[], object], count: int) -> float:
    """Of the host per call. Nothing waits for the GPU, whose queue takes more than is timed at once."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def medians(calls: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Of rounds that take turns."""
    for call in calls.values():
        call()
    rounds = [{name: microseconds(call, count) for name, call in calls.items()} for _ in range(ROUNDS * CALLS // count)]
    return {name: statistics.median(each[name] for each in rounds) for name in calls}


class Gemms(Layer):
    """The layer without what is compared."""

    def forward(self, positions, hidden, cos_sin_cache):
        qkv = self.qkv_a(hidden)
        query = self.q_b(qkv[:, : -LORA - ROT] if self.q_lora else hidden)
        return query.view(-1, HEADS, NOPE + ROT), qkv


class Stack(nn.Module):
    """Layers in one graph, to which what its call costs is shared out; one after the other, or Inductor would make
    kernels for several of them."""

    def __init__(self, make: type[Layer], **kwargs: bool) -> None:
        super().__init__()
        layers = (make(f"layers.{i}", "native", False, True, norm="written_out", **kwargs) for i in range(LAYERS))
        self.layers = nn.ModuleList(layers).cuda()

    def forward(self, positions, hidden, cos_sin_cache):
        results = []
        for layer in self.layers:
            query, *rest = layer(positions, hidden, cos_sin_cache)
            hidden = hidden + layer.o(query.flatten(1))
            results += rest
        return hidden, results

    def compiled(self, fusion: CustomGraphPass | None, args: tuple[torch.Tensor, ...]) -> Callable[[], object]:
        """A call of what Inductor made, without Dynamo's guards, which vLLM drops."""
        options = {"enable_auto_functionalized_v2": False, "fx_graph_cache": False}
        options |= {"post_grad_custom_post_pass": fusion} if fusion else {}
        calls: list[Callable[[], object]] = []

        def backend(module: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., object]:
            made = compile_fx(module, examples, config_patches=options)
            return lambda *real: calls.append(lambda: made(*real)) or made(*real)

        torch._dynamo.reset()
        torch.compile(self, backend=backend, fullgraph=True, dynamic=False)(*args)
        return calls[0]


@pytest.mark.parametrize(("q_lora", "bound"), [(False, 0.95), (True, 1.2)], ids=["one op", "two ops"])
def test_compiled_layers(q_lora: bool, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's defaults have them: norms and RoPE are Triton kernels that Inductor makes, one for both norms. Beside
    whole layers, in which Inductor makes views of what our ops read: these ops by themselves."""
    monkeypatch.setenv(NORM_VARIABLE, "1")
    *args, slots = (each.cuda() for each in inputs())
    assert args[1].shape[1] == HIDDEN
    attentions = {f"layers.{index}": attention() for index in range(LAYERS)}
    forms = {"stock": (Layer, None), "ours": (Layer, passes.InductorHook(None)), "gemms": (Gemms, None)}
    with forward_context(attentions, slots), torch.inference_mode():
        calls = {
            name: Stack(make, q_lora=q_lora, q_norm=q_lora).compiled(fusion, args)
            for name, (make, fusion) in forms.items()
        }
        found = medians(calls, 5)
    ours, stock = ((found[name] - found["gemms"]) / LAYERS for name in ("ours", "stock"))
    with deepseek_layer() as s, torch.inference_mode():
        ops = medians({"ours": (ours_around_q_b(s, "none") if q_lora else ours_in_one_op(s))}, 50)["ours"]
    print(f"\nhost, us per layer: ours {ours:.1f} (the ops alone {ops:.1f}), stock {stock:.1f}", end="")
    print(f", ratio {ours / stock:.2f} ({ops / stock:.2f})")
    assert layer_state.of(attentions["layers.0"]).decision is not None
    assert ours < bound * stock


def test_ops_of_fp8_block() -> None:
    """Stock's ops for DeepSeek-V3's official checkpoints, RoPE and the latent's norm as ready ops too."""
    with deepseek_layer() as s, torch.inference_mode():
        found = medians({"ours": ours_around_q_b(s, "group"), "stock": stock_around_q_b(s)}, 50)
    print(f"\nhost, us per layer: ours {found['ours']:.1f}, stock {found['stock']:.1f}", end="")
    print(f", ratio {found['ours'] / found['stock']:.2f}")
    assert found["ours"] < 0.75 * found["stock"]


@contextmanager
def deepseek_layer() -> Iterator[Tensors]:
    """A layer of that name in vLLM's forward context, and what its ops read, 8 tokens."""
    s = next(bench_cells.sets(Cell(num_tokens=8, num_heads=16), 1, "cuda"))
    layer = attention()
    layer.kv_cache, layer.kv_lora_rank, layer.qk_rope_head_dim = s["kv_cache"], LORA_RANK, ROT_DIM
    with forward_context({NAME: layer}, s["slots"]):
        yield s
    assert not layer_state.of(layer).reasons


def layer_arguments(s: Tensors, op: Op, q_quant: str = "none") -> list[object]:
    norms = {"q_c_weight": s["q_weight"], "q_epsilon": EPSILON, "kv_c_weight": s["weight"], "epsilon": EPSILON}
    cache = {"is_neox": False, "kv_cache_dtype": "auto", "kv_cache_scale": s["scale"]}
    form = {"q_quant": q_quant, "q_rounds_twice": True, "q_smallest": 1 / 512, "q_static_scale": None}
    given = {**s, **norms, **cache, **form, "q_scales_layout": "columns"}
    return [*(given[each.name] for each in op.layer_arguments), _encode_layer_name(NAME)]


def ours_in_one_op(s: Tensors) -> Callable[[], object]:
    values, op = layer_arguments(s, NORM), layer_ops.register().norm
    return lambda: op(*values)


def ours_around_q_b(s: Tensors, q_quant: str) -> Callable[[], object]:
    values = layer_arguments(s, NORMS, q_quant)
    before, after = layer_ops.register().norms, layer_ops.register().rope_query_in_place

    def call() -> None:
        before(*values)
        after(s["positions"], s["q_pe"], s["cos_sin_cache"], False)

    return call


def stock_around_q_b(s: Tensors) -> Callable[[], object]:
    native, layer_name = torch.ops._C, _encode_layer_name(NAME)
    norm, block_quant = native.rms_norm.default, native.rms_norm_per_block_quant.default
    rope, update = native.rotary_embedding.default, torch.ops.vllm.unified_mla_kv_cache_update.default
    k_pe, kv_c, q_c, tokens = s["k_pe"], s["kv_c"], s["q_c"], len(s["positions"])

    def rotate(heads: torch.Tensor) -> None:
        rope(s["positions"], heads, None, ROT_DIM, s["cos_sin_cache"], False)

    def call() -> None:
        values = torch.empty(tokens, Q_LORA_RANK, dtype=torch.float8_e4m3fn, device="cuda")
        scales = torch.empty(Q_LORA_RANK // GROUP, tokens, device="cuda").T
        copied = q_c.clone(memory_format=torch.contiguous_format)
        block_quant(values, copied, s["q_weight"], scales, EPSILON, None, None, GROUP, True)
        normed = torch.empty(tokens, LORA_RANK, dtype=kv_c.dtype, device="cuda")
        norm(normed, kv_c, s["weight"], EPSILON)
        rotate(k_pe)
        rotate(s["q_pe"])
        update(normed, k_pe, layer_name, "auto", s["scale"])

    return call
