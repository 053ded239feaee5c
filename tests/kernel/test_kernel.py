# SPDX-License-Identifier: Apache-2.0
"""The low-level op against an independent float64 reference, on the CPU and (marker gpu) on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import (
    NORM_ERROR,
    Case,
    Inputs,
    assert_within_one_rounding,
    expected_cache,
    make_inputs,
    quantise,
    rms_norm,
    rotate,
)

from vllm_mla_fusion import kernel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

V2_LITE = Case("v2-lite", num_tokens=37, num_heads=16)
V3_RANK = Case("v3-rank", num_tokens=19, num_heads=16, kv_extra=1536)
CASES = [
    V2_LITE,
    V3_RANK,
    V3_RANK.but(num_heads=128),
    V2_LITE.but(num_tokens=1),
    V2_LITE.but(num_tokens=1, num_heads=1),
    V2_LITE.but(num_heads=0),
    V2_LITE.but(num_tokens=2500),  # fills a GPU: several heads per lane
    V2_LITE.but(num_tokens=2500, is_neox=True, num_heads=5),
    V3_RANK.but(num_tokens=300, num_heads=128, padding=3),  # the same, and several blocks of a token
    V3_RANK.but(num_tokens=300, num_heads=117, kv_cache_dtype="fp8", cos_sin_dtype=torch.float32),
    V2_LITE.but(num_tokens=2500, dtype=torch.float16, positions_dtype=torch.int32, cos_sin_dtype=torch.float32),
    V2_LITE.but(num_tokens=2500, kv_cache_dtype="fp8_e5m2", padding=4),
    V2_LITE.but(padding=3),
    V3_RANK.but(cos_sin_pad=8, key_extra=24),
    V3_RANK.but(cos_sin_pad=1, key_extra=3, kv_cache_dtype="fp8"),
    V2_LITE.but(num_slots=20, padding=4),
    V2_LITE.but(slot_tail=27, padding=4),
    V3_RANK.but(slot_tail=1, kv_cache_dtype="fp8", row_pad=3),
    V2_LITE.but(num_slots=0),
    V2_LITE.but(num_slots=0, kv_cache_dtype="fp8"),
    V2_LITE.but(num_slots=0, kv_cache_dtype="fp8", rot_dim=30),
    V2_LITE.but(is_neox=True),
    V3_RANK.but(cos_sin_dtype=torch.float32),
    V3_RANK.but(cos_sin_dtype=torch.float32, is_neox=True, kv_cache_dtype="fp8"),
    V2_LITE.but(dtype=torch.float16),
    V2_LITE.but(dtype=torch.float32),
    V2_LITE.but(dtype=torch.float32, is_neox=True, kv_cache_dtype="fp8"),
    V2_LITE.but(kv_cache_dtype="bfloat16"),
    V2_LITE.but(kv_cache_dtype="float16", dtype=torch.float16, cos_sin_dtype=torch.float32),
    V2_LITE.but(kv_cache_dtype="fp8", padding=5),
    V3_RANK.but(kv_cache_dtype="fp8_e4m3", scale=2.5),
    V2_LITE.but(kv_cache_dtype="fp8_e5m2"),
    V2_LITE.but(kv_cache_dtype="fp8_e5m2", dtype=torch.float16, scale=0.0001),  # saturates
    V2_LITE.but(kv_cache_dtype="fp8", scale=0.001),  # saturates
    V2_LITE.but(rot_dim=32, block_size=16),
    V2_LITE.but(rot_dim=128, lora_rank=256, num_heads=3),
    V2_LITE.but(rot_dim=8, is_neox=True, num_heads=37),  # one lane has a whole head
    V2_LITE.but(rot_dim=8, is_neox=True, num_heads=37, kv_cache_dtype="fp8", padding=3),
    V2_LITE.but(rot_dim=256, is_neox=True, num_heads=3, kv_cache_dtype="fp8_e5m2", dtype=torch.float16),  # all lanes
    V2_LITE.but(rot_dim=128, lora_rank=1536, is_neox=True),  # more latent than lanes hold: the general path
    V2_LITE.but(lora_rank=576, num_heads=7, block_size=1),
    V2_LITE.but(row_pad=64, block_pad=128),
    V2_LITE.but(row_pad=3, block_pad=5),  # from here on: the general path
    V2_LITE.but(row_pad=3),
    V2_LITE.but(rot_dim=6, lora_rank=5, nope_dim=3),
    V2_LITE.but(rot_dim=96, lora_rank=100, is_neox=True, kv_cache_dtype="fp8", padding=3),
    V2_LITE.but(q_shift=1),
    V2_LITE.but(nope_dim=1, dtype=torch.float32),
    V2_LITE.but(positions_dtype=torch.int32),
    V2_LITE.but(block_size=48),
    V2_LITE.but(block_size=3, kv_cache_dtype="fp8"),
    V2_LITE.but(block_size=1000, num_tokens=2500),
]
DS_MLA_CASES = [
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", padding=3),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", num_tokens=2500, num_slots=2400),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", row_pad=16, block_pad=32, cos_sin_dtype=torch.float32),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", norm=True, num_slots=10),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", norm=True, num_tokens=2500),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", row_pad=1, block_pad=3),  # from here on: the general path
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", row_pad=8, padding=3, norm=True),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", dtype=torch.float16),
    V3_RANK.but(kv_cache_dtype="fp8_ds_mla", is_neox=True, norm=True),
]
NORM_CASES = [
    V2_LITE.but(norm=True, padding=3),
    V2_LITE.but(norm=True, slot_tail=3),
    V3_RANK.but(norm=True, num_slots=10),
    V2_LITE.but(norm=True, epsilon=0.5),
    V2_LITE.but(norm=True, num_tokens=2500, kv_cache_dtype="fp8"),
    V3_RANK.but(norm=True, num_tokens=300, num_heads=128, padding=3, epsilon=0.5, cos_sin_pad=8, key_extra=8),
    V2_LITE.but(norm=True, dtype=torch.float16, kv_cache_dtype="fp8_e5m2", cos_sin_dtype=torch.float32),
    V2_LITE.but(norm=True, is_neox=True, lora_rank=1536, num_slots=0),
    V2_LITE.but(norm=True, kv_cache_dtype="fp8", num_slots=0),
    V2_LITE.but(norm=True, kv_cache_dtype="fp8_ds_mla", num_slots=0),
    V2_LITE.but(norm=True, lora_rank=256, rot_dim=32, kv_cache_dtype="fp8", scale=1.9),
    V2_LITE.but(norm=True, lora_rank=100, rot_dim=6, row_pad=3, epsilon=0.5),  # the general path
    V2_LITE.but(norm=True, dtype=torch.float32, kv_cache_dtype="fp8"),
]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    kernel.load()


def run(inputs: Inputs) -> Inputs:
    result = inputs.clone()
    (kernel.op() if inputs.kv_c_weight is None else kernel.norm_op())(*result.args())
    return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES + NORM_CASES + DS_MLA_CASES, ids=lambda case: case.name)
def test_against_float64(case: Case, device: str) -> None:
    inputs = make_inputs(case, device)
    result = run(inputs)

    assert_within_one_rounding(result.q_pe, rotate(inputs.q_pe, inputs))
    assert_within_one_rounding(result.k_pe_out, rotate(inputs.k_pe, inputs))
    # What surrounds q_pe stays as it was.
    untouched = result.query.clone()
    untouched.as_strided(inputs.q_pe.shape, inputs.q_pe.stride(), inputs.q_pe.storage_offset()).copy_(inputs.q_pe)
    assert torch.equal(untouched.view(torch.uint8), inputs.query.view(torch.uint8))
    # The whole cache memory: rows bitwise, every other byte unchanged.
    if case.norm:
        assert_within_one_rounding(result.kv_c_normed_out, rms_norm(inputs), NORM_ERROR)
    expected = expected_cache(inputs, result.k_pe_out, result.kv_c_normed_out)
    assert torch.equal(result.cache_storage.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    inputs = make_inputs(V2_LITE.but(num_tokens=0), device)
    result = run(inputs)
    assert torch.equal(result.cache_storage.view(torch.uint8), inputs.cache_storage.view(torch.uint8))


@pytest.mark.parametrize("changes", [{}, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8", "rot_dim": 30}])
@pytest.mark.parametrize("device", DEVICES)
def test_empty_cache_rotates_only(device: str, changes: dict[str, Any]) -> None:
    inputs = make_inputs(V2_LITE.but(**changes), device)
    inputs.kv_cache = inputs.kv_cache.new_empty(0)
    result = inputs.clone()
    result.kv_cache = inputs.kv_cache
    kernel.op()(*result.args())
    assert_within_one_rounding(result.q_pe, rotate(inputs.q_pe, inputs))
    assert_within_one_rounding(result.k_pe_out, rotate(inputs.k_pe, inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_two_dimensional_key_and_repeatability(device: str) -> None:
    inputs = make_inputs(V3_RANK.but(kv_cache_dtype="fp8"), device)
    first = run(inputs)
    inputs.k_pe = inputs.k_pe.squeeze(1)
    second = run(inputs)
    for name in ("query", "k_pe_out", "cache_storage"):
        assert torch.equal(getattr(first, name).view(torch.uint8), getattr(second, name).view(torch.uint8))


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_float16_value_in_fp8(kv_cache_dtype: str, device: str) -> None:
    """All finite float16 values as latents, unscaled: rounding, subnormals and saturation of the conversion."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    values = torch.cat([values, values.new_zeros(-len(values) % 512)]).view(-1, 512)
    inputs = make_inputs(
        Case("all", num_tokens=len(values), num_heads=1, dtype=torch.float16, kv_cache_dtype=kv_cache_dtype, scale=1.0),
        device,
    )
    inputs.kv_c = values.to(device)
    result = run(inputs)
    expected = expected_cache(inputs, result.k_pe_out)
    assert torch.equal(result.cache_storage, expected)


