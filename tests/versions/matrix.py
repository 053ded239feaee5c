# SPDX-License-Identifier: Apache-2.0
"""Runs the probe in the environments of several releases and puts the outcome into a table."""

import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import environments
from .variants import IN_PLACE_NAME, ROPES, SPARSE, all_variants

HOOKS = "hooks"
# Up to here vLLM compiles DeepSeek-V3.2 and builds it from its MLA wrapper.
LAST_WITH_SPARSE = "0.28.0"
END_TO_END = Path(__file__).with_name("end_to_end.json")


@dataclass
class Outcome:
    """What the probe found for one release: the problems of each check, and its log if it ended early."""

    release: str
    problems: dict[str, list[str]] = field(default_factory=dict)
    log: str = ""

    def passed(self, check: str) -> bool:
        return self.problems.get(check) == []

    def is_clean(self) -> bool:
        return all(map(self.passed, checks_of(self.release)))

    def describe(self) -> str:
        """The problems, a line each, and the log of a probe that did not come to its end."""
        lines = [f"{check}: {problem}" for check, problems in self.problems.items() for problem in problems]
        missing = [check for check in checks_of(self.release) if check not in self.problems]
        if missing:
            lines += [f"no result for {len(missing)} checks; the end of the log:", self.log]
        return "\n".join(lines)


def compiles_sparse_mla(release: str) -> bool:
    order = list(environments.TORCH_OF_RELEASE)
    return order.index(release) <= order.index(LAST_WITH_SPARSE)


def checks_of(release: str) -> list[str]:
    """What the probe of the release must have found no problem with."""
    return [HOOKS, *map(str, all_variants()), IN_PLACE_NAME, *([str(SPARSE)] if compiles_sparse_mla(release) else [])]


def run(releases: Iterable[str], graphs: Path | None = None) -> Iterator[Outcome]:
    """Outcomes in the order of `releases`; the graphs as text go to `graphs`/release if given."""
    with tempfile.TemporaryDirectory(prefix="mla-fusion-matrix-") as folder:
        site = Path(folder) / "site"
        environments.install_plugins(site)
        for release in releases:
            yield _probe(release, site, Path(folder) / release, graphs)


def _probe(release: str, site: Path, scratch: Path, graphs: Path | None) -> Outcome:
    options = ["--graphs", str(graphs.absolute() / release)] if graphs else []
    options += ["--sparse"] if compiles_sparse_mla(release) else []
    process = subprocess.run(
        [str(environments.python_of(release)), "-m", "tests.versions.probe", *options],
        cwd=environments.PLUGIN_ROOT,
        env=environments.environ_of(release, site, scratch),
        capture_output=True,
        text=True,
    )
    outcome = Outcome(release, log=process.stderr[-4000:])
    for line in process.stdout.splitlines():
        if line.startswith('{"check"'):
            result = json.loads(line)
            outcome.problems[result["check"]] = result["problems"]
    return outcome


def markdown_header() -> str:
    titles = ["vLLM", "torch", "hooks", *(rope.name for rope in ROPES), "sparse", "end to end"]
    return f"{_row(titles)}\n{_row(['---'] * len(titles))}"


def markdown_row(outcome: Outcome) -> str:
    """One line of the support table: per form of RoPE, in how many variants every layer was fused; where whole engines
    ran, by `end_to_end.json`."""
    engines = json.loads(END_TO_END.read_text())
    cells = [outcome.release, environments.TORCH_OF_RELEASE[outcome.release], "yes" if outcome.passed(HOOKS) else "no"]
    for rope in ROPES:
        variants = [str(variant) for variant in all_variants() if variant.rope == rope]
        cells.append(f"{sum(map(outcome.passed, variants))}/{len(variants)}")
    cells.append(f"{outcome.passed(str(SPARSE)):d}/1" if compiles_sparse_mla(outcome.release) else "")
    cells.append(", ".join(engines.get(outcome.release, [])))
    return _row(cells)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
