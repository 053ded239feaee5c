# SPDX-License-Identifier: Apache-2.0
"""A graph as text, from which it can be built again: nodes, arguments, and of each value what a FakeTensor knows.

JSON with one node in a line. No weights: graphs hold shapes only. Reading runs nothing that the text names but ops.
"""

from __future__ import annotations

import json
import math
import operator
import re
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions

_HINT_OF_UNKNOWN = 7
_EXPRESSION = re.compile(r"[\w\s+\-*/(),]*")
_TORCH_TYPES = (torch.dtype, torch.layout, torch.memory_format)
_SCHEMA_TYPE = re.compile(r"\b(?:PyObject|__torch__[\w.]*)(?= )")


def write(graph: fx.Graph) -> str:
    """The graph as JSON text."""
    writer = _Writer()
    nodes = [json.dumps(writer.node(node)) for node in graph.nodes]
    head = json.dumps({"torch": torch.__version__, "symbols": writer.symbols, "schemas": writer.schemas})
    body = ",\n".join(nodes)
    return f'{head[:-1]}, "nodes": [\n{body}\n]}}'


def read(text: str) -> fx.Graph:
    """The graph that was written, on FakeTensors of one mode; ops that are not registered here become stand-ins.

    Raises:
        ValueError: the text is no graph, or names something that is no op.
    """
    try:
        return _Reader(json.loads(text)).graph()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no graph that fx.dump has written: {error!r}") from error


class _Writer:
    def __init__(self) -> None:
        self.symbols: dict[str, int] = {}
        self.schemas: dict[str, str] = {}
        self._storages: dict[int, int] = {}
        # Storages are told apart by address: none may be given back, and its address taken by another, meanwhile.
        self._kept: list[Any] = []

    def node(self, node: fx.Node) -> dict[str, Any]:
        return {
            "name": node.name,
            "op": node.op,
            "target": node.target if isinstance(node.target, str) else self._target(node.target),
            "args": self.value(node.args),
            "kwargs": self.value(node.kwargs),
            "val": self.value(node.meta.get("val")),
        }

    def _target(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            self.schemas.setdefault(str(target), str(target._schema))
            return str(target)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return f"higher_order.{target.name()}"
        return f"{target.__module__.lstrip('_')}.{target.__qualname__}"

    def value(self, value: Any) -> Any:
        """As JSON: what JSON does not know is an object with the name of its kind."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(value)
        if isinstance(value, (list, tuple)):
            items = [self.value(each) for each in value]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, dict):
            return {"dict": {str(name): self.value(each) for name, each in value.items()}}
        if isinstance(value, slice):
            return {"slice": [self.value(each) for each in (value.start, value.stop, value.step)]}
        if isinstance(value, _TORCH_TYPES):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
            return {"target": self._target(value)}
        return {"opaque": f"{type(value).__name__}: {value}"[:200]}

    def _tensor(self, value: torch.Tensor) -> dict[str, Any]:
        storage = value.untyped_storage()
        self._kept.append(storage)
        return {
            "dtype": self.value(value.dtype),
            "shape": [self.value(size) for size in value.shape],
            "stride": [self.value(stride) for stride in value.stride()],
            "offset": self.value(value.storage_offset()),
            "device": str(value.device),
            "storage": self._storages.setdefault(storage._cdata, len(self._storages)),
            "nbytes": self.value(storage.nbytes()),
        }

    def _symbolic(self, value: Any) -> Any:
        expression, environment = value.node.expr, value.node.shape_env
        if not expression.free_symbols:
            return int(expression) if isinstance(value, torch.SymInt) else str(expression)
        # Renamed in torch 2.13.
        hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
        for symbol in expression.free_symbols:
            hint = hints.get(symbol, _HINT_OF_UNKNOWN)
            self.symbols[str(symbol)] = int(hint)
        return {"sym": str(expression)}


class _Reader:
    def __init__(self, text: dict[str, Any]) -> None:
        self._text = text
        self._environment = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._environment, allow_non_fake_inputs=True)
        self._symbols = {name: self._symbol(name, hint) for name, hint in text["symbols"].items()}
        self._hints = {self._symbols[name]: hint for name, hint in text["symbols"].items()}
        self._storages: dict[int, torch.Tensor] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._libraries: list[torch.library.Library] = []

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        # Passes may have left uses before definitions: all nodes first, then what they read.
        for line in self._text["nodes"]:
            target = self._target(line["target"]) if line["op"] == "call_function" else line["target"]
            self._nodes[line["name"]] = graph.create_node(line["op"], target, name=line["name"])
        for line in self._text["nodes"]:
            node = self._nodes[line["name"]]
            node.args, node.kwargs = self._value(line["args"]), self._value(line["kwargs"])
            if line["val"] is not None:
                node.meta["val"] = self._value(line["val"])
        # Stand-ins live as long as the graph that calls them.
        graph._mla_fusion_libraries = self._libraries
        return graph

    def _symbol(self, name: str, hint: int) -> Any:
        return self._environment.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)

    def _target(self, name: str) -> Any:
        if name == "operator.getitem":
            return operator.getitem
        home, _, rest = name.partition(".")
        if home in ("operator", "math"):
            return getattr({"operator": operator, "math": math}[home], rest)
        if home == "higher_order":
            return getattr(torch.ops.higher_order, rest)
        packet, _, overload = rest.partition(".")
        try:
            return getattr(getattr(getattr(torch.ops, home), packet), overload)
        except AttributeError:
            schema = self._text["schemas"].get(name)
            if schema is None:
                raise ValueError(f"{name} is no op") from None
        library = torch.library.Library(home, "FRAGMENT")
        self._libraries.append(library)
        library.define(_SCHEMA_TYPE.sub("str", schema.partition("::")[2]))
        return getattr(getattr(getattr(torch.ops, home), packet), overload)

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        return getattr(self, f"_{kind}")(inner)

    def _node(self, name: str) -> fx.Node:
        return self._nodes[name]

    def _tuple(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(self._value(each) for each in items)

    def _dict(self, items: dict[str, Any]) -> dict[str, Any]:
        return {name: self._value(each) for name, each in items.items()}

    def _slice(self, parts: list[Any]) -> slice:
        return slice(*self._tuple(parts))

    def _torch(self, name: str) -> Any:
        found = getattr(torch, name)
        if not isinstance(found, _TORCH_TYPES):
            raise ValueError(f"torch.{name} is no dtype, layout or memory format")
        return found

    def _device(self, name: str) -> torch.device:
        return torch.device(name)

    def _opaque(self, text: str) -> str:
        return text

    def _sym(self, text: str) -> Any:
        known = {name: getattr(functions, name) for name in functions.__all__}
        names = set(re.findall(r"[A-Za-z_]\w*", text))
        if not _EXPRESSION.fullmatch(text) or not names <= known.keys() | self._symbols.keys():
            raise ValueError(f"{text!r} is no expression of the graph's symbols")
        expression = sympy.sympify(text, locals={**known, **self._symbols})
        hint = int(expression.subs(self._hints))
        return self._environment.create_symintnode(expression, hint=hint) if expression.free_symbols else hint

    def _tensor(self, value: dict[str, Any]) -> torch.Tensor:
        dtype = self._value(value["dtype"])
        shape, stride = self._value(value["shape"]), self._value(value["stride"])
        with self._mode:
            base = self._storages.get(value["storage"])
            if base is None:
                base = torch.empty([self._value(value["nbytes"])], dtype=torch.uint8, device=value["device"])
                self._storages[value["storage"]] = base
            return torch.as_strided(base.view(dtype), shape, stride, self._value(value["offset"]))
