# SPDX-License-Identifier: Apache-2.0
"""The FX pass: RoPE followed by vLLM's MLA cache update becomes one `mla_fusion` call.

`fuse` starts at each `vllm.unified_mla_kv_cache_update` node and walks back. What lies between the key that it writes
and the key's source is not compared with a pattern but evaluated: on small random float64 tensors it must equal the
rotation of the source, in GPT-J or in GPT-NeoX pairing. So every form that a vLLM release, a torch version or a custom
op gives to RoPE is recognised, and anything that computes something else is left alone.

`defunctionalise` runs after all other passes and replaces the functional form, which would copy the whole query, by the
plain in-place call, wherever nobody reads the unrotated query afterwards.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

_VIEWS = {
    aten.alias.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    operator.getitem,
}
_ARITHMETIC = {
    aten._to_copy.default,
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
    torch.ops.prims.convert_element_type.default,
}
_EVALUABLE = _VIEWS | _ARITHMETIC
_PRECISION_CHANGES = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}

_PROBE_TOKENS = 5
_PROBE_POSITIONS = 7
_PROBE_MAX_ELEMENTS = 1 << 24
# Rounding to one of these is no step of its own; to fp8 or an integer it is.
_EVALUABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class RotaryOp:
    """A custom op that rotates `query` and `key` in place, by the names of its arguments."""

    target: Any
    is_neox: str = "is_neox"


@dataclass(frozen=True)
class FusionOps:
    """The ops that the pass looks for and those that it puts in.

    `rms_norm` is called as (x, weight, epsilon, ...); `rms_norm_out` has arguments `input`, `weight`, `epsilon` and
    writes its first. `fused_norm` is None where the latent's norm is to stay where it is.
    """

    update: Any
    fused: Any
    rotary: tuple[RotaryOp, ...] = ()
    fused_norm: Any = None
    rms_norm: Any = None
    rms_norm_out: Any = None
    norm_beside_others: bool = False


@dataclass
class FusionResult:
    """What `fuse` did to one graph: how many sites it fused, how many of them with the latent's norm, why each of the
    others was left alone, and how many more there are to whose key no rotation leads that the pass could know."""

    fused: int = 0
    with_norm: int = 0
    reasons: list[str] = field(default_factory=list)
    without_rope: int = 0


@dataclass(frozen=True)
class _Site:
    positions: fx.Node
    cos_sin_cache: fx.Node
    is_neox: bool
    k_pe: fx.Node
    q_pe: fx.Node
    q_rotated: fx.Node | None


@dataclass(frozen=True)
class _Norm:
    """normed = RMSNorm(kv_c) * weight."""

    kv_c: fx.Node
    weight: fx.Node
    epsilon: float


class _NoMatch(Exception):
    """Carries the reason why a site is left alone."""


class _NoRope(Exception):
    """There is nothing to fuse with the cache update."""


def fuse(graph: fx.Graph, ops: FusionOps) -> FusionResult:
    """Rewrites every cache update in `graph` whose key is a RoPE into the functional form of `ops.fused`.

    The graph stays functional, sorted and without dead nodes. Sites that do not match are untouched. An error
    in matching one is its reason. If rewriting raises, the graph is as it was.
    """
    updates = list(graph.find_nodes(op="call_function", target=ops.update))
    if not updates:
        return FusionResult()
    with _all_or_nothing(graph):
        return _fuse(graph, updates, ops)


def _fuse(graph: fx.Graph, updates: list[fx.Node], ops: FusionOps) -> FusionResult:
    result = FusionResult()
    for update in updates:
        try:
            site = _match(update, ops)
            norm = _match_norm(update, site, ops)
        except _NoRope:
            result.without_rope += 1
            continue
        except _NoMatch as reason:
            result.reasons.append(str(reason))
            continue
        except Exception as error:
            result.reasons.append(f"the pass could not read its graph: {error!r}")
            continue
        _rewrite(graph, update, site, norm, ops)
        result.fused += 1
        result.with_norm += norm is not None
    if result.fused:
        stable_topological_sort(graph)
        graph.eliminate_dead_code()
        _drop_self_scatters(graph)
    return result


def defunctionalise(graph: fx.Graph, ops: FusionOps) -> int:
    """Replaces functional calls of `ops.fused` by in-place ones and drops the scatter of the query; returns how many.

    A call whose unrotated query is still read later, or is a graph input, keeps the functional form: Inductor then
    copies the query, which is slower and right. Must run after every pass that sorts or removes nodes.
    If it raises, the graph is as it was.
    """
    functional = graph.find_nodes(op="call_function", target=auto_functionalized)
    calls = [node for node in functional if node.args[0] in (ops.fused, ops.fused_norm)]
    if not calls:
        return 0
    with _all_or_nothing(graph):
        return _defunctionalise(graph, calls)


def _defunctionalise(graph: fx.Graph, calls: list[fx.Node]) -> int:
    count = 0
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in calls:
        try:
            replacements = _in_place_replacements(graph, node, order)
        except _NoMatch:
            continue
        if replacements is not None:
            order[_make_in_place(graph, node, replacements)] = order[node]
            count += 1
    if count:
        _erase_unused_views(graph)
    return count


@contextmanager
def _all_or_nothing(graph: fx.Graph) -> Iterator[None]:
    """Puts the graph back as it was if the block raises: half of a rewrite would compute something else."""
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


# --- matching ---------------------------------------------------------------------------------------------------------


def _match(update: fx.Node, ops: FusionOps) -> _Site:
    kv_c, k_rotated = update.args[:2]
    assert isinstance(kv_c, fx.Node)
    assert isinstance(k_rotated, fx.Node)
    cone = _cone(k_rotated, ops)
    rotary = [node for node in cone if _rotary_op(node, ops)]
    gathers = [node for node in cone if _gather(node)]
    origins = _origins(k_rotated, ops)
    if not origins:
        raise _NoRope
    if len(rotary) == 1 and not gathers:
        site = _match_rotary_op(k_rotated, rotary[0], ops)
    elif len(gathers) == 1 and not rotary:
        site = _match_native(update, k_rotated, cone, gathers[0], ops)
    elif all(node.op == "placeholder" for node in origins):
        raise _NoMatch(
            "the rotary embedding of its key is in another graph, beyond a splitting op such as a sparse indexer; "
            "start vLLM with use_inductor_graph_partition=True in the compilation config to have both in one"
        )
    else:
        raise _NoMatch("the key that is cached does not come from one rotary embedding")
    _check_tensors(site, kv_c, k_rotated)
    inputs = [site.positions, site.cos_sin_cache, site.q_pe, site.k_pe, kv_c]
    if not {update, k_rotated, site.q_rotated}.isdisjoint(_ancestors(*inputs)):
        raise _NoMatch("what the rotary embedding reads is computed from its own results")
    _fake(update)
    return site


def _origins(key: fx.Node, ops: FusionOps) -> list[fx.Node]:
    """What may have rotated the key: rotary ops, rows of a table, and values of another graph, one for each token.

    Looks through torch's own ops, and no further than what is larger than the key: the qkv_a GEMM.
    """
    size = _numel(key)

    def sources(node: fx.Node) -> list[fx.Node]:
        is_torchs = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "prims")
        looks_through = node.target in _EVALUABLE or (is_torchs and _numel(node) <= size)
        return node.all_input_nodes if looks_through and _gather(node) is None else []

    return [
        node
        for node in _closure([key], sources)
        if _gather(node) or _rotary_op(node, ops) or (node.op == "placeholder" and _shape(node)[:1] == _shape(key)[:1])
    ]


def _match_rotary_op(k_rotated: fx.Node, node: fx.Node, ops: FusionOps) -> _Site:
    op = _rotary_op(node, ops)
    assert op is not None
    kwargs = node.kwargs
    if kwargs.get("rope_dim_offset") or kwargs.get("inverse") or kwargs.get("offsets") is not None:
        raise _NoMatch("the rotary op rotates another part of the head, backwards, or by other positions")
    key, query = kwargs["key"], kwargs["query"]
    if not isinstance(key, fx.Node) or not isinstance(query, fx.Node):
        raise _NoMatch("the rotary op has no key or no query")
    if kwargs["head_size"] != _shape(key)[-1]:
        raise _NoMatch("the rotary op rotates only a part of the head")
    _check_feeds_only(_result_of(node, 2), k_rotated)
    site = _Site(
        positions=kwargs["positions"],
        cos_sin_cache=kwargs["cos_sin_cache"],
        is_neox=kwargs[op.is_neox],
        k_pe=key,
        q_pe=query,
        q_rotated=_result_of(node, 1),
    )
    probe = _Probe(site.positions, site.cos_sin_cache, ops)
    if not probe.is_rotation(k_rotated, key, site.is_neox):
        raise _NoMatch("the key that is cached is not the rotary op's key")
    return site


def _match_native(update: fx.Node, k_rotated: fx.Node, cone: list[fx.Node], gather: fx.Node, ops: FusionOps) -> _Site:
    cos_sin_cache, positions = _gather(gather) or (gather, gather)
    probe = _Probe(positions, cos_sin_cache, ops)
    key = _source(probe, k_rotated, cone, gather, ops)
    if key is None:
        raise _NoMatch("what lies between the key and the cache is not a rotary embedding")
    k_pe, is_neox = key
    attention = _attention_of(update)
    queries: list[_Site] = []
    of_the_key = {*cone, *_closure([k_rotated], lambda node: node.users)}
    for q_rotated in _downstream(gather):
        if q_rotated in of_the_key or len(_shape(q_rotated)) != 3:
            continue
        if any(found.q_rotated in _ancestors(q_rotated) for found in queries):
            continue
        query = _source(probe, q_rotated, _cone(q_rotated, ops), gather, ops, is_neox)
        if query is not None:
            queries.append(_Site(positions, cos_sin_cache, is_neox, k_pe, query[0], q_rotated))
    if attention is not None and len(queries) > 1:
        queries = [site for site in queries if site.q_rotated in _ancestors(attention)]
    if len(queries) != 1:
        raise _NoMatch(f"one rotated query is expected beside the key, found {len(queries)}")
    return queries[0]


def _source(
    probe: _Probe, rotated: fx.Node, cone: list[fx.Node], gather: fx.Node, ops: FusionOps, is_neox: bool | None = None
) -> tuple[fx.Node, bool] | None:
    """The node of which `rotated` is the rotation, and its pairing."""
    shape = _shape(rotated)
    for candidate in cone:
        if candidate is rotated or _shape(candidate) not in (shape, (shape[0], *shape[2:])):
            continue
        if gather in _cone(candidate, ops):
            continue
        for pairing in (False, True) if is_neox is None else (is_neox,):
            if probe.is_rotation(rotated, candidate, pairing):
                return candidate, pairing
    return None


def _check_tensors(site: _Site, kv_c: fx.Node, k_rotated: fx.Node) -> None:
    """The kernel's requirements that a graph can show; the rest is checked at run time."""
    dtype = _fake(site.q_pe).dtype
    if dtype not in _ACTIVATION_DTYPES:
        raise _NoMatch(f"activations of {dtype} are not supported")
    for name, node, dtypes in (
        ("q_pe", site.q_pe, (dtype,)),
        ("k_pe", site.k_pe, (dtype,)),
        ("kv_c_normed", kv_c, (dtype,)),
        ("cos_sin_cache", site.cos_sin_cache, (dtype, torch.float32)),
        ("positions", site.positions, (torch.int32, torch.int64)),
    ):
        fake = _fake(node)
        if fake.dtype not in dtypes or fake.stride(-1) != 1:
            needed = " or ".join(map(str, dtypes))
            raise _NoMatch(f"{name} has dtype {fake.dtype} and last stride {fake.stride(-1)}, needs {needed} and 1")
    for name, rotated in (("query", site.q_rotated), ("key", k_rotated)):
        if rotated is not None and _fake(rotated).dtype != dtype and not _is_only_converted(rotated, dtype):
            raise _NoMatch(f"the rotated {name} is read as {_fake(rotated).dtype}, the kernel writes {dtype}")
    _check_shapes(site, k_rotated)
    _check_memory(site, kv_c)


