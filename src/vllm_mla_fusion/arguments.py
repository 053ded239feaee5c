# SPDX-License-Identifier: Apache-2.0
"""What the ops are called with, said once: names, types and order of all arguments, and which op has which.

`Arguments` has every argument of any op in the order in which each op takes those of its parts. The schemas of the
kernel's ops and of the layer ops, their fakes and their outputs are made from it.
"""

from __future__ import annotations

import enum
import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


class Part(enum.Enum):
    """What an op does, and so which arguments it has."""

    ROTATION = enum.auto()
    QUERY = enum.auto()
    KEY = enum.auto()
    LATENT_NORM = enum.auto()


class Role(enum.Enum):
    """What becomes of an argument, if it is not only read, and where a layer op has it from."""

    MUTATED = enum.auto()
    # Of the layer's cache in vLLM's forward context: no argument of a layer op.
    CONTEXT = enum.auto()
    # Fresh memory, every element of which is written: the result of a layer op.
    OUTPUT = enum.auto()


class Arguments(Protocol):
    """All arguments of the kernel's ops, each with the part of the work that it belongs to.

    - `positions` `[num_tokens]`, int64 or int32, contiguous; rows of `cos_sin_cache`.
    - `q_pe` `[num_tokens, num_heads, rot_dim]`, bfloat16, float16 or float32 (the activation dtype); any token and head
      stride, last dimension contiguous. **Rotated in place.**
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
    - `k_pe_out` `[num_tokens, 1, rot_dim]`, activation dtype, contiguous. **Every row is written.**
    - `kv_c_normed_out` `[num_tokens, kv_lora_rank]`, activation dtype, contiguous. **Every row is written.**
    """

    positions: Annotated[Tensor, Part.ROTATION]
    q_pe: Annotated[Tensor, Part.QUERY, Role.MUTATED]
    k_pe: Annotated[Tensor, Part.KEY]
    kv_c: Annotated[Tensor, Part.KEY]
    kv_c_weight: Annotated[Tensor, Part.LATENT_NORM]
    epsilon: Annotated[float, Part.LATENT_NORM]
    cos_sin_cache: Annotated[Tensor, Part.ROTATION]
    is_neox: Annotated[bool, Part.ROTATION]
    # The cache's four stand together, last before the outputs: `Op.before_cache` relies on it.
    slot_mapping: Annotated[Tensor, Part.KEY, Role.CONTEXT]
    kv_cache: Annotated[Tensor, Part.KEY, Role.CONTEXT, Role.MUTATED]
    kv_cache_dtype: Annotated[str, Part.KEY]
    kv_cache_scale: Annotated[Tensor, Part.KEY]
    k_pe_out: Annotated[Tensor, Part.KEY, Role.OUTPUT, Role.MUTATED]
    kv_c_normed_out: Annotated[Tensor, Part.LATENT_NORM, Role.OUTPUT, Role.MUTATED]


def _new_key(k_pe: Tensor) -> Tensor:
    key = torch.empty_like(k_pe, memory_format=torch.contiguous_format)
    return key if key.dim() == 3 else key.unsqueeze(1)


def _new_latent(kv_c: Tensor) -> Tensor:
    return torch.empty_like(kv_c, memory_format=torch.contiguous_format)


