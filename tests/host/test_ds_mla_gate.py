# SPDX-License-Identifier: Apache-2.0
"""fp8_ds_mla is fused only where vLLM's own writer was seen to store the bytes of our kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from reference import ds_mla_rows

pytest.importorskip("vllm")

from vllm_mla_fusion.host import cache_writer, support

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _ask_again() -> Iterator[None]:
    cache_writer._ds_mla_writer_agrees.cache_clear()
    yield
    cache_writer._ds_mla_writer_agrees.cache_clear()


def amax_over_448(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale) -> None:
    assert kv_cache_dtype == "fp8_ds_mla"
    kv_cache[0, slot_mapping] = ds_mla_rows(kv_c, k_pe)


def powers_of_two(*arguments) -> None:
    amax_over_448(*arguments)
    scales = arguments[2][..., 512:528].view(torch.float32)
    scales.copy_(scales.log2().ceil().exp2())


def one_bit_off(*arguments) -> None:
    amax_over_448(*arguments)
    arguments[2][0, 63, 655] ^= 1


def broken(*arguments) -> None:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("writer", "agrees"),
    [(amax_over_448, True), (powers_of_two, False), (one_bit_off, False), (broken, False)],
)
def test_writer_is_asked_once(writer, agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("vllm._custom_ops.concat_and_cache_mla", lambda *a: calls.append(a) or writer(*a))
    assert [cache_writer._ds_mla_writer_agrees(CPU), cache_writer._ds_mla_writer_agrees(CPU)] == [agrees, agrees]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("agrees", "shape", "cache_dtype", "dtype", "reason"),
    [
        (True, (4, 64, 656), torch.uint8, torch.bfloat16, None),
        (False, (4, 64, 656), torch.uint8, torch.bfloat16, "stores other bytes"),
        (True, (4, 64, 576), torch.uint8, torch.bfloat16, "cache layout"),
        (True, (4, 64, 656), torch.bfloat16, torch.bfloat16, "not torch.uint8"),
        (True, (4, 64, 656), torch.uint8, torch.float32, "a key of 16 bits"),
    ],
)
def test_gate(agrees, shape, cache_dtype, dtype, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "platform", lambda: SimpleNamespace(is_cuda=lambda: True, is_rocm=lambda: False))
    monkeypatch.setattr(cache_writer, "_ds_mla_writer_agrees", functools.cache(lambda device: agrees))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64)
    with torch._subclasses.FakeTensorMode():
        cache = torch.empty(shape, dtype=cache_dtype, device="cuda")
        problem = cache_writer._cache_problem(cache, "fp8_ds_mla", layer, dtype)
    assert problem is None if reason is None else reason in problem


def test_nothing_is_tried_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("vllm._custom_ops.concat_and_cache_mla", broken)
    assert "before a CUDA graph was captured" in cache_writer._ds_mla_problem(CPU, torch.bfloat16)
    assert cache_writer._ds_mla_writer_agrees.cache_info().currsize == 0