def _check_shapes(site: _Site, k_rotated: fx.Node) -> None:
    if len(_shape(site.q_pe)) != 3 or len(_shape(site.positions)) != 1:
        raise _NoMatch("q_pe must be [num_tokens, num_heads, rot_dim] and positions [num_tokens]")
    (num_tokens,), rot_dim = _shape(site.positions), _shape(site.q_pe)[-1]
    for name, node in (("k_pe", site.k_pe), ("the rotated key", k_rotated)):
        if _shape(node) not in ((num_tokens, 1, rot_dim), (num_tokens, rot_dim)):
            shape = tuple(_fake(node).shape)
            raise _NoMatch(f"{name} has shape {shape}, needs [num_tokens, 1, {rot_dim}] or [num_tokens, {rot_dim}]")
    if _shape(site.cos_sin_cache)[1:] != (rot_dim,):
        shape = tuple(_fake(site.cos_sin_cache).shape)
        raise _NoMatch(f"cos_sin_cache has shape {shape}, needs [max_position, {rot_dim}]")


def _check_memory(site: _Site, kv_c: fx.Node) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(_shape(site.q_pe), _fake(site.q_pe).stride(), strict=True)):
        raise _NoMatch("q_pe is expanded: heads or tokens that share memory cannot be rotated in place")
    # Not even the functional form would do: Inductor makes it an in-place one and looks at the query's readers only.
    for name, node in (("k_pe", site.k_pe), ("kv_c_normed", kv_c)):
        if _may_overlap(node, site.q_pe):
            raise _NoMatch(f"{name} shares memory with q_pe, which is rotated in place")


