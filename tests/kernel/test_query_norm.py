# SPDX-License-Identifier: Apache-2.0
"""The two ops around q_b: the norms with key, latent and cache rows before it, RoPE of the query after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import test_kernel
import torch
from reference import (
    NORM_ERROR,
    Case,
    Inputs,
    assert_within_one_rounding,
    expected_cache,
    make_inputs,
    rms,
    rms_norm,
    rotate,
)

from vllm_mla_fusion import kernel

DEVICES = test_kernel.DEVICES
GPU = pytest.mark.gpu
E4M3 = torch.float8_e4m3fn
# As what a largest magnitude counts at least: vLLM's fused ops, and the eps of its per_token_group_fp8_quant.
FUSED, PER_GROUP = 1 / 512, 1e-10

V3 = Case("v3", num_tokens=37, num_heads=1, kv_extra=1536, norm=True, padding=5)


@dataclass(frozen=True)
class Query:
    """A case (its kv_extra is q_lora_rank) and the form in which the query is wanted."""

    case: Case
    quant: str = "group"
    layout: str = "columns"  # of the scales
    rounds_twice: bool = True
    smallest: float = FUSED
    magnitude: float = 1.0

    @property
    def name(self) -> str:
        changes = [f"{name}={getattr(self, name)}" for name in ("layout", "rounds_twice", "smallest", "magnitude")]
        return "-".join([self.case.name, self.quant, *changes])


@dataclass
class Call:
    """The arguments of one call."""

    inputs: Inputs
    query: Query
    q_c: torch.Tensor
    q_c_weight: torch.Tensor
    q_c_out: torch.Tensor
    q_scales_out: torch.Tensor | None = None
    q_static_scale: torch.Tensor | None = None
    q_epsilon: float = 1e-5

    def args(self) -> tuple[Any, ...]:
        i, query = self.inputs, self.query
        norms = (i.positions, self.q_c, self.q_c_weight, self.q_epsilon, i.k_pe, i.kv_c, i.kv_c_weight, i.epsilon)
        cache = (i.cos_sin_cache, i.is_neox, i.slot_mapping, i.kv_cache, i.kv_cache_dtype, i.kv_cache_scale)
        form = (query.quant, query.rounds_twice, query.smallest, self.q_static_scale, self.q_c_out, self.q_scales_out)
        return (*norms, *cache, *form, i.k_pe_out, i.kv_c_normed_out)

    def run(self) -> Call:
        """The outputs of the op in a copy."""
        result = replace(
            self,
            inputs=self.inputs.clone(),
            q_c_out=self.q_c_out.clone(),
            q_scales_out=None if self.q_scales_out is None else empty_scales(self.q_scales_out, self.query.layout),
        )
        kernel.norms_op()(*result.args())
        return result


def empty_scales(like: torch.Tensor, layout: str) -> torch.Tensor:
    """NaN in vLLM's layouts of scales: by rows, by columns, and by columns padded to four tokens."""
    num_tokens, groups = like.shape
    if layout == "rows":
        return torch.full((num_tokens, groups), float("nan"), device=like.device)
    rows = (num_tokens + 3) // 4 * 4 if layout == "padded" else num_tokens
    return torch.full((groups, rows), float("nan"), device=like.device).T[:num_tokens]


