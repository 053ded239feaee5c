# SPDX-License-Identifier: Apache-2.0
"""Runs the pass again on the graph that a failure of it left in a file, with the vLLM of this interpreter."""

from pathlib import Path

from vllm_mla_fusion.fx import fusion
from vllm_mla_fusion.host import graph_dump, passes


def rerun(path: Path) -> str:
    """What the pass does to the graph now, and what it said then. Raises what the pass raises.

    Raises:
        ValueError: the file is none that a failure left.
    """
    facts, graph = graph_dump.read(path)
    result = fusion.fuse(graph, passes.fusion_ops())
    lines = [f"then: {facts.get('reason')}", f"now: {result.fused} fused, {result.with_norm} of them with the norm"]
    return "\n".join([*lines, *(f"left alone: {reason}" for reason in result.reasons)])