def _is_only_converted(node: fx.Node, dtype: torch.dtype) -> bool:
    conversions = {*_PRECISION_CHANGES, aten.copy.default}
    return all(user.target in conversions and _fake(user).dtype == dtype for user in node.users)


def _check_feeds_only(start: fx.Node | None, goal: fx.Node) -> None:
    """Every reader of `start` must sit on a way to `goal`, else removing the rotary op would take its value away."""
    pending = [start] if start is not None else []
    while pending:
        node = pending.pop()
        if node is goal:
            continue
        if node.op == "output" or node.target not in _EVALUABLE:
            raise _NoMatch("the rotated key has another reader than the cache")
        pending.extend(node.users)


def _match_norm(update: fx.Node, site: _Site, ops: FusionOps) -> _Norm | None:
    """The norm that makes the cached latent, if the fused op may take it over."""
    normed = update.args[0]
    if ops.fused_norm is None or not isinstance(normed, fx.Node):
        return None
    attention = _attention_of(update)
    if any(user not in (update, attention) and user.op != "output" for user in normed.users):
        return None
    try:
        norm = _norm_by_op(normed, ops) or _native_norm(normed, site, ops)
        if norm is None or not _norm_fits(norm, normed, site):
            return None
    except _NoMatch:
        return None
    if normed in _ancestors(site.positions, site.cos_sin_cache, site.q_pe, site.k_pe):
        return None
    # Inductor makes one kernel of this norm and one that reads the same buffer; alone, the other costs as much.
    if not ops.norm_beside_others and _has_other_norm(norm, normed, ops):
        return None
    return norm