# The memory of each output: of which argument it is made, and how; fakes give fakes.
_NEW: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "k_pe_out": ("k_pe", _new_key),
    "kv_c_normed_out": ("kv_c", _new_latent),
}
_SCHEMA_TYPES = {Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


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
    """One op in two forms: `name` is the kernel's, which is given all tensors; `layer_name` the one in vLLM's graphs,
    which finds the layer's cache by its name and returns what the kernel's has as outputs."""

    name: str
    layer_name: str
    parts: frozenset[Part]

    @functools.cached_property
    def arguments(self) -> tuple[Argument, ...]:
        """Those of the kernel's op, in order."""
        return tuple(each for each in _all_arguments() if each.part in self.parts)

    @functools.cached_property
    def layer_arguments(self) -> tuple[Argument, ...]:
        """Those of the layer op, in order, without the layer's name, which is the last."""
        return tuple(each for each in self.arguments if each.roles.isdisjoint({Role.CONTEXT, Role.OUTPUT}))

    @functools.cached_property
    def outputs(self) -> tuple[Argument, ...]:
        return tuple(each for each in self.arguments if Role.OUTPUT in each.roles)

    @functools.cached_property
    def before_cache(self) -> int:
        """How many arguments both forms have in common before those of the cache."""
        return next(index for index, each in enumerate(self.arguments) if Role.CONTEXT in each.roles)

    def schema(self) -> str:
        """Of the kernel's op, with its name."""
        return f"{self.name}({_declared(self.arguments)}) -> ()"

    def layer_schema(self, layer_name_type: str) -> str:
        """Of the layer op, with its name."""
        returns = ", ".join(each.type for each in self.outputs)
        returns = f"({returns})" if len(self.outputs) > 1 else returns
        return f"{self.layer_name}({_declared(self.layer_arguments)}, {layer_name_type} layer_name) -> {returns}"

    def bind(self, *values: Any) -> Arguments:
        """The values of the kernel's op by name."""
        return cast(Arguments, self._bound(*values))

    def bind_layer(self, *values: Any) -> Arguments:
        """The values of the layer op by name, but for the layer's."""
        return cast(Arguments, self._layer_bound(*values))

    def new_outputs(self, values: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Memory for the outputs, fresh, contiguous, undefined; `values`: of either form."""
        return tuple([new(values[index]) for index, new in self._new])

    def fake(self, *values: Any) -> None:
        """Of the kernel's op: what a traced graph may not get wrong.

        Raises:
            RuntimeError: q_pe or an output has another shape or dtype.
        """
        given = self.bind(*values)
        self._check_query(given)
        for argument, expected in zip(self.outputs, self.new_outputs(values), strict=True):
            _check_output(argument.name, getattr(given, argument.name), expected)

    def layer_fake(self, *values: Any) -> Any:
        """Of the layer op: its results, to be filled. Raises as `fake`."""
        self._check_query(self.bind_layer(*values[:-1]))
        outputs = self.new_outputs(values)
        return outputs if len(outputs) > 1 else outputs[0]

    def _check_query(self, given: Arguments) -> None:
        if Part.QUERY in self.parts:
            shape = tuple(given.q_pe.shape)
            torch._check(len(shape) == 3, lambda: f"q_pe must be [num_tokens, num_heads, rot_dim], got {shape}")

    @functools.cached_property
    def _new(self) -> list[tuple[int, Callable[[Tensor], Tensor]]]:
        # Both forms have the same arguments before those of the cache, and outputs are made of these.
        names = [each.name for each in self.arguments[: self.before_cache]]
        made_of = [_NEW[each.name] for each in self.outputs]
        return [(names.index(source), new) for source, new in made_of]

    @functools.cached_property
    def _bound(self) -> Callable[..., Any]:
        return _named_values(self.name, self.arguments)

    @functools.cached_property
    def _layer_bound(self) -> Callable[..., Any]:
        return _named_values(self.layer_name, self.layer_arguments)


def _named_values(name: str, arguments: tuple[Argument, ...]) -> Callable[..., Any]:
    return namedtuple(name, [each.name for each in arguments])


def _check_output(name: str, given: Tensor, expected: Tensor) -> None:
    shape = tuple(expected.shape)
    torch._check(given.shape == expected.shape, lambda: f"{name} must be {shape}, got {tuple(given.shape)}")
    torch._check(given.dtype == expected.dtype, lambda: f"{name} must have dtype {expected.dtype}, got {given.dtype}")


def _declared(arguments: tuple[Argument, ...]) -> str:
    """The arguments as a schema has them; each mutated one is aliased by itself only."""
    aliases = iter("abcdefgh")
    return ", ".join(
        f"{each.type}{f'({next(aliases)}!)' if Role.MUTATED in each.roles else ''} {each.name}" for each in arguments
    )


_ROPE_AND_CACHE = frozenset({Part.ROTATION, Part.QUERY, Part.KEY})

PLAIN = Op("concat_and_cache_mla_rope_fused", "fused_concat_and_cache_mla_rope", _ROPE_AND_CACHE)
NORM = Op(
    "norm_concat_and_cache_mla_rope_fused",
    "fused_norm_concat_and_cache_mla_rope",
    _ROPE_AND_CACHE | {Part.LATENT_NORM},
)
OPS = (PLAIN, NORM)
