# SPDX-License-Identifier: Apache-2.0
"""A graph in order, and back as it was when a rewrite fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import stable_topological_sort


def sort(graph: fx.Graph) -> None:
    """Puts definitions before uses, and changes nothing where they are: passes may leave a graph unsorted."""
    stable_topological_sort(graph)


@contextmanager
def all_or_nothing(graph: fx.Graph) -> Iterator[None]:
    """Puts the graph, which must be sorted, back as it was if the block raises: half of a rewrite computes something
    else."""
    backup = fx.Graph()
    outputs, output = _copy_nodes(graph, backup)
    output_meta = copy.copy(output.meta)
    try:
        yield
    except BaseException:
        for node in graph.nodes:
            node.args, node.kwargs = (), {}
        for node in reversed(list(graph.nodes)):
            graph.erase_node(node)
        backup.output(outputs)
        graph.output(_copy_nodes(backup, graph)[0]).meta = output_meta
        raise


def _copy_nodes(source: fx.Graph, target: fx.Graph) -> tuple[Any, fx.Node]:
    """Copies all but the output node; returns that node's argument in `target`, and the node itself."""
    copied = target.graph_copy(source, {}, return_output_node=True)
    assert isinstance(copied, tuple)
    return copied[0], source.output_node()