def _norm_by_op(normed: fx.Node, ops: FusionOps) -> _Norm | None:
    if ops.rms_norm is not None and normed.target is ops.rms_norm:
        x, weight, epsilon, *rest = normed.args
        if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and not any(rest):
            return _Norm(x, weight, float(epsilon))
    source = normed.args[0] if normed.target is operator.getitem else None
    if isinstance(source, fx.Node) and source.target is auto_functionalized and source.args[0] is ops.rms_norm_out:
        x, weight = source.kwargs["input"], source.kwargs["weight"]
        while isinstance(x, fx.Node) and x.target is aten.clone.default:
            x = x.args[0]  # vLLM makes the op's input contiguous, which our kernel does not need
        if normed.args[1] == 1 and isinstance(x, fx.Node) and isinstance(weight, fx.Node):
            return _Norm(x, weight, float(source.kwargs["epsilon"]))
    return None


def _native_norm(normed: fx.Node, site: _Site, ops: FusionOps) -> _Norm | None:
    """The norm written out in aten ops, again by evaluating it."""
    cone = _cone(normed, ops)
    rank = _shape(normed)[-1:]
    weights = [node for node in cone if _shape(node) == rank]
    epsilons = {arg for node in cone for arg in node.args[1:2] if isinstance(arg, float) and 0 < arg < 1}
    if not any(node.target is aten.rsqrt.default for node in cone):
        return None
    probe = _Probe(site.positions, site.cos_sin_cache, ops)
    for x in cone:
        if x is normed or _shape(x) != _shape(normed) or x.target not in _VIEWS:
            continue
        for weight in weights:
            for epsilon in epsilons:
                if probe.is_rms_norm(normed, x, weight, epsilon):
                    return _Norm(x, weight, epsilon)
    return None


