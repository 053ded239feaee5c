# SPDX-License-Identifier: Apache-2.0
"""RoPE followed by vLLM's MLA cache update becomes one call, in the functional form; `in_place` is the last step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from vllm_mla_fusion.fx import norm as latents_norm
from vllm_mla_fusion.fx import query_norm as querys_norm
from vllm_mla_fusion.fx import rope
from vllm_mla_fusion.fx.ops import FusionOps, arguments
from vllm_mla_fusion.fx.reading import NoMatchError, complete_metadata
from vllm_mla_fusion.fx.rewrite import drop_self_scatters, rewrite, rewrite_around_q_b
from vllm_mla_fusion.fx.rope import NoRopeError
from vllm_mla_fusion.fx.transaction import all_or_nothing, sort


@dataclass
class FusionResult:
    """What `fuse` did to one graph: how many sites it fused, how many of them with the latent's norm and with the
    query's too, why each of the others was left alone, and how many more there are to whose key no rotation leads that
    the pass could know.

    `errors`: what went wrong in matching some of those left alone, defects of this package.
    """

    fused: int = 0
    with_norm: int = 0
    with_both_norms: int = 0
    reasons: list[str] = field(default_factory=list)
    without_rope: int = 0
    errors: list[Exception] = field(default_factory=list)


def fuse(graph: fx.Graph, ops: FusionOps) -> FusionResult:
    """Rewrites every cache update in `graph` whose key is a RoPE into the functional form of `ops.fused`.

    The graph, whose nodes may be in any order, is sorted; it stays functional and gets no dead nodes. Sites that do not
    match are untouched. An error in matching one is its reason. If rewriting raises, the graph is as it was.
    """
    if not graph.find_nodes(op="call_function", target=ops.update):
        return FusionResult()
    sort(graph)
    complete_metadata(graph)
    with all_or_nothing(graph):
        return _fuse(graph, ops)


def _fuse(graph: fx.Graph, ops: FusionOps) -> FusionResult:
    result = FusionResult()
    known = set(graph.nodes)
    for update in graph.find_nodes(op="call_function", target=ops.update):
        kv_c, k_rotated, *_ = arguments(update).values()
        try:
            site = rope.match(update, kv_c, k_rotated, ops)
            norm = latents_norm.match(update, kv_c, site, ops)
            query = querys_norm.match(update, site, norm, ops) if norm is not None else None
            if norm is not None and query is None and not ops.norm_beside_others:
                norm = None if latents_norm.costs_another(norm, kv_c, ops) else norm
        except NoRopeError:
            result.without_rope += 1
            continue
        except NoMatchError as reason:
            result.reasons.append(str(reason))
            continue
        except Exception as error:
            result.reasons.append(f"the pass could not read its graph: {error!r}")
            result.errors.append(error)
            continue
        if norm is not None and query is not None:
            rewrite_around_q_b(update, site, norm, query, ops)
        else:
            rewrite(update, site, norm, ops)
        result.fused += 1
        result.with_norm += norm is not None
        result.with_both_norms += query is not None
    if result.fused:
        sort(graph)
        graph.eliminate_dead_code()
        drop_self_scatters(graph)
        return result
    # Views that matching has put in, in vain.
    for node in reversed([node for node in graph.nodes if node not in known]):
        graph.erase_node(node)
    return result