def make_call(query: Query, device: str) -> Call:
    case = query.case
    inputs = make_inputs(case, device)
    rank, tokens = case.kv_extra, case.num_tokens
    inputs.qkv_a[:, :rank] *= query.magnitude
    out_dtype = case.dtype if query.quant == "none" else E4M3
    columns = {"group": rank // 128, "group_ue8m0": rank // 128, "token": 1}.get(query.quant)
    weight = torch.randn(rank, generator=torch.Generator().manual_seed(3)).to(case.dtype).to(device) + 1
    return Call(
        inputs,
        query,
        q_c=inputs.qkv_a[:, :rank],
        q_c_weight=weight,
        q_c_out=torch.full((tokens, rank), float("nan"), device=device).to(out_dtype),
        q_scales_out=None if columns is None else torch.empty(tokens, columns, device=device),
        q_static_scale=torch.tensor(0.0371, device=device) if query.quant == "static" else None,
    )


def normed(call: Call) -> torch.Tensor:
    """The normalised query that the op itself gives unquantised, checked against float64."""
    plain = make_call(replace(call.query, quant="none"), call.q_c.device.type).run().q_c_out
    weight = call.q_c_weight.double()
    exact = rms(call.q_c, call.q_epsilon)
    if not call.query.rounds_twice or plain.dtype == torch.float32:
        assert_within_one_rounding(plain, exact * weight, NORM_ERROR)
        return plain
    expected = (exact.to(plain.dtype).double() * weight).to(plain.dtype)
    # A value next to a boundary may fall to the other side at the first rounding, and be a step or two off at the end.
    near = torch.finfo(plain.dtype).eps * 2 * expected.double().abs() + NORM_ERROR
    assert ((plain.double() - expected.double()).abs() <= near).all()
    assert (plain != expected).double().mean() < 0.002
    return plain


def quantised(values: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rule of vLLM's ops, in float32 on the CPU: torch divides by a constant otherwise on a GPU."""
    values = values.float().cpu()
    if call.query.quant == "static":
        factor = 1.0 / call.q_static_scale.cpu()
        return (values * factor).clamp(-448, 448).to(E4M3), None
    groups = values.unflatten(-1, (-1, 128)) if call.query.quant.startswith("group") else values.unsqueeze(1)
    largest = groups.abs().amax(-1).clamp(min=torch.tensor(call.query.smallest, dtype=torch.float32))
    scales = largest / torch.tensor(448.0)
    if call.query.quant == "group_ue8m0":
        scales = scales.clamp(min=1e-10).log2().ceil().exp2()
    return (groups / scales.unsqueeze(-1)).clamp(-448, 448).flatten(1).to(E4M3), scales


FULL = V3.but(num_tokens=600)
FP16 = V3.but(dtype=torch.float16, kv_cache_dtype="fp8")
QUERIES = [
    Query(V3),
    Query(V3, layout="rows"),
    Query(V3, layout="padded"),
    Query(V3, "group_ue8m0", smallest=PER_GROUP),
    Query(V3, smallest=PER_GROUP, rounds_twice=False),
    Query(V3, "none", rounds_twice=False),
    Query(V3, "none"),
    Query(V3, "token"),
    Query(V3, "static"),
    Query(V3.but(num_tokens=1, padding=0)),
    Query(V3.but(kv_cache_dtype="fp8", cos_sin_dtype=torch.float32, positions_dtype=torch.int32)),
    Query(V3.but(kv_cache_dtype="fp8_ds_mla", num_slots=20)),
    Query(V3.but(slot_tail=5)),
    Query(V3.but(num_slots=0), "none"),
    Query(FP16),
    Query(FP16, "token"),
    Query(FP16, "none", rounds_twice=False),
    Query(FULL, layout="padded"),  # fills a GPU: several vectors per lane
    Query(FULL.but(kv_cache_dtype="fp8_ds_mla"), "none", rounds_twice=False),
    Query(FULL.but(kv_cache_dtype="fp8"), "static"),
    Query(FULL, "token"),
    Query(FULL.but(dtype=torch.float16)),
    Query(V3.but(kv_extra=2048)),
    Query(V3.but(kv_extra=768), "token"),
    Query(V3.but(kv_extra=896)),  # the last vector is not every lane's
    Query(V3.but(kv_extra=896), "token"),
    Query(FULL.but(kv_extra=128)),
    Query(V3, magnitude=1e-6),  # from here on: the scales' bounds, saturation
    Query(V3, smallest=PER_GROUP, magnitude=1e-6),
    Query(V3, "group_ue8m0", smallest=PER_GROUP, magnitude=1e-6),
    Query(V3, "token", magnitude=1e-6),
    Query(V3, magnitude=3e4),
    Query(V3.but(is_neox=True)),  # from here on: the general path
    Query(V3.but(kv_extra=2176), layout="rows"),
    Query(V3.but(kv_extra=100, rot_dim=6), "token"),
    Query(V3.but(kv_extra=99), "none"),
    Query(V3.but(kv_extra=99, row_pad=3, kv_cache_dtype="fp8"), "static"),
    Query(V3.but(dtype=torch.float32), "group_ue8m0"),
    Query(V3.but(dtype=torch.float32, kv_extra=77), "none", rounds_twice=False),
    Query(V3.but(is_neox=True, kv_cache_dtype="fp8_ds_mla"), "none"),
]


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    kernel.load()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_before_q_b(query: Query, device: str) -> None:
    call = make_call(query, device)
    result = call.run()
    inputs = call.inputs
    assert torch.equal(result.inputs.qkv_a, inputs.qkv_a)
    assert_within_one_rounding(result.inputs.k_pe_out, rotate(inputs.k_pe, inputs))
    assert_within_one_rounding(result.inputs.kv_c_normed_out, rms_norm(inputs), NORM_ERROR)
    expected = expected_cache(inputs, result.inputs.k_pe_out, result.inputs.kv_c_normed_out)
    assert torch.equal(result.inputs.cache_storage.view(torch.uint8), expected.view(torch.uint8))

    plain = normed(call)
    if query.quant == "none":
        assert torch.equal(result.q_c_out, plain)
        return
    values, scales = quantised(plain, call)
    if scales is not None:
        assert torch.equal(result.q_scales_out.cpu(), scales)
    assert torch.equal(result.q_c_out.cpu().view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", ["none", "group", "token"])
def test_the_batch_changes_no_row(quant: str, device: str) -> None:
    """Another number of tokens shares the work out otherwise; the sums are the same."""
    call = make_call(Query(FULL, quant), device)
    whole = call.run()
    first = slice(0, 9)
    few = replace(
        call,
        q_c=call.q_c[first],
        q_c_out=call.q_c_out[first],
        q_scales_out=None if call.q_scales_out is None else call.q_scales_out[first],
        inputs=replace(
            call.inputs,
            **{name: getattr(call.inputs, name)[first] for name in ("positions", "k_pe", "kv_c", "slot_mapping")},
            k_pe_out=call.inputs.k_pe_out[first],
            kv_c_normed_out=call.inputs.kv_c_normed_out[first],
        ),
    ).run()
    assert torch.equal(few.q_c_out.view(torch.uint8), whole.q_c_out[first].view(torch.uint8))
    assert torch.equal(few.inputs.kv_c_normed_out, whole.inputs.kv_c_normed_out[first])
    if whole.q_scales_out is not None:
        assert torch.equal(few.q_scales_out, whole.q_scales_out[first])


@pytest.mark.parametrize("device", DEVICES)
def test_padding_of_the_scales_is_not_written(device: str) -> None:
    call = make_call(Query(V3), device)
    storage = torch.full((12, 40), 7.0, device=device)
    call.q_scales_out = storage.T[:37]
    kernel.norms_op()(*call.args())
    assert (storage[:, 37:] == 7).all()
    assert (storage[:, :37] != 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    call = make_call(Query(V3.but(num_tokens=0)), device)
    result = call.run()
    assert torch.equal(result.inputs.cache_storage.view(torch.uint8), call.inputs.cache_storage.view(torch.uint8))
    empty = make_inputs(V3.but(num_tokens=0), device)
    kernel.rope_query_op()(empty.positions, empty.q_pe, empty.cos_sin_cache, False)


ROPE_CASES = [case for case in test_kernel.CASES if case.kv_cache_dtype == "auto"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ROPE_CASES, ids=lambda case: case.name)
def test_after_q_b(case: Case, device: str) -> None:
    """The query is what the whole op makes of it, bit for bit, and nothing around it changes."""
    inputs = make_inputs(case, device)
    result = inputs.clone()
    kernel.rope_query_op()(result.positions, result.q_pe, result.cos_sin_cache, result.is_neox)
    assert_within_one_rounding(result.q_pe, rotate(inputs.q_pe, inputs))
    whole = test_kernel.run(inputs)
    assert torch.equal(result.query.view(torch.uint8), whole.query.view(torch.uint8))


def change(**changes: Any) -> Any:
    def apply(call: Call) -> Call:
        return replace(call, **{name: value(call) for name, value in changes.items()})

    return apply


def change_query(**changes: Any) -> Any:
    return lambda call: replace(call, query=replace(call.query, **changes))


BAD = {
    "q_c must have dtype bfloat16 or float16 or float32, got float64": change(q_c=lambda c: c.q_c.double()),
    "q_c must be": change(q_c=lambda c: c.q_c[0]),
    "q_c must have a contiguous last": change(q_c=lambda c: c.q_c.repeat(1, 2)[:, ::2]),
    "q_c must have a multiple of 128 columns": change(
        q_c=lambda c: c.q_c[:, :100],
        q_c_weight=lambda c: c.q_c_weight[:100],
        q_c_out=lambda c: c.q_c_out[:, :100].clone(),
    ),
    "q_c_weight must be": change(q_c_weight=lambda c: c.q_c_weight[1:]),
    "q_c_weight must have dtype bfloat16, got float32": change(q_c_weight=lambda c: c.q_c_weight.float()),
    "q_c_out must be": change(q_c_out=lambda c: c.q_c_out[1:]),
    "q_c_out must be contiguous": change(q_c_out=lambda c: c.q_c_out.T.contiguous().T),
    "q_c_out must have dtype float8_e4m3fn, got bfloat16": change(q_c_out=lambda c: c.q_c_out.bfloat16()),
    "q_quant must be one of": change_query(quant="int8"),
    "q_scales_out must be None with q_quant 'static'": lambda c: change_query(quant="static")(
        replace(c, q_static_scale=torch.ones(1))
    ),
    r"q_scales_out must be .*q_lora_rank / 128\] = \[37, 12\]": change(q_scales_out=lambda c: c.q_scales_out[:, 1:]),
    r"q_scales_out must be \[num_tokens, 1\]": change_query(quant="token"),
    "q_scales_out must be a float32 tensor": change(q_scales_out=lambda c: None),
    "q_scales_out must have dtype float32": change(q_scales_out=lambda c: c.q_scales_out.double()),
    "q_static_scale must be None with q_quant 'group'": change(q_static_scale=lambda c: torch.ones(1)),
    "q_static_scale must be one float32 value": lambda c: change_query(quant="static")(replace(c, q_scales_out=None)),
    "q_static_scale must hold one value, got 2": lambda c: change_query(quant="static")(
        replace(c, q_scales_out=None, q_static_scale=torch.ones(2))
    ),
    "k_pe must be": change(inputs=lambda c: replace(c.inputs, k_pe=c.inputs.k_pe[1:])),
    "kv_c must have dtype bfloat16, got float32": change(
        inputs=lambda c: replace(c.inputs, kv_c=c.inputs.kv_c.float())
    ),
    "k_pe_out must have an even, positive rot_dim": change(
        inputs=lambda c: replace(c.inputs, k_pe_out=c.inputs.k_pe_out[..., 1:].clone())
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_written(message: str) -> None:
    call = BAD[message](make_call(Query(V3), "cpu"))
    before = call.inputs.cache_storage.clone()
    with pytest.raises(RuntimeError, match=message):
        kernel.norms_op()(*call.args())
    assert torch.equal(call.inputs.cache_storage.view(torch.uint8), before.view(torch.uint8))


BAD_ROPE = {
    "q_pe must be": lambda i: setattr(i, "q_pe", i.q_pe[0]),
    "positions must be": lambda i: setattr(i, "positions", i.positions[1:]),
    r"positions\[0\] must be in": lambda i: i.positions.fill_(1 << 20),
    "cos_sin_cache must be": lambda i: setattr(i, "cos_sin_cache", i.cos_sin_cache[:, 2:]),
}


@pytest.mark.parametrize("message", BAD_ROPE)
def test_bad_query_is_refused(message: str) -> None:
    inputs = make_inputs(V3)
    BAD_ROPE[message](inputs)
    before = inputs.query.clone()
    with pytest.raises(RuntimeError, match=message):
        kernel.rope_query_op()(inputs.positions, inputs.q_pe, inputs.cos_sin_cache, False)
    assert torch.equal(inputs.query, before)


@pytest.mark.parametrize("quant", ["none", "group", "static"])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str, quant: str) -> None:
    call = make_call(Query(V3.but(num_tokens=4), quant), device)
    # The check of the schema multiplies what it compares, which torch cannot do with fp8; "none" has it.
    without_schema = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = {} if quant == "none" else {"test_utils": without_schema}
    torch.library.opcheck(kernel.norms_op(), call.args(), **checks)
    inputs = call.inputs
    torch.library.opcheck(kernel.rope_query_op(), (inputs.positions, inputs.q_pe, inputs.cos_sin_cache, False))


@GPU
def test_order_of_kernels_in_a_graph() -> None:
    """Both grids may start early, but wait for what those before them write, and those behind wait for them."""
    call = make_call(Query(V3.but(num_tokens=2000, padding=0, num_heads=16)), "cuda")
    expected = call.run()
    rotated = call.inputs.clone()
    kernel.rope_query_op()(rotated.positions, rotated.q_pe, rotated.cos_sin_cache, False)
    result = replace(call, inputs=call.inputs.clone(), q_c_out=call.q_c_out.clone())
    result.q_c = torch.empty_like(call.q_c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.q_c.copy_(call.q_c)
        kernel.norms_op()(*result.args())
        seen = result.q_c_out.float()
        result.inputs.query.copy_(call.inputs.query)
        kernel.rope_query_op()(result.inputs.positions, result.inputs.q_pe, result.inputs.cos_sin_cache, False)
        doubled = result.inputs.query * 2
    for _ in range(100):
        result.q_c.zero_()
        doubled.zero_()
        graph.replay()
        assert torch.equal(seen, expected.q_c_out.float())
        assert torch.equal(doubled, rotated.query * 2)
    assert torch.equal(result.inputs.cache_storage.view(torch.uint8), expected.inputs.cache_storage.view(torch.uint8))