def _norm_fits(norm: _Norm, normed: fx.Node, site: _Site) -> bool:
    dtype = _fake(site.q_pe).dtype
    x, weight = _fake(norm.kv_c), _fake(norm.weight)
    same_dtype = x.dtype == weight.dtype == _fake(normed).dtype == dtype
    same_shape = _shape(norm.kv_c) == _shape(normed) and _shape(norm.weight) == _shape(normed)[-1:]
    packed = x.dim() == 2 and x.stride(-1) == 1 and weight.stride(-1) == 1
    return same_dtype and same_shape and packed and not _may_overlap(norm.kv_c, site.q_pe)


def _has_other_norm(norm: _Norm, normed: fx.Node, ops: FusionOps) -> bool:
    """Whether a second norm reads the buffer of which `kv_c` is a part, as q_a_layernorm does in q-LoRA models."""
    storage = _storage(norm.kv_c)
    own = {normed, *normed.all_input_nodes, *_cone(normed, ops)}
    for node in normed.graph.nodes:
        is_norm = node.target in (ops.rms_norm, aten.pow.Tensor_Scalar) or (
            node.target is auto_functionalized and node.args[0] is ops.rms_norm_out
        )
        if is_norm and node not in own and any(_reads(source, storage, ops) for source in node.all_input_nodes):
            return True
    return False


def _reads(node: fx.Node, storage: int | None, ops: FusionOps) -> bool:
    return any(_storage(source) == storage for source in (node, *node.all_input_nodes))


# --- rewriting --------------------------------------------------------------------------------------------------------


def _rewrite(graph: fx.Graph, update: fx.Node, site: _Site, norm: _Norm | None, ops: FusionOps) -> None:
    normed, k_rotated, layer_name, kv_cache_dtype, k_scale = update.args
    assert isinstance(normed, fx.Node)
    assert isinstance(k_rotated, fx.Node)
    num_tokens, rot_dim = _fake(k_rotated).shape[0], _fake(k_rotated).shape[-1]
    outputs = [_fake(k_rotated).new_empty((num_tokens, 1, rot_dim))]
    latent = {"kv_c": normed}
    if norm is not None:
        outputs.append(_fake(normed).new_empty(_fake(normed).shape))
        latent = {"kv_c": norm.kv_c, "kv_c_weight": norm.weight, "epsilon": norm.epsilon}
    outputs.append(_fake(site.q_pe).new_empty(_fake(site.q_pe).shape))
    with graph.inserting_before(update):
        fused = graph.call_function(
            auto_functionalized,
            (ops.fused if norm is None else ops.fused_norm,),
            {
                "positions": site.positions,
                "q_pe": site.q_pe,
                "k_pe": site.k_pe,
                **latent,
                "cos_sin_cache": site.cos_sin_cache,
                "is_neox": site.is_neox,
                "kv_cache_dtype": kv_cache_dtype,
                "kv_cache_scale": k_scale,
                "layer_name": layer_name,
            },
        )
        results = [graph.call_function(operator.getitem, (fused, index)) for index in range(len(outputs))]
    fused.meta["val"] = tuple(outputs)
    for result, value in zip(results, outputs, strict=True):
        result.meta["val"] = value
    key = results[0] if len(_shape(k_rotated)) == 3 else _without_heads(graph, results[0], update)
    _allow_input_strides(k_rotated, _fake(key))
    k_rotated.replace_all_uses_with(key)
    _allow_output_strides(graph, key)
    update.replace_all_uses_with(_empty_part_of(graph, results[0], update))
    if site.q_rotated is not None:
        site.q_rotated.replace_all_uses_with(results[-1])
    graph.erase_node(update)
    if norm is not None:
        normed.replace_all_uses_with(results[1])


def _without_heads(graph: fx.Graph, k_pe_out: fx.Node, update: fx.Node) -> fx.Node:
    """The kernel's [num_tokens, 1, rot_dim] as [num_tokens, rot_dim]."""
    with graph.inserting_before(update):
        key = graph.call_function(aten.squeeze.dim, (k_pe_out, 1))
    key.meta["val"] = _fake(k_pe_out).squeeze(1)
    return key


def _empty_part_of(graph: fx.Graph, k_pe_out: fx.Node, update: fx.Node) -> fx.Node:
    """What the attention op takes in the place of the update's empty result, only to run after it: a view, which costs
    nothing and keeps the fused call alive where nobody else reads its results."""
    with graph.inserting_before(update):
        empty = graph.call_function(aten.as_strided.default, (k_pe_out, [0], [1], 0))
    empty.meta["val"] = _fake(update)
    return empty


