# SPDX-License-Identifier: Apache-2.0
"""Ops that are replayed without knowing what they compute: always the same function of every element that they read.

Two graphs that call them on the same values get the same results; a value that is not the same shows in what follows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from .tracing import NUM_TOKENS

WEIGHTS = 4096

# Of torch's own, those that look at the bits of, or multiply, what is float32 here.
OF_TORCH = {
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten.view.dtype,
}


def replayed(dtype: torch.dtype | None) -> torch.dtype | None:
    """In what a tensor of `dtype` is kept in a replay."""
    return torch.float32 if dtype is not None and dtype.is_floating_point else dtype


def call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node) -> Any:
    """Fills what the op writes and makes what it returns, in the shapes that `node` has in the graph."""
    read = [_sample(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for number, written in enumerate(_written(op, args, kwargs)):
        written.copy_(_mixed(read, list(written.shape), number))
    if not op._schema.returns:
        return None
    counter = iter(range(100, 200))
    return tree_map(lambda value: _like(value, read, next(counter)), node.meta["val"])


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    for index, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _like(value: Any, read: list[torch.Tensor], number: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return _mixed(read, [size if isinstance(size, int) else _size(size) for size in value.shape], number)


def _size(size: torch.SymInt) -> int:
    """The symbols are the number of tokens."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, NUM_TOKENS)))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """All that a token has, as it is before the call; of weights, which nothing changes, some."""
    if tensor.shape[:1] == (NUM_TOKENS,):
        return tensor.float().reshape(NUM_TOKENS, -1).clone()
    return tensor.reshape(1, -1)[:, :WEIGHTS].float().clone()


def _mixed(read: list[torch.Tensor], shape: list[int], number: int) -> torch.Tensor:
    """Rows of tokens depend on the same rows of what is read, and on all of what has none."""
    rows = shape[0] if shape and shape[0] == NUM_TOKENS else 1
    columns = torch.Size(shape).numel() // rows
    result = torch.zeros(rows, columns, dtype=torch.float32)
    for index, sample in enumerate(read):
        values = sample.reshape(1, -1) if rows == 1 else sample
        if values.shape[1] == 0:
            continue
        phase = 1.0 + number + 7.0 * index
        weights = _wave(values.shape[1], 0.7, phase)
        total = values @ weights / values.shape[1] ** 0.5
        result += total.view(-1, 1) * _wave(columns, 0.37, phase)
    return (result / max(len(read), 1) ** 0.5).view(shape)


def _wave(length: int, frequency: float, phase: float) -> torch.Tensor:
    return torch.cos(torch.arange(length, dtype=torch.float32) * frequency + phase)