@pytest.mark.parametrize("row_pad", [0, 1], ids=["vectors", "general"])
@pytest.mark.parametrize("device", DEVICES)
def test_ds_mla_tiles_of_all_magnitudes(device: str, row_pad: int) -> None:
    """Each tile has a scale of its own: zeros, subnormals, the largest bfloat16, one outlier, signed zeros."""
    inputs = make_inputs(V3_RANK.but(kv_cache_dtype="fp8_ds_mla", num_tokens=280, row_pad=row_pad), device)
    latent = torch.randn(280, 4, 128, generator=torch.Generator().manual_seed(1))
    latent *= torch.ldexp(torch.ones(280), torch.arange(-152, 128)).view(-1, 1, 1).clamp(max=2.0**125)
    latent[::3, 1] = 0.0
    latent[1::3, 2, 77] = torch.finfo(torch.bfloat16).max
    latent[::5, 3, ::2] = -0.0
    inputs.kv_c = latent.flatten(1).to(torch.bfloat16).to(device)
    result = run(inputs)
    expected = expected_cache(inputs, result.k_pe_out)
    assert torch.equal(result.cache_storage, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_int32(device: str) -> None:
    """A cache of more than 2^31 elements (a view with a huge block stride over memory that is never touched)."""
    case = V2_LITE.but(num_tokens=3, kv_cache_dtype="fp8")
    inputs = make_inputs(case, device)
    block_stride = (1 << 31) + 576
    storage = torch.empty(2 * block_stride + 64 * 576, dtype=torch.uint8, device=device)
    kv_cache = storage.as_strided((3, 64, 576), (block_stride, 576, 1))
    kv_cache[1:, :3] = 7
    inputs.kv_cache, inputs.cache_storage = kv_cache, storage
    inputs.slot_mapping = torch.tensor([64, 128, 130], device=device)
    k_pe_out = torch.empty_like(inputs.k_pe_out)
    arguments = list(inputs.args())
    arguments[10] = k_pe_out
    kernel.op()(*arguments)
    rows = quantise(torch.cat([inputs.kv_c, k_pe_out.squeeze(1)], -1), inputs)
    assert torch.equal(torch.stack([kv_cache[1, 0], kv_cache[2, 0], kv_cache[2, 2]]), rows)
    assert (kv_cache[1, 1:3] == 7).all()
    assert (kv_cache[2, 1] == 7).all()


@pytest.mark.gpu
def test_cuda_graph_and_current_stream() -> None:
    inputs = make_inputs(V2_LITE.but(padding=3), "cuda")
    eager = run(inputs)
    replayed = inputs.clone()
    graph = torch.cuda.CUDAGraph()
    warm_up = inputs.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel.op()(*warm_up.args())
    stream.synchronize()
    with torch.cuda.graph(graph):
        kernel.op()(*replayed.args())
    replayed.query.copy_(inputs.query)
    graph.replay()
    torch.cuda.synchronize()
    for name in ("query", "k_pe_out", "cache_storage"):
        assert torch.equal(getattr(eager, name).view(torch.uint8), getattr(replayed, name).view(torch.uint8))


@pytest.mark.gpu
def test_order_of_kernels_in_a_graph() -> None:
    """A grid may start early, but waits for what those before it write: torch's, and the last blocks of our own."""
    inputs = make_inputs(V3_RANK.but(num_tokens=2000, num_heads=128), "cuda")

    def last_tokens(of: Inputs) -> Inputs:
        """The tokens that a call on all of them rotates last."""
        rows = {name: getattr(of, name)[-64:] for name in ("positions", "q_pe", "k_pe", "kv_c", "slot_mapping")}
        return replace(of, **rows, k_pe_out=torch.empty_like(of.k_pe_out[-64:]))

    expected = inputs.clone()
    for call in (expected, last_tokens(expected)):
        kernel.op()(*call.args())
        torch.cuda.synchronize()
    expected_doubled = expected.query * 2

    result = inputs.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.query.copy_(inputs.query)
        kernel.op()(*result.args())
        kernel.op()(*last_tokens(result).args())
        doubled = result.query * 2
    for _ in range(100):
        doubled.zero_()
        graph.replay()
        assert torch.equal(doubled, expected_doubled)


BAD = {
    "q_pe must have dtype": lambda i: setattr(i, "q_pe", i.q_pe.double()),
    "q_pe must be": lambda i: setattr(i, "q_pe", i.q_pe[:, 0]),
    "even, positive rot_dim": lambda i: setattr(i, "q_pe", i.q_pe[..., :63]),
    "k_pe must be": lambda i: setattr(i, "k_pe", i.k_pe[:-1]),
    "k_pe must have dtype bfloat16, got float32": lambda i: setattr(i, "k_pe", i.k_pe.float()),
    "kv_c must be": lambda i: setattr(i, "kv_c", i.kv_c[:-1]),
    "kv_c must have at least one column": lambda i: setattr(i, "kv_c", i.kv_c[:, :0]),
    "kv_c must have a contiguous last dimension": lambda i: setattr(i, "kv_c", i.kv_c.t().contiguous().t()),
    "q_pe must have a contiguous last dimension": lambda i: setattr(i, "q_pe", i.query.view(37, 16, 192)[..., ::3]),
    "k_pe must have a contiguous last dimension": lambda i: setattr(i, "k_pe", torch.cat([i.k_pe] * 2, -1)[..., ::2]),
    "positions must have a contiguous": lambda i: setattr(i, "positions", torch.cat([i.positions] * 2)[::2]),
    "cos_sin_cache must have a contiguous": lambda i: setattr(i, "cos_sin_cache", i.cos_sin_cache.t().contiguous().t()),
    "k_pe_out must have dtype bfloat16, got float32": lambda i: setattr(i, "k_pe_out", i.k_pe_out.float()),
    "positions must have dtype int64 or int32, got float32": lambda i: setattr(i, "positions", i.positions.float()),
    "positions must be": lambda i: setattr(i, "positions", i.positions[1:]),
    r"positions\[0\] must be in": lambda i: i.positions.fill_(1 << 20),
    "cos_sin_cache must be": lambda i: setattr(i, "cos_sin_cache", i.cos_sin_cache[:, :32]),
    "cos_sin_cache must have dtype": lambda i: setattr(i, "cos_sin_cache", i.cos_sin_cache.half()),
    "slot_mapping must have dtype int64, got int32": lambda i: setattr(i, "slot_mapping", i.slot_mapping.int()),
    r"slot_mapping\[0\] must be below": lambda i: i.slot_mapping.fill_(1 << 40),
    "kv_cache must be": lambda i: setattr(i, "kv_cache", i.kv_cache[..., :-1]),
    "kv_cache must have dtype bfloat16": lambda i: setattr(i, "kv_cache", i.kv_cache.float()),
    "kv_cache must have dtype uint8": lambda i: setattr(i, "kv_cache_dtype", "fp8"),
    "kv_cache must have dtype uint8, got bfloat16": lambda i: setattr(i, "kv_cache_dtype", "fp8_ds_mla"),
    "kv_cache_dtype must be one of": lambda i: setattr(i, "kv_cache_dtype", "int4"),
    "kv_cache_dtype 'float16' must be": lambda i: setattr(i, "kv_cache_dtype", "float16"),
    "k_pe_out must be contiguous": lambda i: setattr(i, "k_pe_out", i.k_pe_out.repeat(1, 1, 2)[..., ::2]),
    "k_pe_out must be": lambda i: setattr(i, "k_pe_out", i.k_pe_out.squeeze(1)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_written(message: str) -> None:
    inputs = make_inputs(V2_LITE)
    BAD[message](inputs)
    before = inputs.clone()
    with pytest.raises(RuntimeError, match=message):
        kernel.op()(*inputs.args())
    assert torch.equal(inputs.query, before.query)
    assert torch.equal(inputs.cache_storage.view(torch.uint8), before.cache_storage.view(torch.uint8))


BAD_SCALE = {
    "kv_cache_scale must have dtype float32, got float64": torch.ones(1, dtype=torch.float64),
    "kv_cache_scale must hold one value, got 2": torch.ones(2),
}


@pytest.mark.parametrize("message", BAD_SCALE)
def test_bad_scale_is_refused(message: str) -> None:
    inputs = make_inputs(V2_LITE.but(kv_cache_dtype="fp8"))
    inputs.kv_cache_scale = BAD_SCALE[message]
    with pytest.raises(RuntimeError, match=message):
        kernel.op()(*inputs.args())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["positions", "k_pe", "kv_c", "cos_sin_cache", "slot_mapping", "kv_cache", "k_pe_out"])
def test_tensor_on_another_device_is_refused(name: str) -> None:
    inputs = make_inputs(V2_LITE, "cuda")
    setattr(inputs, name, getattr(inputs, name).cpu())
    with pytest.raises(RuntimeError, match=rf"{name} must be on the device of q_pe \(gpu 0\), got cpu"):
        kernel.op()(*inputs.args())


BAD_NORM = {
    "kv_c_weight must be": lambda i: setattr(i, "kv_c_weight", i.kv_c_weight[1:]),
    "kv_c_weight must have dtype bfloat16, got float32": lambda i: setattr(i, "kv_c_weight", i.kv_c_weight.float()),
    "kv_c_normed_out must be": lambda i: setattr(i, "kv_c_normed_out", i.kv_c_normed_out[1:]),
    "kv_c_normed_out must be contiguous": lambda i: setattr(
        i, "kv_c_normed_out", i.kv_c_normed_out.repeat(1, 2)[:, ::2]
    ),
}


@pytest.mark.parametrize("message", BAD_NORM)
def test_bad_norm_is_refused(message: str) -> None:
    inputs = make_inputs(V2_LITE.but(norm=True))
    BAD_NORM[message](inputs)
    with pytest.raises(RuntimeError, match=message):
        kernel.norm_op()(*inputs.args())


BAD_DS_MLA = {
    r"kv_cache must be .*bytes of a row\] = \[any, any, 656\]": lambda i: setattr(i, "kv_cache", i.kv_cache[..., :576]),
    r"kv_c must be .*512\] for an fp8_ds_mla cache": lambda i: setattr(i, "kv_c", i.kv_c[:, :384]),
    "kv_cache must have dtype uint8, got bfloat16": lambda i: setattr(i, "kv_cache", i.kv_cache.bfloat16()),
}


@pytest.mark.parametrize("message", BAD_DS_MLA)
def test_bad_ds_mla_is_refused(message: str) -> None:
    inputs = make_inputs(V3_RANK.but(kv_cache_dtype="fp8_ds_mla"))
    BAD_DS_MLA[message](inputs)
    before = inputs.query.clone()
    with pytest.raises(RuntimeError, match=message):
        kernel.op()(*inputs.args())
    assert torch.equal(inputs.query, before)


def test_ds_mla_with_float32_is_refused() -> None:
    inputs = make_inputs(V3_RANK.but(kv_cache_dtype="fp8_ds_mla", dtype=torch.float32))
    with pytest.raises(
        RuntimeError, match=r"q_pe .for an fp8_ds_mla cache. must have dtype bfloat16 or float16, got float32"
    ):
        kernel.op()(*inputs.args())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str, norm: bool) -> None:
    inputs = make_inputs(V2_LITE.but(num_tokens=4, norm=norm), device)
    torch.library.opcheck(kernel.norm_op() if norm else kernel.op(), inputs.args())
