# SPDX-License-Identifier: Apache-2.0
"""Runs the probe in the environments of several releases and puts the outcome into a table."""

import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.versions import environments
from tests.versions.variants import Variant, all_variants

COLUMNS = ["default native", "default _C op", "YaRN native", "YaRN FlashInfer op"]


@dataclass
class Outcome:
    """What the probe found for one release: the problems of each variant, and its log if it ended early."""

    release: str
    problems: dict[str, list[str]] = field(default_factory=dict)
    log: str = ""

    def missing(self) -> list[str]:
        return [str(variant) for variant in all_variants() if str(variant) not in self.problems]

    def is_clean(self) -> bool:
        return not self.missing() and not any(self.problems.values())

    def describe(self) -> str:
        lines = [f"{name}: {problem}" for name, problems in self.problems.items() for problem in problems]
        if self.missing():
            lines += [f"no result for {len(self.missing())} variants", self.log]
        return "\n".join(lines)


def run(releases: Iterable[str], graphs: Path | None = None) -> Iterator[Outcome]:
    """Outcomes in the order of `releases`; the graphs as text go to `graphs`/release if given."""
    with tempfile.TemporaryDirectory(prefix="mla-fusion-matrix-") as folder:
        site = Path(folder) / "site"
        environments.install_plugins(site)
        for release in releases:
            yield _probe(release, site, Path(folder) / release, graphs)


def _probe(release: str, site: Path, scratch: Path, graphs: Path | None) -> Outcome:
    options = ["--graphs", str(graphs.absolute() / release)] if graphs else []
    process = subprocess.run(
        [str(environments.python_of(release)), "-m", "tests.versions.probe", *options],
        cwd=environments.PLUGIN_ROOT,
        env=environments.environ_of(release, site, scratch),
        capture_output=True,
        text=True,
    )
    outcome = Outcome(release, log=process.stderr[-4000:])
    for line in process.stdout.splitlines():
        if line.startswith('{"variant"'):
            result = json.loads(line)
            outcome.problems[result["variant"]] = result["problems"]
    return outcome


def markdown_header() -> str:
    return _row(["vLLM", "torch", *COLUMNS]) + "\n" + _row(["---"] * (2 + len(COLUMNS)))


def markdown_row(outcome: Outcome) -> str:
    """One line of the support table: per form of RoPE, in how many variants every layer was fused."""
    cells = []
    for column in COLUMNS:
        variants = [variant for variant in all_variants() if variant.rope.name == column]
        clean = sum(_is_clean(outcome, variant) for variant in variants)
        cells.append(f"{clean}/{len(variants)}")
    return _row([outcome.release, environments.TORCH_OF_RELEASE[outcome.release], *cells])


def _is_clean(outcome: Outcome, variant: Variant) -> bool:
    return outcome.problems.get(str(variant)) == []


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
