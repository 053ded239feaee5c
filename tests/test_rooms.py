# SPDX-License-Identifier: Apache-2.0
"""The house: imports run one way, only `host` knows vLLM and its releases, and no file or function is long."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = "vllm_mla_fusion"
SOURCES = sorted((ROOT / "src" / OURS).rglob("*.py"))
DEVICE_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})
# From the bottom to the top: each may import itself and what stands before it, and all the package's own version.
LEAVES = ["release", "installation"]
ROOMS = ["fx", "jit", "activation", "arguments", "kernel", "identity", "host", "tools", "plugin"]
FLOORS = [*LEAVES, *ROOMS, "__main__", ""]
BOTTOM = {"fx", "jit"}
# Of vLLM's plugins, and of our logger below vLLM's.
PUBLIC_NAMES = {"vllm.general_plugins", "vllm.mla_fusion"}
LONGEST_FILE, LONGEST_FUNCTION = 320, 45


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    return name.removeprefix(OURS).removeprefix(".").split(".")[0]


MODULES = {*map(module, SOURCES)}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, inside functions too, and vLLM's that it names for a later import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports here are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inner)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"vllm(\.\w+)+", str(node.value)):
            yield from {node.value} - PUBLIC_NAMES


def test_imports_run_one_way_and_only_host_knows_vllm() -> None:
    wrong = []
    for path in SOURCES:
        here = room(module(path))
        assert here in FLOORS, f"{path}: on which floor?"
        below = {*LEAVES} if here in BOTTOM else {*FLOORS[: FLOORS.index(here)]}
        for name in imports(path):
            package = name.split(".")[0]
            if (package == OURS and room(name) not in below | {here, ""}) or (package == "vllm" and here != "host"):
                wrong.append(f"{module(path)} imports {name}")
    assert not wrong


def test_no_circle() -> None:
    """Among modules, imports inside functions included; raises CycleError with the circle."""
    graph = {module(path): {name for name in imports(path) if name in MODULES - {OURS}} for path in SOURCES}
    TopologicalSorter(graph).prepare()


def test_only_host_names_a_release() -> None:
    number = re.compile(r"(?<![\w.])v?0\.[2-9]\d(\.\d+)?(?![\w.])|vLLM v?\d")
    assert not [
        f"{module(path)}: {text}"
        for path in SOURCES
        if room(module(path)) != "host"
        for text in words(path)
        if number.search(text)
    ]


def words(path: Path) -> Iterator[str]:
    """Comments and strings of a file."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            # Python 3.12 has the text of an f-string as FSTRING_MIDDLE.
            if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
                yield token.string


@pytest.mark.parametrize("path", [*SOURCES, *DEVICE_SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_or_function_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    lengths = python_functions(path) if path.suffix == ".py" else device_functions(path)
    assert not {name: length for name, length in lengths if length > LONGEST_FUNCTION}


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def device_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Blocks behind an argument list that are no statement."""
    code = re.sub(r"//.*|^#(.*\\\n)*.*|\"(\\.|[^\"\\\n])*\"", "", path.read_text(), flags=re.MULTILINE)
    open_blocks, head = [], ""
    for part in re.findall(r"[{};]|[^{};]+", code):
        if part == "{":
            is_function = "(" in head and not re.match(r"(if|else|for|while|switch|do|return)\b|.*=\s*$", head.strip())
            open_blocks.append((head.strip(), is_function, 0))
        elif part == "}":
            head, is_function, length = open_blocks.pop()
            if is_function:
                yield head, length + head.count("\n") + 1
        open_blocks = [(name, is_it, count + part.count("\n")) for name, is_it, count in open_blocks]
        head = "" if part in "{};" else part
