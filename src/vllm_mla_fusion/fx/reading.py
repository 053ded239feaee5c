# SPDX-License-Identifier: Apache-2.0
"""Reading a graph: what values nodes have and how they depend on each other. Changes nothing but missing metadata."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.utils._sympy.functions import FloorDiv

from vllm_mla_fusion.fx.ops import EVALUABLE, FusionOps, aten, rotary_op

# Stands for the number of tokens where it is a symbol.
PROBE_TOKENS = 5


class NoMatchError(Exception):
    """Carries the reason why a site is left alone."""


def fake(node: Any) -> torch.Tensor:
    """The FakeTensor that stands for the node's value.

    Raises:
        NoMatchError: it has none.
    """
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        raise NoMatchError(f"{node} has no tensor value in the graph's metadata")
    return value


def shape(node: fx.Node) -> tuple[int, ...]:
    """The node's shape with a small number in the place of the number of tokens, so that comparing sets no guard."""
    value = node.meta.get("val")
    return tuple(probe_size(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def numel(node: fx.Node) -> int:
    """The number of elements of `shape`."""
    return torch.Size(shape(node)).numel()


def probe_size(size: int | torch.SymInt) -> int:
    """The size with PROBE_TOKENS in the place of its symbols."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    for part in expression.atoms(FloorDiv):
        tokens, ranks = part.args
        if tokens.is_Symbol:
            # Gathered from all ranks they are all tokens: vLLM divides them only where nothing remains.
            expression = expression.subs(ranks * part, tokens)
    return int(expression.subs(dict.fromkeys(expression.free_symbols, PROBE_TOKENS)))


def symbolic(sizes: Any) -> tuple[Any, ...]:
    """The sizes as expressions, which compare without setting a guard."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in sizes)


def complete_metadata(graph: fx.Graph) -> None:
    """Gives nodes without a value the one that follows from their arguments; passes need not leave any.

    The graph must be sorted. What cannot be told stays as it is.
    """
    values = [node.meta["val"] for node in graph.nodes if "val" in node.meta]
    mode = detect_fake_mode([value for value in values if isinstance(value, torch.Tensor)])
    for node in graph.nodes:
        if node.op != "call_function" or node.meta.get("val") is not None or mode is None:
            continue
        if any(source.meta.get("val") is None for source in node.all_input_nodes):
            continue
        try:
            node.meta["val"] = fake_result(node, mode)
        except Exception:
            continue


def fake_result(node: fx.Node, mode: Any) -> Any:
    """What the node computes from its arguments' values, in this fake mode."""
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with mode:
        return node.target(*args, **kwargs)


def gather(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(table, rows) if the node picks rows of a table."""
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:
        return node.args[0], node.args[1][0]
    if node.target is aten.index_select.default and node.args[1] == 0:
        return node.args[0], node.args[2]
    return None


def is_evaluable(node: fx.Node, ops: FusionOps) -> bool:
    """Whether a probe computes the node from its inputs."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_evaluable(source, ops)
    return node.op == "call_function" and (node.target in EVALUABLE or rotary_op(node, ops) is not None)


def cone(node: fx.Node, ops: FusionOps) -> list[fx.Node]:
    """The node and what it is computed from, nearest first, up to and including the first nodes not evaluated here."""
    found = [node]
    for current in found:
        if is_evaluable(current, ops) and gather(current) is None:
            found += [source for source in current.all_input_nodes if source not in found]
    return found


def closure(start: list[fx.Node], step: Callable[[fx.Node], Any]) -> set[fx.Node]:
    """All that `step` leads to from the nodes of `start`, and these."""
    seen = set(start)
    pending = list(start)
    while pending:
        for node in step(pending.pop()):
            if node not in seen:
                seen.add(node)
                pending.append(node)
    return seen


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    return closure(list(nodes), lambda node: node.all_input_nodes)


def downstream(start: fx.Node) -> list[fx.Node]:
    """The readers of `start`, and theirs, in graph order, up to the first nodes not evaluated here."""
    seen = closure([start], lambda node: node.users if node is start or node.target in EVALUABLE else ())
    return [node for node in start.graph.nodes if node in seen and node.target in EVALUABLE]


def attention_of(update: fx.Node) -> fx.Node | None:
    """The attention op that waits for the update, if it is in the same graph."""
    return next((user for user in update.users if user.target is auto_functionalized), None)
