# SPDX-License-Identifier: Apache-2.0
"""A failure of the pass as a file that its user can send: the graph, the traceback and what doctor knows."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import fx

from vllm_mla_fusion import __version__, activation
from vllm_mla_fusion.fx import dump
from vllm_mla_fusion.fx.transaction import sort
from vllm_mla_fusion.jit import cache

FOLDER = "pass-failures"
# Graphs of a whole model have tens of megabytes, and a twentieth of them when packed.
PLAIN_BYTES = 2_000_000
_facts: list[Callable[[], Any]] = []


class PassFailedError(RuntimeError):
    """MLA_FUSION=strict and the pass failed on a graph."""


def facts_from(facts: Callable[[], Any]) -> None:
    """Where the report of `doctor --json` comes from, in whose room this one must not look."""
    _facts[:] = [facts]


def copy_of(graph: fx.Graph) -> fx.Graph | None:
    """The graph as it is now, sorted, for a report on what will be tried with it; None if it cannot be copied."""
    copied = fx.Graph()
    try:
        sort(graph)
        copied.output(copied.graph_copy(graph, {}))
    except Exception:
        return None
    return copied


def pass_failed(what: str, error: Exception, graph: fx.Graph) -> None:
    """Warns of a defect of ours, with the file to send.

    Args:
        what: the failure and what follows from it, as the beginning of a sentence.
        graph: as it was before the failure, as far as that could be kept.

    Raises:
        PassFailedError: in strict mode.
    """
    words = f"{what} ({error!r}). This is a defect of vllm-mla-fusion: {_request(error, graph)}"
    if activation.mode() is activation.Mode.STRICT:
        raise PassFailedError(f"MLA_FUSION=strict, but {words}, and set MLA_FUSION=1 or 0 until then.") from error
    activation.logger.warning("MLA fusion: %s.", words, exc_info=error)


def _request(error: Exception, graph: fx.Graph) -> str:
    try:
        return f"please report it with the file {_write(error, graph)} (shapes and op names, no weights)"
    except Exception as problem:
        return f"please report it with this log; its graph could not be written ({problem})"


def read(path: Path) -> tuple[dict[str, Any], fx.Graph]:
    """(facts, graph) of a file that a failure left.

    Raises:
        ValueError: it is no such file.
    """
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    report = json.loads(text)
    graph = json.dumps(report.pop("graph", None))
    return report, dump.read(graph)


def _write(error: Exception, graph: fx.Graph) -> Path:
    """One file for each place and kind of failure: later ones of the same kind are only named."""
    frame = traceback.extract_tb(error.__traceback__)[-1:] if error.__traceback__ else []
    place = [f"{Path(each.filename).name}:{each.name}" for each in frame]
    name = hashlib.sha256(repr([__version__, type(error).__name__, *place]).encode()).hexdigest()[:12]
    folder = cache.make_private(cache.cache_dir()) / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in (folder / f"{name}.json", folder / f"{name}.json.gz"):
        if path.exists():
            return path
    report = {
        "plugin": __version__,
        "reason": repr(error),
        "traceback": "".join(traceback.format_exception(error)),
        "doctor": _doctor(),
    }
    text = json.dumps(report, indent=1, default=str)
    data = f'{text[:-2]},\n "graph": {dump.write(graph)}\n}}'.encode()
    is_large = len(data) > PLAIN_BYTES
    path = folder / f"{name}.json{'.gz' if is_large else ''}"
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(gzip.compress(data) if is_large else data)
    draft.replace(path)
    return path


@functools.cache
def _doctor() -> Any:
    try:
        return _facts[0]() if _facts else None
    except Exception as error:
        return f"doctor failed: {error!r}"
