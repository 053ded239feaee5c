# SPDX-License-Identifier: Apache-2.0
"""What the trial makes of the passes' doings: which layers it calls fused, and when a start counts as traced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import fx

pytest.importorskip("vllm")

from vllm_mla_fusion.fx import fusion
from vllm_mla_fusion.host import cache_writer, config, passes, trial

UPDATE = torch.ops.aten.relu.default


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    monkeypatch.setattr(cache_writer, "_layer_problem", lambda layer: layer.problem)
    one = {"kv_cache_dtype": "auto", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "problem": None}
    return {name: SimpleNamespace(**one) for name in ("first", "second")}


def judged(layers: dict, **seen: object) -> trial.Outcome:
    outcome = trial.Outcome(layers=len(layers))
    trial._judge(outcome, trial._Seen(**seen), torch.bfloat16, layers)
    return outcome


@pytest.mark.parametrize(
    ("updates", "fused", "with_norm", "expected"),
    [(2, 2, 1, (2, 1)), (2, 1, 1, (1, 1)), (4, 4, 2, (2, 1)), (4, 3, 0, (1, 0)), (0, 0, 0, (0, 0)), (1, 1, 0, (1, 0))],
)
def test_layers_are_counted_once_however_often_a_graph_is_compiled(updates, fused, with_norm, expected, layers) -> None:
    found = judged(layers, updates=updates, fused=fused, with_norm=with_norm)
    assert (found.fused, found.with_norm) == expected


def test_no_graph_is_a_reason(layers) -> None:
    assert judged(layers).reasons == ["vLLM does not put its cache update into a graph"]
    assert judged(layers, updates=2, fused=1, reasons={"no match": None}).reasons == ["no match"]


def test_a_layer_whose_cache_is_not_ours_to_write_is_not_fused(layers) -> None:
    layers["second"].problem = "SomeImpl has its own cache writer"
    found = judged(layers, updates=2, fused=2)
    assert (found.fused, found.reasons) == (0, ["SomeImpl has its own cache writer"])


@pytest.mark.parametrize("name", ["not_compiled_reason", "config_problem", "update_problem"])
def test_what_the_configuration_forbids(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("not_compiled_reason", "config_problem", "update_problem"):
        monkeypatch.setattr(config, each, lambda vllm_config, each=each: "because" if each == name else None)
    assert trial._config_problem(None) == "because"


def graph() -> fx.Graph:
    made = fx.Graph()
    made.output(made.call_function(UPDATE, (made.placeholder("x"),)))
    return made


def test_the_pass_is_recorded_and_the_compilation_ends_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = fusion.FusionResult(fused=0, reasons=["no match"], without_rope=1)
    monkeypatch.setattr(fusion, "fuse", lambda graph, ops: done)
    monkeypatch.setattr(passes, "defunctionalise", lambda graph: None)
    seen = trial._Seen()
    with trial._recording(seen, is_cut=False):
        assert fusion.fuse(graph(), SimpleNamespace(update=UPDATE)) is done
        assert not seen.complete
        with pytest.raises(trial._Traced):
            passes.defunctionalise(graph())
    assert (seen.updates, seen.fused, seen.complete) == (1, 0, True)
    assert list(seen.reasons) == ["no match", "no rotary embedding leads to the key that is cached"]


def test_a_pass_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: fx.Graph, ops: object) -> None:
        raise KeyError("node")

    monkeypatch.setattr(fusion, "fuse", fail)
    seen = trial._Seen()
    with trial._recording(seen, is_cut=True), pytest.raises(KeyError):
        fusion.fuse(graph(), SimpleNamespace(update=UPDATE))
    assert list(seen.reasons) == ["the pass failed: KeyError('node')"]


def test_an_adaptor_goes_on_after_a_traced_graph_only() -> None:
    def traced(*arguments: object) -> None:
        try:
            raise trial._Traced
        except trial._Traced as error:
            raise RuntimeError("backend compiler failed") from error

    def broken(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    compiled, handle = trial._until_traced(traced)("graph")
    assert (compiled("input"), handle) == (None, None)
    with pytest.raises(RuntimeError, match="out of memory"):
        trial._until_traced(broken)("graph")


def test_vllms_backend_is_where_the_trial_patches_it() -> None:
    from vllm.compilation import backends, compiler_interface

    assert callable(backends.VllmBackend.__call__)
    assert all(callable(getattr(compiler_interface, name).compile) for name in trial.ADAPTORS)