def _allow_input_strides(k_rotated: fx.Node, k_value: torch.Tensor) -> None:
    """Where another op reads the key, Inductor would copy it to the strides that this op saw when it was traced."""
    for user in k_rotated.users:
        if "eager_input_vals" not in user.meta:
            continue
        args, kwargs = user.meta["eager_input_vals"]
        args = tuple(k_value if user.args[i : i + 1] == (k_rotated,) else value for i, value in enumerate(args))
        kwargs = {name: k_value if user.kwargs.get(name) is k_rotated else value for name, value in kwargs.items()}
        user.meta["eager_input_vals"] = (args, kwargs)


def _allow_output_strides(graph: fx.Graph, k_pe_out: fx.Node) -> None:
    """Where the key leaves the graph, Inductor would copy it back to the strides that the view of qkv_a had."""
    output = graph.output_node()
    strides = output.meta.get("original_output_strides")
    outputs = output.args[0]
    if strides is None or not isinstance(outputs, (list, tuple)):
        return
    strides = list(strides)
    for index, node in enumerate(outputs):
        if node is k_pe_out:
            strides[index] = _fake(k_pe_out).stride()
    output.meta["original_output_strides"] = strides


def _drop_self_scatters(graph: fx.Graph) -> None:
    """x with its own slice written into it is x (left behind by an in-place op on a slice that is then assigned)."""
    for scatter in graph.find_nodes(op="call_function", target=aten.slice_scatter.default):
        base, source = scatter.args[:2]
        assert isinstance(base, fx.Node)
        if _is_in_storage_of(source, base) and _writes_to(scatter, source):
            scatter.replace_all_uses_with(base)
            graph.erase_node(scatter)


def _in_place_replacements(
    graph: fx.Graph, fused: fx.Node, order: dict[fx.Node, int]
) -> list[tuple[fx.Node, fx.Node]] | None:
    """Pairs (node, what its users read once the query is rotated in place), readers first; None: not possible."""
    q_pe = fused.kwargs["q_pe"]
    assert isinstance(q_pe, fx.Node)
    memory = _memory(q_pe)
    aliases = {node for node in graph.nodes if not memory.isdisjoint(_memory(node))}
    if any(node.op != "call_function" for node in aliases):
        return None

    replacements: list[tuple[fx.Node, fx.Node]] = []
    q_pe_out = _result_of(fused, _num_returns(fused))
    if q_pe_out is not None:
        replacements = [*_scatters_of(q_pe_out, q_pe), (q_pe_out, q_pe)]
    not_asked = {*aliases, fused, *(node for node, _ in replacements)}
    readers = {reader for alias in aliases for reader in alias.users} - not_asked
    return None if any(order[reader] > order[fused] for reader in readers) else replacements


