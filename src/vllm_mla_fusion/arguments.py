# SPDX-License-Identifier: Apache-2.0
"""What the ops are called with, said once: names, types and order of all arguments, and which op has which.

`Arguments` has every argument of any op in the order in which each op takes those of its parts. The schemas of the
kernel's ops and of the layer ops, their fakes and their outputs are made from it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


class Part(enum.Enum):
    """What an op does, and so which arguments it has."""

    ROTATION = enum.auto()
    QUERY = enum.auto()
    QUERY_NORM = enum.auto()
    KEY = enum.auto()
    LATENT_NORM = enum.auto()


class Role(enum.Enum):
    """What becomes of an argument, if it is not only read, and where a layer op has it from."""

    MUTATED = enum.auto()
    # Of the layer's cache in vLLM's forward context: no argument of a layer op.
    CONTEXT = enum.auto()
    # Says how an output is to be made: no argument of a call that is given its outputs.
    FOR_OUTPUT = enum.auto()
    # Fresh memory, every element of which is written: the result of a layer op.
    OUTPUT = enum.auto()


class Arguments(Protocol):
    """All arguments of the kernel's ops, each with the part of the work that it belongs to.

    - `positions` `[num_tokens]`, int64 or int32, contiguous; rows of `cos_sin_cache`.
    - `q_pe` `[num_tokens, num_heads, rot_dim]`, bfloat16, float16 or float32 (the activation dtype); any token and head
      stride, last dimension contiguous. **Rotated in place.**
    - `q_c` `[num_tokens, q_lora_rank]`, activation dtype, any token stride: the query's latent, where it lies in the
      qkv_a output. Not mutated. `q_c_weight` `[q_lora_rank]`, activation dtype, and `q_epsilon`: its RMSNorm.
    - `k_pe` `[num_tokens, rot_dim]` or `[num_tokens, 1, rot_dim]`, activation dtype, any token stride. Not mutated.
    - `kv_c` `[num_tokens, kv_lora_rank]`, activation dtype, any token stride. Not mutated.
    - `kv_c_weight` `[kv_lora_rank]`, activation dtype, and `epsilon`: the RMSNorm of `kv_c`.
    - `cos_sin_cache` `[max_position, rot_dim]`, float32 or activation dtype: cosines in the first half of a row, sines
      in the second (vLLM's layout).
    - `is_neox`: pairs are `(i, i + rot_dim / 2)` if true (GPT-NeoX), else `(2i, 2i + 1)` (GPT-J).
    - `slot_mapping` `[num_slots]`, int64: the cache row of each token, `block * block_size + row in the block`. A
      negative entry, or no entry, writes no cache row; `q_pe` and `k_pe_out` are rotated for all tokens all the same.
      Entries behind the first `num_tokens` are not read.
    - `kv_cache` `[num_blocks, block_size, kv_lora_rank + rot_dim]` (fp8_ds_mla: `[num_blocks, block_size, 656]`), any
      block and row stride. **Rows of the slots are written**, no other byte. An empty cache is not written.
    - `kv_cache_dtype`: `auto`, `bfloat16`, `float16` (cache in the activation dtype), `fp8`, `fp8_e4m3`, `fp8_e5m2`
      (cache in uint8, OCP formats; the values divided by `kv_cache_scale`, saturated), `fp8_e4m3fnuz`, `fp8_e5m2fnuz`
      (the same in the formats of AMD's gfx94x; on the CPU and on ROCm), `fp8_ds_mla` (uint8 rows of FlashMLA's sparse
      attention, for `kv_lora_rank` 512, `rot_dim` 64 and 16-bit activations: 512 values in e4m3, four float32 scales,
      64 rope values as they are; the scale of 128 values is their largest magnitude over 448, at least the smallest
      normal float32).
    - `kv_cache_scale`: one float32 on the device, no subnormal; read by the fp8 kinds only, not by `fp8_ds_mla`.
    - `q_quant`: in which form `q_b` gets the query's latent. `none`: activation dtype. In float8_e4m3fn, by the rules
      of the vLLM ops: `group`, a scale for each 128 values (`_C.rms_norm_per_block_quant`; `q_lora_rank` a multiple of
      128); `group_ue8m0`, the same with scales rounded up to powers of two (`_C.per_token_group_fp8_quant` with
      `scale_ue8m0`); `token`, a scale for each row (`_C.rms_norm_dynamic_per_token_quant` without `scale_ub`);
      `static`, one given scale (`_C.rms_norm_static_fp8_quant`). A scale is `max(largest magnitude, q_smallest) / 448`;
      values are divided by it, with `static` multiplied by its reciprocal, rounded to nearest even and saturated.
    - `q_rounds_twice`: whether the normalised value is rounded to the activation dtype before the weight too, as
      vLLM's fused norms with groups and with a scale for each row do, or once, as `_C.rms_norm`,
      `_C.rms_norm_static_fp8_quant` and vLLM's compiled graphs do.
    - `q_smallest`: as what a group's or row's largest magnitude counts at least: `1 / 512` in the fused ops and in
      `_C.dynamic_per_token_scaled_fp8_quant`, the `eps` of `_C.per_token_group_fp8_quant`; at least `2 ** -80`, below
      which quotients would not be exact. Not read with `none`, `static`.
    - `q_static_scale`: one float32 on the device with `static`, else None.
    - `q_scales_layout`, where the op makes its outputs: how `q_scales_out` lies in memory, one of `SCALE_LAYOUTS`.
    - `q_c_out` `[num_tokens, q_lora_rank]`, contiguous, activation dtype or float8_e4m3fn. **Every row is written.**
    - `q_scales_out`: float32 `[num_tokens, q_lora_rank / 128]` with `group` and `group_ue8m0`, `[num_tokens, 1]` with
      `token`, of any strides, **all written**, padding is not; else None, where an op that makes its outputs returns an
      empty tensor.
    - `k_pe_out` `[num_tokens, 1, rot_dim]`, activation dtype, contiguous. **Every row is written.**
    - `kv_c_normed_out` `[num_tokens, kv_lora_rank]`, activation dtype, contiguous. **Every row is written.**
    """

    positions: Annotated[Tensor, Part.ROTATION]
    q_pe: Annotated[Tensor, Part.QUERY, Role.MUTATED]
    q_c: Annotated[Tensor, Part.QUERY_NORM]
    q_c_weight: Annotated[Tensor, Part.QUERY_NORM]
    q_epsilon: Annotated[float, Part.QUERY_NORM]
    k_pe: Annotated[Tensor, Part.KEY]
    kv_c: Annotated[Tensor, Part.KEY]
    kv_c_weight: Annotated[Tensor, Part.LATENT_NORM]
    epsilon: Annotated[float, Part.LATENT_NORM]
    cos_sin_cache: Annotated[Tensor, Part.ROTATION]
    is_neox: Annotated[bool, Part.ROTATION]
    # The cache's four stand together: `Op.before_cache` relies on it.
    slot_mapping: Annotated[Tensor, Part.KEY, Role.CONTEXT]
    kv_cache: Annotated[Tensor, Part.KEY, Role.CONTEXT, Role.MUTATED]
    kv_cache_dtype: Annotated[str, Part.KEY]
    kv_cache_scale: Annotated[Tensor, Part.KEY]
    q_quant: Annotated[str, Part.QUERY_NORM]
    q_rounds_twice: Annotated[bool, Part.QUERY_NORM]
    q_smallest: Annotated[float, Part.QUERY_NORM]
    q_static_scale: Annotated[Tensor | None, Part.QUERY_NORM]
    q_scales_layout: Annotated[str, Part.QUERY_NORM, Role.FOR_OUTPUT]
    q_c_out: Annotated[Tensor, Part.QUERY_NORM, Role.OUTPUT, Role.MUTATED]
    q_scales_out: Annotated[Tensor | None, Part.QUERY_NORM, Role.OUTPUT, Role.MUTATED]
    k_pe_out: Annotated[Tensor, Part.KEY, Role.OUTPUT, Role.MUTATED]
    kv_c_normed_out: Annotated[Tensor, Part.LATENT_NORM, Role.OUTPUT, Role.MUTATED]


# The scales of a token side by side; those of a group; the same with columns of a multiple of four, as TMA wants them.
SCALE_LAYOUTS = ("rows", "columns", "columns of 4")
_GROUP = 128


def _new_key(k_pe: Tensor) -> Tensor:
    key = torch.empty_like(k_pe, memory_format=torch.contiguous_format)
    return key if key.dim() == 3 else key.unsqueeze(1)


def _new_latent(kv_c: Tensor) -> Tensor:
    return torch.empty_like(kv_c, memory_format=torch.contiguous_format)


def _new_query_latent(q_c: Tensor, q_quant: str) -> Tensor:
    dtype = q_c.dtype if q_quant == "none" else torch.float8_e4m3fn
    return torch.empty_like(q_c, dtype=dtype, memory_format=torch.contiguous_format)


def _new_query_scales(q_c: Tensor, q_quant: str, layout: str = "rows") -> Tensor:
    if q_quant in ("none", "static"):
        return torch.empty(0, dtype=torch.float32, device=q_c.device)
    num_tokens, rank = q_c.shape
    columns = 1 if q_quant == "token" else rank // _GROUP
    strides = scale_strides(layout, num_tokens, columns)
    return torch.empty_strided((num_tokens, columns), strides, dtype=torch.float32, device=q_c.device)


def scale_strides(layout: str, num_tokens: Any, columns: int) -> tuple[Any, Any]:
    """Strides of scales `[num_tokens, columns]` in one of `SCALE_LAYOUTS`; the number of tokens may be a symbol."""
    if layout == "rows":
        return columns, 1
    return 1, num_tokens if layout == "columns" else (num_tokens + 3) // 4 * 4


# How each output is made, and of which arguments; fakes give fakes.
_NEW: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "q_c_out": (_new_query_latent, ("q_c", "q_quant")),
    "q_scales_out": (_new_query_scales, ("q_c", "q_quant", "q_scales_layout")),
    "k_pe_out": (_new_key, ("k_pe",)),
    "kv_c_normed_out": (_new_latent, ("kv_c",)),
}
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class Argument:
    """One of `Arguments`; `type`: as in a schema."""

    name: str
    type: str
    part: Part
    roles: frozenset[Role]


@functools.cache
def _all_arguments() -> tuple[Argument, ...]:
    found = []
    for name, hint in get_type_hints(Arguments, include_extras=True).items():
        assert get_origin(hint) is Annotated, name
        type_, part, *roles = get_args(hint)
        found.append(Argument(name, _SCHEMA_TYPES[type_], part, frozenset(roles)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Op:
    """One op in two forms. `name`: the kernel's, which is given all tensors; its overload `fresh` makes the outputs and
    returns them. `layer_name`: the one in vLLM's graphs, which finds the layer's cache by its name and returns the
    outputs."""

    name: str
    layer_name: str
    parts: frozenset[Part]

    @functools.cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """Those of the kernel's op, in order."""
        return tuple(each for each in self._all if Role.FOR_OUTPUT not in each.roles)

    @functools.cached_property
    def fresh_arguments(self) -> tuple[Argument, ...]:
        """Those of the kernel's op that makes its outputs, in order."""
        return tuple(each for each in self._all if Role.OUTPUT not in each.roles)

    @functools.cached_property
    def layer_arguments(self) -> tuple[Argument, ...]:
        """Those of the layer op, in order, without the layer's name, which is the last."""
        return tuple(each for each in self._all if each.roles.isdisjoint({Role.CONTEXT, Role.OUTPUT}))

    @functools.cached_property
    def _all(self) -> tuple[Argument, ...]:
        return tuple(each for each in _all_arguments() if each.part in self.parts)

    @functools.cached_property
    def outputs(self) -> tuple[Argument, ...]:
        return tuple(each for each in self.arguments if Role.OUTPUT in each.roles)

    @functools.cached_property
    def before_cache(self) -> int:
        """How many arguments both forms have in common before those of the cache."""
        in_cache = (index for index, each in enumerate(self.arguments) if Role.CONTEXT in each.roles)
        return next(in_cache, len(self.arguments))

    def schema(self) -> str:
        """Of the kernel's op, with its name."""
        return f"{self.name}({_declared(self.arguments)}) -> ()"

    def fresh_schema(self) -> str:
        """Of the kernel's op that makes its outputs, with its name."""
        return f"{self.name}.fresh({_declared(self.fresh_arguments)}) -> {self._returns()}"

    def in_place_schema(self) -> str:
        """Of the kernel's op as an op of graphs."""
        return self.schema().replace(self.name, ROPE_QUERY_IN_PLACE, 1)

    def layer_schema(self, layer_name_type: str) -> str:
        """Of the layer op, with its name."""
        return (
            f"{self.layer_name}({_declared(self.layer_arguments)}, {layer_name_type} layer_name) -> {self._returns()}"
        )

    def _returns(self) -> str:
        """Every output is a tensor: what there is none of is an empty one."""
        tensors = ", ".join(["Tensor"] * len(self.outputs))
        return tensors if len(self.outputs) == 1 else f"({tensors})"

    def fake(self, *values: Any) -> None:
        """Of the kernel's op: what a traced graph may not get wrong.

        Raises:
            RuntimeError: q_pe or an output has another shape or dtype.
        """
        self._check_query(self.arguments, values)
        given = values[len(self.arguments) - len(self.outputs) :]
        for argument, output, expected in zip(self.outputs, given, self._new(self.arguments, values), strict=True):
            if output is not None:
                _check_output(argument.name, output, expected)

    def fresh_fake(self, *values: Any) -> Any:
        """Of the kernel's op that makes its outputs: these, to be filled. Raises as `fake`."""
        return self._results(self.fresh_arguments, values)

    def layer_fake(self, *values: Any) -> Any:
        """Of the layer op: its results, to be filled. Raises as `fake`."""
        return self._results(self.layer_arguments, values)

    def _results(self, arguments: tuple[Argument, ...], values: tuple[Any, ...]) -> Any:
        self._check_query(arguments, values)
        outputs = self._new(arguments, values)
        return outputs[0] if len(outputs) == 1 else outputs or None

    def _check_query(self, arguments: tuple[Argument, ...], values: tuple[Any, ...]) -> None:
        if Part.QUERY in self.parts:
            shape = tuple(values[[each.name for each in arguments].index("q_pe")].shape)
            torch._check(len(shape) == 3, lambda: f"q_pe must be [num_tokens, num_heads, rot_dim], got {shape}")

    def _new(self, arguments: tuple[Argument, ...], values: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The outputs of a call of the op: fresh, contiguous but for scales, undefined."""
        given = dict(zip((each.name for each in arguments), values, strict=False))
        made = (_NEW[each.name] for each in self.outputs)
        return tuple(new(*[given[source] for source in sources if source in given]) for new, sources in made)


def _check_output(name: str, given: Tensor, expected: Tensor) -> None:
    shape = tuple(expected.shape)
    torch._check(given.shape == expected.shape, lambda: f"{name} must be {shape}, got {tuple(given.shape)}")
    torch._check(given.dtype == expected.dtype, lambda: f"{name} must have dtype {expected.dtype}, got {given.dtype}")


def _declared(arguments: tuple[Argument, ...]) -> str:
    """The arguments as a schema has them; each mutated one is aliased by itself only."""
    aliases = iter("abcdefgh")

    def type_of(argument: Argument) -> str:
        if Role.MUTATED not in argument.roles:
            return argument.type
        return argument.type.replace("Tensor", f"Tensor({next(aliases)}!)")

    return ", ".join(f"{type_of(each)} {each.name}" for each in arguments)


_ROPE_AND_CACHE = frozenset({Part.ROTATION, Part.QUERY, Part.KEY})

PLAIN = Op("concat_and_cache_mla_rope_fused", "fused_concat_and_cache_mla_rope", _ROPE_AND_CACHE)
NORM = Op(
    "norm_concat_and_cache_mla_rope_fused",
    "fused_norm_concat_and_cache_mla_rope",
    _ROPE_AND_CACHE | {Part.LATENT_NORM},
)
# Around the GEMM `q_b` of models with q-LoRA.
NORMS = Op(
    "norms_rope_concat_and_cache_mla",
    "fused_norms_rope_concat_and_cache_mla",
    frozenset({Part.ROTATION, Part.QUERY_NORM, Part.KEY, Part.LATENT_NORM}),
)
ROPE_QUERY = Op("rope_query", "fused_rope_query", frozenset({Part.ROTATION, Part.QUERY}))
# The same kernel as an op of graphs that needs no Python, hence no layer: where the query is certain to lie as traced.
ROPE_QUERY_IN_PLACE = "fused_rope_query_in_place"
OPS = (PLAIN, NORM, NORMS, ROPE_QUERY)
