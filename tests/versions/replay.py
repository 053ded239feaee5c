# SPDX-License-Identifier: Apache-2.0
"""Runs a graph on the CPU, with plain torch code for vLLM's and the plugin's ops, to see that a pass kept its meaning.

Everything is float32, so that two graphs that differ in rounding only give the same numbers.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from vllm_mla_fusion import kernel

from . import uninterpreted
from .configurations import COMPILE_SIZES
from .stock_model import HF_CONFIG
from .tracing import NUM_TOKENS

V_HEAD_DIM = HF_CONFIG["v_head_dim"]
EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default}
POOL = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
# A graph's float inputs with more are weights, which both replays read where they lie.
LARGEST_ACTIVATION = 1_000_000


def differences(before: fx.Graph, after: fx.Graph) -> Iterator[str]:
    """What the two graphs return or write to the KV cache differently."""
    expected, actual = _Replay(before), _Replay(after)
    inputs = _inputs(before)
    with torch.no_grad():
        outputs = zip(expected.run(*_own(before, inputs)), actual.run(*_own(before, inputs)), strict=True)
    if any(value._version for value in inputs if isinstance(value, torch.Tensor)):
        yield "weights are written"
        _scaled_pools.cache_clear()
    for index, (wanted, found) in enumerate(outputs):
        # An empty output only carries the order of cache write and attention; the pass may put anything there.
        if not _is_empty(wanted) and not _close(wanted, found):
            yield f"output {index} has other values"
    if len(expected.writes) != len(actual.writes):
        yield f"{len(actual.writes)} cache writes, {len(expected.writes)} without the pass"
    for wanted, found in zip(expected.writes, actual.writes, strict=False):
        yield from (f"{name} of a cache write differs" for name in wanted if not _close(wanted[name], found[name]))


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 0


def _close(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, (tuple, list)):
        return len(wanted) == len(found) and all(map(_close, wanted, found))
    if not isinstance(wanted, torch.Tensor):
        return not isinstance(found, torch.Tensor) and wanted == found
    return wanted.shape == found.shape and torch.allclose(wanted, found, rtol=1e-3, atol=1e-3)


class _Replay(fx.Interpreter):
    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule({}, graph))
        self.writes: list[dict[str, Any]] = []

    def run_node(self, node: fx.Node) -> Any:
        self.node = node
        return super().run_node(node)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is auto_functionalized:
            return self._functional(args[0], kwargs)
        if _is_op(target):
            namespace, name = target._schema.name.split("::")
            stand_in = getattr(self, f"_{name}", None)
            if stand_in and namespace == kernel.NAMESPACE:
                names = (argument.name for argument in target._schema.arguments)
                args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
            return stand_in(*args, **kwargs) if stand_in else uninterpreted.call(target, args, kwargs, self.node)
        if target in uninterpreted.OF_TORCH:
            return uninterpreted.call(target, args, kwargs, self.node)
        if target is torch.ops.prims.convert_element_type.default:
            return args[0] if args[0].is_floating_point() or args[1].is_floating_point else args[0].to(args[1])
        if target in EMPTY:
            return torch.zeros(args[0])
        if "device" in kwargs:
            kwargs = kwargs | {"device": "cpu", "dtype": uninterpreted.replayed(kwargs.get("dtype"))}
        return super().call_function(target, args, kwargs)

    def _functional(self, op: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """An in-place op on copies of what it mutates, which become its results."""
        mutated = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        copies = {name: kwargs[name].clone() for name in mutated if kwargs.get(name) is not None}
        result = self.call_function(op, (), kwargs | copies)
        return result, *(copies.get(name) for name in mutated)

    # One method for each op that has no CPU implementation, named as the op and with the names of its arguments.

    def _min_latency_fused_qkv_a_proj(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return input @ weight.T

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight

    def _rotary_embedding(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        head_size: int,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        rope_dim_offset: int = 0,
        inverse: bool = False,
    ) -> None:
        assert rope_dim_offset == 0
        assert not inverse
        for heads in (query, key):
            heads.copy_(_rotated(heads, positions, cos_sin_cache, is_neox))

    _flashinfer_rotary_embedding = _rotary_embedding

    def _rocm_aiter_triton_rotary_embedding(self, *args: Any, offsets: None = None, **kwargs: Any) -> None:
        self._rotary_embedding(*args, **kwargs)

    def _rocm_unquantized_gemm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    def _fused_mla_dual_rms_norm(
        self,
        x1: torch.Tensor,
        x1_weight: torch.Tensor,
        x2: torch.Tensor,
        x2_weight: torch.Tensor,
        x1_epsilon: float,
        x2_epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rms_norm(x1, x1_weight, x1_epsilon), self._rms_norm(x2, x2_weight, x2_epsilon)

    def _unified_mla_kv_cache_update(
        self, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, layer_name: Any, kv_cache_dtype: str, k_scale: torch.Tensor
    ) -> torch.Tensor:
        self._write(kv_c_normed, k_pe, layer_name, kv_cache_dtype, k_scale)
        return torch.empty(0)

    def _fused_concat_and_cache_mla_rope(
        self,
        positions: torch.Tensor,
        q_pe: torch.Tensor,
        k_pe: torch.Tensor,
        kv_c: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        kv_cache_dtype: str,
        kv_cache_scale: torch.Tensor,
        layer_name: Any,
    ) -> torch.Tensor:
        q_pe.copy_(_rotated(q_pe, positions, cos_sin_cache, is_neox))
        k_pe_out = _rotated(k_pe.view(len(k_pe), 1, -1), positions, cos_sin_cache, is_neox)
        self._write(kv_c, k_pe_out, layer_name, kv_cache_dtype, kv_cache_scale)
        return k_pe_out

    def _in_place_fused_concat_and_cache_mla_rope(self, k_pe: torch.Tensor, **kwargs: Any) -> None:
        k_pe.copy_(self._fused_concat_and_cache_mla_rope(k_pe=k_pe, **kwargs).view(k_pe.shape))

    def _fused_norm_concat_and_cache_mla_rope(
        self, kv_c: torch.Tensor, kv_c_weight: torch.Tensor, epsilon: float, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self._rms_norm(kv_c, kv_c_weight, epsilon)
        return self._fused_concat_and_cache_mla_rope(kv_c=normed, **kwargs), normed

    def _fused_norms_rope_concat_and_cache_mla(
        self,
        q_c: torch.Tensor,
        q_c_weight: torch.Tensor,
        q_epsilon: float,
        q_quant: str,
        q_static_scale: torch.Tensor | None,
        q_rounds_twice: bool,
        q_smallest: float,
        q_scales_layout: str,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        query = self._rms_norm(q_c, q_c_weight, q_epsilon)
        scales = torch.empty(0)
        if q_quant == "static":
            self._static_scaled_fp8_quant(query, query, q_static_scale)
        elif q_quant != "none":
            scales = torch.empty(len(query), 1 if q_quant == "token" else query.shape[1] // 128)
            _quantise(query, query, scales)
        no_query = torch.empty(len(query), 0, kwargs["k_pe"].shape[-1])
        key, latent = self._fused_norm_concat_and_cache_mla_rope(q_pe=no_query, **kwargs)
        return query, scales, key, latent

    def _fused_rope_query(
        self, positions: torch.Tensor, q_pe: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool, **_: Any
    ) -> None:
        q_pe.copy_(_rotated(q_pe, positions, cos_sin_cache, is_neox))

    _fused_rope_query_in_place = _fused_rope_query

    # fp8 is not rounded here: a value is divided by its scale.

    def _rms_norm_per_block_quant(
        self,
        result: torch.Tensor,
        input: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        epsilon: float,
        scale_ub: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        **_: Any,
    ) -> None:
        x = input if residual is None else residual.add_(input)
        _quantise(self._rms_norm(x, weight, epsilon), result, scale)

    _rms_norm_dynamic_per_token_quant = _rms_norm_per_block_quant

    def _rms_norm_static_fp8_quant(
        self, result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, epsilon: float
    ) -> None:
        self._static_scaled_fp8_quant(result, self._rms_norm(input, weight, epsilon), scale)

    def _per_token_group_fp8_quant(
        self, input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, *_: Any, **__: Any
    ) -> None:
        _quantise(input, output_q, output_s)

    def _dynamic_per_token_scaled_fp8_quant(
        self, result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None = None
    ) -> None:
        _quantise(input, result, scale)

    def _static_scaled_fp8_quant(
        self, result: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, group_shape: Any = None
    ) -> None:
        result.copy_(input / scale.flatten()[0])

    def _unified_mla_attention_with_output(
        self, q: torch.Tensor, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, output: torch.Tensor, **_: Any
    ) -> None:
        """Not attention, but something that depends on every element that attention reads."""
        mixed = q[..., :V_HEAD_DIM] + q[..., -V_HEAD_DIM:] + k_pe.sum(-1, keepdim=True) + kv_c_normed.sum()
        output.copy_(mixed.reshape(output.shape))

    def _sparse_attn_indexer(self, **_: Any) -> torch.Tensor:
        """Nothing that RoPE or the cache write of the layer itself would read."""
        return torch.empty(0)

    def _write(self, kv_c: torch.Tensor, k_pe: torch.Tensor, layer_name: Any, dtype: str, scale: torch.Tensor) -> None:
        values = {"kv_c": kv_c.clone(), "k_pe": k_pe.clone(), "scale": scale}
        self.writes.append(values | {"layer_name": layer_name, "dtype": dtype})


def _quantise(x: torch.Tensor, result: torch.Tensor, scales: torch.Tensor) -> None:
    """By the largest magnitude of each row's groups, as many as there are scales."""
    groups = x.unflatten(-1, (scales.shape[-1], -1))
    largest = groups.abs().amax(-1).clamp(min=1e-6)
    scales.copy_(largest)
    result.copy_((groups / largest.unsqueeze(-1)).flatten(-2))