def _scatters_of(q_pe_out: fx.Node, q_pe: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that put the rotated query back to where it is rotated in place anyway."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for user in q_pe_out.users:
        if user.target is aten.copy.default and user.args[1] is q_pe_out and _same_place(user.args[0], q_pe):
            found += [*_scatters_of(user, q_pe), (user, q_pe)]
        elif user.target is aten.slice_scatter.default and user.args[1] is q_pe_out:
            base = user.args[0]
            assert isinstance(base, fx.Node)
            if _is_in_storage_of(q_pe, base) and _writes_to(user, q_pe):
                found.append((user, base))
    return found


def _make_in_place(graph: fx.Graph, fused: fx.Node, replacements: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
    num_returns = _num_returns(fused)
    values = fused.meta["val"][:num_returns]
    with graph.inserting_before(fused):
        call = graph.call_function(fused.args[0], (), dict(fused.kwargs))
    call.meta["val"] = values[0] if num_returns == 1 else values
    for index in range(num_returns):
        result = _result_of(fused, index)
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
    return call


def _num_returns(fused: fx.Node) -> int:
    return len(fused.args[0]._schema.returns)


def _erase_unused_views(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function" and node.target in _VIEWS:
            graph.erase_node(node)


# --- reading the graph ------------------------------------------------------------------------------------------------


def _fake(node: Any) -> torch.Tensor:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        raise _NoMatch(f"{node} has no tensor value in the graph's metadata")
    return value


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The node's shape with a small number in the place of the number of tokens, so that comparing sets no guard."""
    value = node.meta.get("val")
    return tuple(_probe_size(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def _numel(node: fx.Node) -> int:
    return torch.Size(_shape(node)).numel()


def _probe_size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _PROBE_TOKENS)))


def _symbolic(sizes: Any) -> tuple[Any, ...]:
    return tuple(size if isinstance(size, int) else size.node.expr for size in sizes)


def _storage(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _geometry(node: Any) -> tuple[Any, ...]:
    value = _fake(node)
    return *_symbolic(value.shape), *_symbolic(value.stride()), *_symbolic([value.storage_offset()])


def _same_place(first: Any, second: Any) -> bool:
    return _is_in_storage_of(first, second) and _geometry(first) == _geometry(second)


def _is_in_storage_of(first: Any, second: Any) -> bool:
    return _storage(first) is not None and _storage(first) == _storage(second)


def _memory(node: fx.Node) -> set[int]:
    """The storages that a node may lie in: its own and those of what it is a view of, as a pass may have put in a view
    whose value in the metadata has a storage of its own."""
    found = set()
    while True:
        storage = _storage(node)
        found |= {storage} if storage is not None else set()
        source = node.args[0] if node.target in _VIEWS else None
        if not isinstance(source, fx.Node) or (node.target is operator.getitem and source.target not in _VIEWS):
            return found
        node = source


def _may_overlap(first: fx.Node, second: fx.Node) -> bool:
    """Whether two nodes share memory; slices side by side in a row, as of a fused projection, do not."""
    if _memory(first).isdisjoint(_memory(second)):
        return False
    a, b = _fake(first), _fake(second)
    comparable = _is_in_storage_of(first, second) and a.dtype == b.dtype
    if not comparable or _symbolic(a.stride()[:1]) != _symbolic(b.stride()[:1]):
        return True
    return not _elements(first).isdisjoint(_elements(second))


def _elements(node: fx.Node) -> set[int]:
    """Where in their storage the elements of a node's first rows are."""
    value = _fake(node)
    places = {_probe_size(value.storage_offset())}
    for dim, (size, stride) in enumerate(zip(_shape(node), value.stride(), strict=True)):
        steps = range(min(size, _PROBE_TOKENS) if dim == 0 else size)
        places = {place + step * _probe_size(stride) for place in places for step in steps}
    return places


def _writes_to(scatter: fx.Node, view: Any) -> bool:
    """Whether a slice_scatter writes where `view` is; both in one storage."""
    try:
        return _scatter_geometry(scatter) == _geometry(view)
    except _NoMatch:
        return False


def _scatter_geometry(scatter: fx.Node) -> tuple[Any, ...]:
    """Where in its base a slice_scatter writes: shape, strides and offset of that slice."""
    base, source = scatter.args[:2]
    given: list[Any] = list(scatter.args[2:])
    dim, start, _, step = given + [0, None, None, 1][len(given) :]
    value = _fake(base)
    start = start or 0
    if not isinstance(dim, int) or not isinstance(start, int) or not isinstance(step, int):
        raise _NoMatch(f"{scatter} writes to a place that is not constant")
    strides: list[Any] = list(value.stride())
    offset = value.storage_offset() + start * strides[dim]
    strides[dim] *= step
    return *_symbolic(_fake(source).shape), *_symbolic(strides), *_symbolic([offset])


def _gather(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(table, rows) if the node picks rows of a table."""
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:
        return node.args[0], node.args[1][0]
    if node.target is aten.index_select.default and node.args[1] == 0:
        return node.args[0], node.args[2]
    return None


def _rotary_op(node: fx.Node, ops: FusionOps) -> RotaryOp | None:
    if node.target is not auto_functionalized:
        return None
    return next((op for op in ops.rotary if op.target is node.args[0]), None)


def _result_of(node: fx.Node, index: int) -> fx.Node | None:
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


def _is_evaluable(node: fx.Node, ops: FusionOps) -> bool:
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_evaluable(source, ops)
    return node.op == "call_function" and (node.target in _EVALUABLE or _rotary_op(node, ops) is not None)


def _cone(node: fx.Node, ops: FusionOps) -> list[fx.Node]:
    """The node and what it is computed from, nearest first, up to and including the first nodes not evaluated here."""
    found = [node]
    for current in found:
        if _is_evaluable(current, ops) and _gather(current) is None:
            found += [source for source in current.all_input_nodes if source not in found]
    return found


def _closure(start: list[fx.Node], step: Callable[[fx.Node], Any]) -> set[fx.Node]:
    seen = set(start)
    pending = list(start)
    while pending:
        for node in step(pending.pop()):
            if node not in seen:
                seen.add(node)
                pending.append(node)
    return seen


def _ancestors(*nodes: fx.Node) -> set[fx.Node]:
    return _closure(list(nodes), lambda node: node.all_input_nodes)


def _downstream(gather: fx.Node) -> list[fx.Node]:
    """The gather's readers, and theirs, in graph order, up to the first nodes not evaluated here."""
    seen = _closure([gather], lambda node: node.users if node is gather or node.target in _EVALUABLE else ())
    return [node for node in gather.graph.nodes if node in seen and node.target in _EVALUABLE]


def _attention_of(update: fx.Node) -> fx.Node | None:
    """The attention op that waits for the update, if it is in the same graph."""
    return next((user for user in update.users if user.target is auto_functionalized), None)


class _Probe:
    """Evaluates nodes on small random float64 tensors on the CPU, the number of tokens replaced by a small one."""

    def __init__(self, positions: fx.Node, cos_sin_cache: fx.Node, ops: FusionOps) -> None:
        self._ops = ops
        self._random = torch.Generator().manual_seed(0)
        num_tokens = _shape(positions)[0]
        rot_dim = _shape(cos_sin_cache)[-1]
        self._rows = torch.randint(_PROBE_POSITIONS, (num_tokens,), generator=self._random)
        self._table = torch.randn(_PROBE_POSITIONS, rot_dim, generator=self._random, dtype=torch.float64)
        self._values: dict[fx.Node, Any] = {positions: self._rows, cos_sin_cache: self._table}

    def is_rotation(self, rotated: fx.Node, source: fx.Node, is_neox: bool) -> bool:
        if _shape(source)[-1] != self._table.shape[-1]:
            return False
        with _disable_current_modes():
            try:
                expected = self._rotate(self._value(source), is_neox)
                actual = self._value(rotated)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return False
            return actual.numel() == expected.numel() and torch.allclose(actual, expected.view_as(actual), rtol=1e-9)

    def is_rms_norm(self, normed: fx.Node, source: fx.Node, weight: fx.Node, epsilon: float) -> bool:
        with _disable_current_modes():
            try:
                x = self._value(source)
                expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * self._value(weight)
                actual = self._value(normed)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return False
            return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-9)

    def _rotate(self, x: torch.Tensor, is_neox: bool) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = self._table[self._rows].view(x.shape[0], *(1,) * (x.dim() - 2), 2 * half)
        cos, sin = angles[..., :half], angles[..., half:]
        a, b = (x[..., :half], x[..., half:]) if is_neox else (x[..., 0::2], x[..., 1::2])
        rotated = (a * cos - b * sin, b * cos + a * sin)
        return torch.cat(rotated, -1) if is_neox else torch.stack(rotated, -1).flatten(-2)

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = self._evaluate(node) if _is_evaluable(node, self._ops) else self._leaf(node)
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype not in _EVALUABLE_DTYPES:
            raise TypeError(f"{node} has dtype {value.dtype}, which rounds too much to be passed over")
        rotary = _rotary_op(node, self._ops)
        if rotary is not None:
            is_neox = bool(node.kwargs[rotary.is_neox])
            return None, *(self._rotate(self._value(node.kwargs[name]), is_neox) for name in ("query", "key"))
        args = fx.map_arg(node.args, self._value)
        if node.target in _PRECISION_CHANGES:
            return args[0]
        kwargs = {name: self._value(arg) if isinstance(arg, fx.Node) else arg for name, arg in node.kwargs.items()}
        args = torch.utils._pytree.tree_map_only(torch.SymInt, _probe_size, args)
        return node.target(*args, **kwargs)

    def _leaf(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return _probe_size(value)
        sizes = _shape(node)
        if torch.Size(sizes).numel() > _PROBE_MAX_ELEMENTS:
            raise _NoMatch(
                f"{node} of shape {list(sizes)} is too large to evaluate, as in a graph that was compiled for a "
                "fixed number of tokens; take large numbers out of compile_sizes"
            )
        return torch.randn(sizes, generator=self._random, dtype=torch.float64)
