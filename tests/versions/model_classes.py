# SPDX-License-Identifier: Apache-2.0
"""Which architectures of a release have MLA layers made by vLLM's wrapper, read from its sources."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

WRAPPER = ("vllm.model_executor.layers.mla", "MultiHeadLatentAttentionWrapper")
MODELS = "vllm.model_executor.models"

Name = tuple[str, str]


def architectures(root: Path) -> dict[str, str]:
    """Those in the registry of the release under `root`, with the module of each, whose class builds the wrapper, by
    whatever other classes, or names an architecture that does."""
    registered = _registered(root)
    uses = _uses(root)
    found: set[Name] = {WRAPPER}
    known: set[str] = set()
    while True:
        meant = found | {("", name) for name in known}
        more = {name for name, used in uses.items() if name not in found and not used.isdisjoint(meant)}
        architectures = {each for each, name in registered.items() if name in found | more}
        if not more and architectures == known:
            return {each: registered[each][0] for each in sorted(known)}
        found |= more
        known = architectures


def _registered(root: Path) -> dict[str, Name]:
    """(module, class) of each architecture in the registry's dicts."""
    found = {}
    for node in ast.walk(_parse(root / "vllm/model_executor/models/registry.py")):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                module, name = (element.value for element in value.elts if isinstance(element, ast.Constant))
                found[key.value] = (module if "." in module else f"{MODELS}.{module}", name)
    return found


def _uses(root: Path) -> dict[Name, set[Name]]:
    """What the body of each class and function names: things of its module, imported ones, and strings."""
    uses: dict[Name, set[Name]] = {}
    for folder in ("vllm/model_executor/models", "vllm/models"):
        for path in (root / folder).rglob("*.py"):
            relative = path.relative_to(root).with_suffix("")
            module = ".".join(relative.parts[:-1] if relative.name == "__init__" else relative.parts)
            package = module if relative.name == "__init__" else module.rpartition(".")[0]
            uses |= _uses_of_module(_parse(path), module, package)
    return uses


def _uses_of_module(tree: ast.Module, module: str, package: str) -> dict[Name, set[Name]]:
    imported = dict(_imported(tree, package))
    definitions = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    names = {node.name: (module, node.name) for node in definitions}
    # A package that only hands a class on.
    uses: dict[Name, set[Name]] = {(module, name): {source} for name, source in imported.items()}
    for definition in definitions:
        uses[module, definition.name] = used = set()
        for node in ast.walk(definition):
            if isinstance(node, ast.Name) and node.id in imported | names:
                used.add((imported | names)[node.id])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(("", node.value))
        used.discard((module, definition.name))
    return uses


def _imported(tree: ast.Module, package: str) -> Iterator[tuple[str, Name]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield alias.asname or alias.name, (module, alias.name)


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