def _is_op(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")


def _inputs(graph: fx.Graph) -> list[Any]:
    return [_input(*numbered) for numbered in enumerate(graph.find_nodes(op="placeholder"))]


def _own(before: fx.Graph, inputs: list[Any]) -> list[Any]:
    """With copies of all but large weights: some graphs write to what they are given."""
    placeholders = before.find_nodes(op="placeholder")
    return [
        value.clone() if isinstance(value, torch.Tensor) and not _is_large_weight(value, placeholder) else value
        for value, placeholder in zip(inputs, placeholders, strict=True)
    ]


def _is_large_weight(value: torch.Tensor, placeholder: fx.Node) -> bool:
    return value.numel() > LARGEST_ACTIVATION and placeholder.meta["val"].dtype.is_floating_point


def _input(index: int, placeholder: fx.Node) -> Any:
    """A value for the graph's input of this number."""
    value = placeholder.meta.get("val")
    if isinstance(value, (int, torch.SymInt)):
        return NUM_TOKENS
    if not isinstance(value, torch.Tensor):
        return placeholder.name
    shape = [size if isinstance(size, int) else NUM_TOKENS for size in value.shape]
    if not value.dtype.is_floating_point and shape in ([NUM_TOKENS], *([size] for size in COMPILE_SIZES)):
        return torch.arange(*shape) * 3 + 1
    start, numel = index * 7919 % len(POOL), torch.Size(shape).numel()
    scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0  # keeps products with weights near one
    return _scaled_pools(numel // len(POOL) + 2, scale)[start : start + numel].view(shape)


@functools.cache
def _scaled_pools(count: int, scale: float) -> torch.Tensor:
    return (POOL * scale).repeat(count)


def _rotated(heads: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """RoPE of `heads` [num_tokens, num_heads, rot_dim] as complex numbers."""
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    pairs = heads.unflatten(-1, (2, -1)).transpose(-1, -2) if is_neox else heads.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return (turned.transpose(-1, -2) if is_neox else turned).flatten(-2)
