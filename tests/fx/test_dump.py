# SPDX-License-Identifier: Apache-2.0
"""A graph that is written and read again is the same, with symbols, shared storage and ops that are not registered."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_mla_fusion.fx import dump


def layer(hidden, weight):
    rows = (hidden @ weight).view(hidden.shape[0], 3, 4)
    halves = rows[..., 2:].to(torch.float32).split([1, 1], -1)
    return rows, halves[1] * float("inf"), torch.ops.aten.sym_size.int(hidden, 0)


def traced() -> fx.Graph:
    tensors = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(8, 12, dtype=torch.bfloat16)
    return make_fx(layer, tracing_mode="symbolic")(*tensors).graph


def lines(text: str) -> str:
    """The text with symbols by order of their first use: those of another graph have other names."""
    names: dict[str, str] = {}
    return re.sub(r"\bs\d+\b", lambda found: names.setdefault(found[0], f"n{len(names)}"), text)


def test_round_trip() -> None:
    text = dump.write(traced())
    again = dump.read(text)
    assert lines(dump.write(again)) == lines(text)
    again.lint()
    json.loads(text)


def test_storage_is_shared_as_it_was() -> None:
    graph, again = traced(), dump.read(dump.write(traced()))

    def sharing(of: fx.Graph) -> list[bool]:
        values = [node.meta["val"] for node in of.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        storages = [value.untyped_storage()._cdata for value in values]
        return [first == second for first in storages for second in storages]

    assert sharing(again) == sharing(graph)
    assert sum(sharing(graph)) > len(graph.nodes)


def test_uses_before_definitions() -> None:
    text = dump.write(traced())
    head, *nodes = text.split("\n")
    body = [line.rstrip(",") for line in nodes[:-1]]
    random.Random(0).shuffle(body)
    again = dump.read("\n".join([head, ",\n".join(body), nodes[-1]]))
    assert {node.name for node in again.nodes} == {node.name for node in traced().nodes}


def test_op_that_is_not_registered_here() -> None:
    text = (
        dump.write(traced())
        .replace("aten.mm.default", "of_nobody.mm.default")
        .replace("aten::mm(Tensor self, Tensor mat2)", "of_nobody::mm(Tensor self, Tensor mat2, PyObject name)")
    )
    again = dump.read(text)
    (call,) = [node for node in again.nodes if "of_nobody" in str(node.target)]
    assert str(call.target._schema) == "of_nobody::mm(Tensor self, Tensor mat2, str name) -> Tensor"


@pytest.mark.parametrize(
    "change",
    [
        ("aten.mm.default", "os.system"),
        ('{"torch": "bfloat16"}', '{"torch": "load"}'),
        ('"offset": 0', '"offset": {"sym": "__import__(1)"}'),
        ('"nodes"', '"others"'),
    ],
)
def test_text_that_is_no_graph(change: tuple[str, str]) -> None:
    text = dump.write(traced())
    head, body = text.split('"nodes"')
    with pytest.raises(ValueError):  # noqa: PT011
        dump.read(
            f'{head}"nodes"{body}'.replace(*change)
            if change[0] != "aten.mm.default"
            else head + f'"nodes"{body}'.replace(*change)
        )
