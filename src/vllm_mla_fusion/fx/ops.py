# SPDX-License-Identifier: Apache-2.0
"""The ops of a graph, by what the fusion may do with them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

aten = torch.ops.aten

SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
VIEWS = SPLITS | {
    aten.alias.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    operator.getitem,
}
PRECISION_CHANGES = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
ARITHMETIC = PRECISION_CHANGES | {
    aten._unsafe_view.default,
    aten.add.Scalar,
    aten.add.Tensor,
    aten.cat.default,
    aten.clone.default,
    aten.copy.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.rsqrt.default,
    aten.slice_scatter.default,
    aten.stack.default,
    aten.sub.Tensor,
}
# What neither computes nor rounds.
MOVES = VIEWS | {
    aten._unsafe_view.default,
    aten.cat.default,
    aten.clone.default,
    aten.slice_scatter.default,
    aten.stack.default,
}
# What a probe evaluates; everything else is one of its random inputs.
EVALUABLE = VIEWS | ARITHMETIC
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class RotaryOp:
    """A custom op that rotates `query` and `key` in place, by the names of its arguments."""

    target: Any
    is_neox: str = "is_neox"


@dataclass(frozen=True)
class Quantiser:
    """A custom op that quantises its `input` to float8_e4m3fn, after its RMSNorm (`weight`, `epsilon`) if `has_norm`.

    `quant`: its form, as `group` with a scale for each 128 values; `result` and `scale`: the names of the arguments
    that it writes; of a `static` scale, reads. `rounds_twice`, `smallest`: its rounding, see `QueryNorm`.
    """

    target: Any
    quant: str
    has_norm: bool
    rounds_twice: bool = False
    smallest: float = 0.0
    result: str = "result"
    scale: str = "scale"


def everywhere(is_neox: bool, dtype: torch.dtype, q_lora_rank: int) -> bool:
    """`FusionOps.takes_norms` without a condition."""
    return True


@dataclass(frozen=True)
class FusionOps:
    """The ops that the pass looks for and those that it puts in.

    `rms_norm` is called as (x, weight, epsilon, ...); `rms_norm_out` has arguments `input`, `weight`, `epsilon` and
    writes its first. `fused_norm` is None where the latent's norm is to stay where it is. `norms` and `rope_query` take
    the place of the one op where the query's norm may join too, which `takes_norms` decides by the rotation's pairing,
    the activation dtype and the size of the query's latent; `rope_query_in_place`, without a layer's name, that of
    `rope_query` where the query is rotated where it lies. `scale_layouts`: names of layouts of scales, and functions
    from (number of tokens, columns) to strides.
    """

    update: Any
    fused: Any
    rotary: tuple[RotaryOp, ...] = ()
    fused_norm: Any = None
    rms_norm: Any = None
    rms_norm_out: Any = None
    norm_beside_others: bool = False
    norms: Any = None
    rope_query: Any = None
    rope_query_in_place: Any = None
    quantisers: tuple[Quantiser, ...] = ()
    scale_layouts: tuple[tuple[str, Callable[[Any, int], tuple[Any, Any]]], ...] = ()
    takes_norms: Callable[[bool, torch.dtype, int], bool] = everywhere


def is_functional(node: fx.Node, *targets: Any) -> bool:
    """Whether the node is the functional form of one of these mutating ops."""
    return node.target is auto_functionalized and node.args[0] in targets


def rotary_op(node: fx.Node, ops: FusionOps) -> RotaryOp | None:
    """Which of the known rotary ops the node calls; None for every other node."""
    return next((op for op in ops.rotary if is_functional(node, op.target)), None)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A custom op's arguments in the order of its schema, however they were passed."""
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {name: given[name] for name in names if name in given}


def in_order(target: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of a custom op by position: Inductor writes calls as it finds them, which reads names slowly."""
    return tuple(given[argument.name] for argument in target._schema.arguments)


def result_of(node: fx.Node, index: int) -> fx.Node | None:
    """The node that picks result number `index`."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


def mutated_arguments(op: Any) -> tuple[int, list[str]]:
    """The arguments that an op mutates; its functional form returns them from this result on."""
    schema = op._schema
    names = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    # Without a return value the functional form returns None in its place.
    return max(1, len(schema.returns)), names


def mutated_result(node: fx.Node, name: str) -> fx.Node | None:
    """The node that picks what a functional form makes of the argument that its op mutates."""
    first, names = mutated_arguments(node.args[0])
    return result_of(node, first + names.index(name))
