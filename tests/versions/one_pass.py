# SPDX-License-Identifier: Apache-2.0
"""The plugin's pass on a whole model's graph after a single pass of the release, and after one that leaves disorder."""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import PassConfig

from vllm_mla_fusion.host import passes, report

from . import decoder, graphs, judge, tracing, world
from .configurations import NO_DEEP_GEMM, TENSOR_PARALLEL, Case, Configuration

# What the pass manager runs after all passes, and might as well have run before.
ALWAYS = ("post_cleanup", "ir_lowering", "clone_elimination")
# Of a quantised model's graph; what else does depends on the release.
EFFECTIVE = {"NoOpEliminationPass", "RMSNormQuantFusionPass", "ActivationQuantFusionPass"}


def problems_of(case: Case, scratch: Path) -> Iterator[str]:
    """Traces the case's model with every pass of vLLM switched on; what is wrong after each of them."""
    report._left_alone.clear()
    case = dataclasses.replace(case, configuration=_every_pass())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _EachPass.traces, _EachPass.effective, _EachPass.counts = defaultdict(tracing.Trace), set(), {}
    with decoder.pretended(case):
        config = decoder.vllm_config(case, scratch)
        world.enter(config)
        with decoder.as_in_worker(config):
            model = decoder.build(config, case, mode)
            tracing.trace_compilation(model, config, mode, decoder.inputs, _EachPass)
    for name, trace in _EachPass.traces.items():
        found = judge.problems_of_graphs(config, trace, case.model.num_mla_layers)
        yield from (f"after {name}: {problem}" for problem in found)
    yield from (f"the pass says: {reason}" for reason in report._left_alone)
    yield from (f"{name} found nothing to do" for name in sorted(EFFECTIVE - _EachPass.effective))


def _every_pass() -> Configuration:
    """All flags that the release's PassConfig has, of which it takes back those that are not for this platform."""
    names = [field.name for field in dataclasses.fields(PassConfig)]
    flags: dict[str, Any] = {name: True for name in names if name.startswith(("fuse_", "enable_", "eliminate_"))}
    if "sp_min_token_num" in names:
        flags["sp_min_token_num"] = 1
    compilation = {"pass_config": flags, "use_inductor_graph_partition": True}
    return Configuration("every pass", compilation, TENSOR_PARALLEL, NO_DEEP_GEMM.environ)


class _Disorder:
    """Leaves uses before definitions, as a careless pass may."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        random.Random(0).shuffle(inner)
        for node in inner:
            graph.output_node().prepend(node)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        return True


class _EachPass(tracing.Recorder):
    """Runs the pass manager once for each of its passes, with ours where it stands; `effective`: which did anything.

    Where a pass alone finds nothing to do, those before it run as well.
    """

    traces: ClassVar[dict[str, tracing.Trace]]
    effective: ClassVar[set[str]]
    counts: ClassVar[dict[tuple[Any, ...], Counter[str | None]]]

    def __call__(self, graph: torch.fx.Graph) -> None:
        everything = self.pass_manager.passes
        (ours,) = [each for each in everything if type(each).__module__ == passes.__name__]
        others = [each for each in everything if each is not ours]
        for index, each in enumerate(others):
            name, chosen = type(each).__name__, [each]
            if self._changes(graph, [], each):
                self.effective.add(name)
            elif self._changes(graph, others[:index], each):
                self.effective.add(name)
                chosen = others[: index + 1]
            self._record(name, graph, [other for other in everything if other is ours or other in chosen])
        for name in ALWAYS:
            self._record(name, graph, [getattr(self.pass_manager, name), ours])
        self._record("disorder", graph, [_Disorder(), ours])
        position = everything.index(ours)
        self._record("all and disorder", graph, [*everything[:position], _Disorder(), *everything[position:]])
        raise tracing.Recorded

    def _changes(self, graph: torch.fx.Graph, before: list[Any], each: Any) -> bool:
        return self._count(graph, before) != self._count(graph, [*before, each])

    def _count(self, graph: torch.fx.Graph, chosen: list[Any]) -> Counter[str | None]:
        key = graph, *chosen
        if key not in self.counts:
            self.counts[key] = graphs.count([self._stock(graph, chosen)])
        return self.counts[key]

    def _record(self, name: str, graph: torch.fx.Graph, chosen: list[Any]) -> None:
        trace, after = self.traces[name], tracing.in_module(graph)
        trace.before.append(tracing.copy_of(graph))
        trace.stock.append(self._stock(graph, chosen))
        with patch.object(self.pass_manager, "passes", chosen):
            self.pass_manager(after)
        trace.after.append(after)

    def _stock(self, graph: torch.fx.Graph, chosen: list[Any]) -> torch.fx.Graph:
        stock = tracing.in_module(graph)
        with patch.object(self.pass_manager, "passes", chosen):
            self.without_fusion(stock)
        return stock
