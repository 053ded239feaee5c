# SPDX-License-Identifier: Apache-2.0
"""Conversions to a wider type and back, of which the kernel needs none: it computes in float32 whatever it reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch._guards import detect_fake_mode

from vllm_mla_fusion.fx.memory import viewed
from vllm_mla_fusion.fx.ops import ACTIVATION_DTYPES, MOVES, PRECISION_CHANGES, aten
from vllm_mla_fusion.fx.reading import fake, fake_result


def unwidened(node: fx.Node) -> fx.Node:
    """The node's values as they were before they were converted to a wider type.

    Views between the conversion and the node are repeated on what was converted, by new nodes behind it, which its
    graph may have to get rid of.
    """
    views: list[fx.Node] = []
    between: list[fx.Node] = []
    narrow, current = node, node
    while True:
        source = current.args[0] if _is_widening(current) else viewed(current)
        if not isinstance(source, fx.Node):
            break
        if _is_widening(current):
            narrow, views = source, list(between)
        else:
            between.append(current)
        current = source
    return _with_views(narrow, reversed(views), node)


def _with_views(narrow: fx.Node, views: Iterable[fx.Node], node: fx.Node) -> fx.Node:
    mode = detect_fake_mode([fake(narrow)])
    last, result = node, narrow
    for view in views:
        with node.graph.inserting_after(last):
            last = node.graph.call_function(view.target, (result, *view.args[1:]), view.kwargs)
        try:
            last.meta["val"] = fake_result(last, mode)
        except Exception:
            # What was converted lies otherwise in memory than the wider copy.
            return node
        result = last
    return result


def _is_widening(node: fx.Node) -> bool:
    if node.target not in PRECISION_CHANGES or not isinstance(node.args[0], fx.Node):
        return False
    narrow, wide = fake(node.args[0]).dtype, fake(node).dtype
    return narrow in ACTIVATION_DTYPES and torch.promote_types(narrow, wide) == wide


def is_only_read_as(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether all that reads the node converts its values to `dtype`, wherever it has moved them before."""
    return all(_converts(user, dtype) or (user.target in MOVES and is_only_read_as(user, dtype)) for user in node.users)


def as_read(narrow: fx.Node, wide: fx.Node) -> fx.Node:
    """What may take the place of `wide`, where `narrow` has its values in the type in which they are only read."""
    dtype = fake(wide).dtype
    if fake(narrow).dtype == dtype or all(_converts(user, fake(narrow).dtype) for user in wide.users):
        return narrow
    with narrow.graph.inserting_after(narrow):
        converted = narrow.graph.call_function(torch.ops.prims.convert_element_type.default, (narrow, dtype))
    converted.meta["val"] = fake(narrow).to(dtype)
    return converted


def converts(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the node is its first argument in this type."""
    return node.target in PRECISION_CHANGES and fake(node).dtype == dtype


def _converts(user: fx.Node, dtype: torch.dtype) -> bool:
    return converts(user, dtype) or (user.target is aten.copy.default and fake(user).dtype == dtype)
