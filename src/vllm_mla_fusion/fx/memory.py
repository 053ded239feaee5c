# SPDX-License-Identifier: Apache-2.0
"""Which nodes lie in the same memory, by the graph's FakeTensors and views, and what of it is certain in Inductor."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import config as inductor_config

from vllm_mla_fusion.fx.ops import SPLITS, VIEWS, aten, mutated_arguments
from vllm_mla_fusion.fx.reading import PROBE_TOKENS, NoMatchError, fake, probe_size, shape, symbolic

_MATMULS = {aten.addmm.default, aten.mm.default}
_OTHER_KERNELS = {aten._int_mm.default, aten._scaled_mm.default}
_ALLOCATIONS = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default}


def storage(node: Any) -> int | None:
    """An id of the storage of the node's value; None without one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def geometry(node: Any) -> tuple[Any, ...]:
    """Shape, strides and offset as expressions."""
    value = fake(node)
    return *symbolic(value.shape), *symbolic(value.stride()), *symbolic([value.storage_offset()])


def same_place(first: Any, second: Any) -> bool:
    """Whether both are the same elements of one storage."""
    return is_in_storage_of(first, second) and geometry(first) == geometry(second)


def is_in_storage_of(first: Any, second: Any) -> bool:
    """Whether the values of both share a storage."""
    return storage(first) is not None and storage(first) == storage(second)


def _viewed(node: fx.Node) -> fx.Node | None:
    """What the node is a view of."""
    source = node.args[0] if node.target in VIEWS else None
    if not isinstance(source, fx.Node) or (node.target is operator.getitem and source.target not in SPLITS):
        return None
    return source


def memory(node: fx.Node) -> set[int]:
    """The storages that a node may lie in: its own and those of what it is a view of, as a pass may have put in a view
    whose value in the metadata has a storage of its own."""
    found = set()
    current: fx.Node | None = node
    while current is not None:
        own = storage(current)
        found |= {own} if own is not None else set()
        current = _viewed(current)
    return found


def may_overlap(first: fx.Node, second: fx.Node) -> bool:
    """Whether two nodes share memory; slices side by side in a row, as of a fused projection, do not."""
    if memory(first).isdisjoint(memory(second)):
        return False
    a, b = fake(first), fake(second)
    comparable = is_in_storage_of(first, second) and a.dtype == b.dtype
    if not comparable or symbolic(a.stride()[:1]) != symbolic(b.stride()[:1]):
        return True
    return not _elements(first).isdisjoint(_elements(second))


def _elements(node: fx.Node) -> set[int]:
    """Where in their storage the elements of a node's first rows are."""
    value = fake(node)
    places = {probe_size(value.storage_offset())}
    for dim, (size, stride) in enumerate(zip(shape(node), value.stride(), strict=True)):
        steps = range(min(size, PROBE_TOKENS) if dim == 0 else size)
        places = {place + step * probe_size(stride) for place in places for step in steps}
    return places


def writes_to(scatter: fx.Node, view: Any) -> bool:
    """Whether a slice_scatter writes where `view` is; both in one storage."""
    try:
        return _scatter_geometry(scatter) == geometry(view)
    except NoMatchError:
        return False


def _scatter_geometry(scatter: fx.Node) -> tuple[Any, ...]:
    """Where in its base a slice_scatter writes: shape, strides and offset of that slice."""
    base, source = scatter.args[:2]
    given: list[Any] = list(scatter.args[2:])
    dim, start, _, step = given + [0, None, None, 1][len(given) :]
    value = fake(base)
    start = start or 0
    if not isinstance(dim, int) or not isinstance(start, int) or not isinstance(step, int):
        raise NoMatchError(f"{scatter} writes to a place that is not constant")
    strides: list[Any] = list(value.stride())
    offset = value.storage_offset() + start * strides[dim]
    strides[dim] *= step
    return *symbolic(fake(source).shape), *symbolic(strides), *symbolic([offset])


def is_certain_in_inductor(node: fx.Node) -> bool:
    """Whether a write to the node is a write to what its views are made of, in Inductor's code as in the FakeTensors.

    Inductor gives memory as the metadata says to results of kernels that it only calls: GEMMs and custom ops. What it
    computes itself it may lay out otherwise, or compute a part of only, and hand a copy of a view to an op that
    mutates it.
    """
    current = node
    while True:
        source = _viewed(current)
        if source is None:
            return _is_kernels_result(current)
        # A reshape that has to copy, or a view that a pass put in: nobody knows what Inductor makes of it.
        if storage(source) is not None and not is_in_storage_of(current, source):
            return False
        current = source


def _is_kernels_result(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        source, index = node.args
        return isinstance(source, fx.Node) and isinstance(index, int) and _is_result_number(source, index)
    if target in _MATMULS:
        return not inductor_config.triton.native_matmul
    return target in _OTHER_KERNELS | _ALLOCATIONS or _is_custom(target)


def _is_result_number(node: fx.Node, index: int) -> bool:
    """Whether result `index` of a node with several is memory that a kernel fills."""
    if node.target is not auto_functionalized:
        return _is_custom(node.target)
    op = node.args[0]
    assert isinstance(op, torch._ops.OpOverload)
    first, mutated = mutated_arguments(op)
    index -= first
    if not _is_custom(op) or index >= len(mutated):
        return False
    if index < 0:
        return True
    argument = node.kwargs.get(mutated[index])
    return isinstance(argument, fx.Node) and is_certain_in_inductor(argument)


def is_read_by_kernels_only(node: fx.Node) -> bool:
    """Whether nothing that reads the node is computed by Inductor, which could do both in one kernel."""
    for user in node.users:
        if user.target in VIEWS:
            if not is_read_by_kernels_only(user):
                return False
        elif user.op != "output" and user.target is not auto_functionalized:
            target = user.target
            if target not in _MATMULS | _OTHER_KERNELS and not _is_custom(target):
                return False
    return True


def _is_custom(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims", "inductor")
