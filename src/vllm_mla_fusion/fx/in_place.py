# SPDX-License-Identifier: Apache-2.0
"""The last step: the functional calls, which Inductor would decompose by strides that it need not keep, become calls
that rotate the query where it lies, or a copy of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from vllm_mla_fusion.fx.memory import is_certain_in_inductor, is_in_storage_of, memory, same_place, writes_to
from vllm_mla_fusion.fx.ops import VIEWS, FusionOps, aten, in_order, mutated_result, result_of
from vllm_mla_fusion.fx.reading import complete_metadata, fake
from vllm_mla_fusion.fx.transaction import all_or_nothing, sort


@dataclass(frozen=True)
class InPlaceResult:
    """How many calls of a graph rotate the query where it lies, and how many a copy of it.

    `error`: what kept all of a graph from the first way, a defect of this package.
    """

    in_place: int = 0
    copied: int = 0
    error: Exception | None = None


# (node, what its users read once the query is rotated in place), readers first.
Replacements = list[tuple[fx.Node, fx.Node]]


def defunctionalise(graph: fx.Graph, ops: FusionOps) -> InPlaceResult:
    """Replaces every functional call of the fused ops by a call that mutates its query.

    It rotates the query where it lies and drops the scatters behind it if the query is memory that a kernel fills, no
    graph input, and nobody reads it unrotated later; else a contiguous copy. Must run after every pass that sorts or
    removes nodes. No functional call is left.

    Raises:
        Exception: not even copies can be put in. The graph is as it was and must not run.
    """
    if not has_calls(graph, ops):
        return InPlaceResult()
    sort(graph)
    complete_metadata(graph)
    try:
        with all_or_nothing(graph):
            return _replace_calls(graph, ops, copy_all=False)
    except Exception as error:
        with all_or_nothing(graph):
            copied = _replace_calls(graph, ops, copy_all=True).copied
        return InPlaceResult(copied=copied, error=error)


def has_calls(graph: fx.Graph, ops: FusionOps) -> bool:
    """Whether there is anything for `defunctionalise` to do."""
    return bool(_calls(graph, ops))


def _calls(graph: fx.Graph, ops: FusionOps) -> list[fx.Node]:
    functional = graph.find_nodes(op="call_function", target=auto_functionalized)
    return [node for node in functional if node.args[0] in (ops.fused, ops.fused_norm, ops.rope_query)]


def _replace_calls(graph: fx.Graph, ops: FusionOps, copy_all: bool) -> InPlaceResult:
    in_place = copied = 0
    for fused in _calls(graph, ops):
        q_pe = fused.kwargs["q_pe"]
        assert isinstance(q_pe, fx.Node)
        replacements = None if copy_all else _replacements(graph, fused, q_pe)
        if replacements is None:
            q_pe_out = _rotated(fused)
            q_pe = _copy_before(fused, q_pe)
            replacements = [(q_pe_out, q_pe)] if q_pe_out is not None else []
            copied += 1
        else:
            in_place += 1
        _make_mutating(graph, fused, q_pe, replacements, ops)
    _erase_unused_views(graph)
    return InPlaceResult(in_place, copied)


def _replacements(graph: fx.Graph, fused: fx.Node, q_pe: fx.Node) -> Replacements | None:
    """What is to be read instead of the functional results; None: the query must not be rotated where it lies."""
    places = memory(q_pe)
    aliases = {node for node in graph.nodes if not places.isdisjoint(memory(node))}
    if any(node.op != "call_function" for node in aliases) or not is_certain_in_inductor(q_pe):
        return None
    replacements: Replacements = []
    q_pe_out = _rotated(fused)
    if q_pe_out is not None:
        replacements = [*_scatters_of(q_pe_out, q_pe), (q_pe_out, q_pe)]
    not_asked = {*aliases, fused, *(node for node, _ in replacements)}
    readers = {reader for alias in aliases for reader in alias.users} - not_asked
    return None if any(fused < reader for reader in readers) else replacements


def _scatters_of(q_pe_out: fx.Node, q_pe: fx.Node) -> Replacements:
    """The nodes that put the rotated query back to where it is rotated in place anyway."""
    found: Replacements = []
    for user in q_pe_out.users:
        if user.target is aten.copy.default and user.args[1] is q_pe_out and same_place(user.args[0], q_pe):
            found += [*_scatters_of(user, q_pe), (user, q_pe)]
        elif user.target is aten.slice_scatter.default and user.args[1] is q_pe_out:
            base = user.args[0]
            assert isinstance(base, fx.Node)
            if is_in_storage_of(q_pe, base) and writes_to(user, q_pe):
                found.append((user, base))
    return found


def _copy_before(fused: fx.Node, q_pe: fx.Node) -> fx.Node:
    with fused.graph.inserting_before(fused):
        copy = fused.graph.call_function(aten.clone.default, (q_pe,), {"memory_format": torch.contiguous_format})
    copy.meta["val"] = fake(q_pe).clone(memory_format=torch.contiguous_format)
    return copy


def _make_mutating(graph: fx.Graph, fused: fx.Node, q_pe: fx.Node, replacements: Replacements, ops: FusionOps) -> None:
    target, given = fused.args[0], {**fused.kwargs, "q_pe": q_pe}
    num_returns = len(target._schema.returns)
    values = fused.meta["val"][:num_returns]
    lies_as_traced = q_pe is fused.kwargs["q_pe"] and fake(q_pe).stride()[-1] == 1
    if target is ops.rope_query and lies_as_traced and ops.rope_query_in_place is not None:
        target = ops.rope_query_in_place
        del given["layer_name"]
    with graph.inserting_before(fused):
        call = graph.call_function(target, in_order(target, given))
    call.meta["val"] = values[0] if num_returns == 1 else values or None
    for index in range(num_returns):
        result = result_of(fused, index)
        if result is None:
            continue
        if num_returns == 1:
            result.replace_all_uses_with(call)
            graph.erase_node(result)
        else:
            result.args = (call, index)
    for node, replacement in replacements:
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    graph.erase_node(fused)


def _rotated(fused: fx.Node) -> fx.Node | None:
    """What picks the rotated query of a functional call."""
    return mutated_result(fused, "q_pe")


def _erase_unused_views(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function" and node.target in VIEWS:
            graph.erase_node(node)
