# SPDX-License-Identifier: Apache-2.0
"""Runs the probe in the environments of several releases and puts the outcome into a table."""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import environments, limits
from .checkpoints import CHECKPOINTS
from .configurations import cases, cases_of, one_pass_cases
from .extent import Extent
from .models import DEEPSEEK_MTP, DEEPSEEK_V3
from .variants import IN_PLACE_NAME, SPARSE, all_variants, variants_of

HOOKS = "hooks"
# Up to here vLLM compiles DeepSeek-V3.2 and builds it from its MLA wrapper.
LAST_WITH_SPARSE = "0.28.0"
END_TO_END = Path(__file__).with_name("end_to_end.json")


@dataclass
class Outcome:
    """What the probe found for one release: the problems of each check, and its log if it ended early."""

    release: str
    checks: list[str]
    problems: dict[str, list[str]] = field(default_factory=dict)
    log: str = ""

    def passed(self, check: str) -> bool:
        return self.problems.get(check) == []

    def is_clean(self) -> bool:
        return all(map(self.is_as_known, self.checks))

    def is_as_known(self, check: str) -> bool:
        """Whether nothing is wrong, or what is known to be."""
        limit = limits.limit_of(self.release, check)
        if limit is None:
            return self.passed(check)
        return any(limit.shows in problem for problem in self.problems.get(check, []))

    def describe(self) -> str:
        """What is not as it is known to be, and the log of a probe that did not come to its end."""
        wrong = [check for check in self.checks if not self.is_as_known(check)]
        lines = [f"{check}: {problem}" for check in wrong for problem in self.problems.get(check, [])]
        lines += [f"{check}: fused now; take its limit away" for check in wrong if self.passed(check)]
        missing = [check for check in self.checks if check not in self.problems]
        if missing:
            lines += [f"no result for {len(missing)} checks, the first {missing[0]!r}; the end of the log:", self.log]
        return "\n".join(lines)


def compiles_sparse_mla(release: str) -> bool:
    order = list(environments.TORCH_OF_RELEASE)
    return order.index(release) <= order.index(LAST_WITH_SPARSE)


def checks_of(release: str, extent: Extent = Extent.ALL) -> list[str]:
    """What the probe of the release looks at, in this order."""
    sparse = [str(SPARSE)] if compiles_sparse_mla(release) else []
    bare = [HOOKS, *map(str, variants_of(release, extent)), IN_PLACE_NAME, *sparse]
    return [*bare, *map(str, cases_of(release, extent)), *one_pass_cases(release, extent)]


def run(
    releases: Iterable[str],
    graphs: Path | None = None,
    matching: str = "",
    extent: Extent = Extent.ALL,
    jobs: int = 1,
) -> Iterator[Outcome]:
    """Outcomes in the order of `releases`, of the checks whose names match; graphs as text go to `graphs`/release."""
    with tempfile.TemporaryDirectory(prefix="mla-fusion-matrix-") as folder:
        site = Path(folder) / "site"
        environments.install_plugins(site)

        def probe(release: str) -> Outcome:
            checks = [check for check in checks_of(release, extent) if check == HOOKS or re.search(matching, check)]
            return _probe(release, checks, site, Path(folder) / release, graphs)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(probe, releases)


def _probe(release: str, checks: list[str], site: Path, scratch: Path, graphs: Path | None) -> Outcome:
    options = ["--graphs", str(graphs.absolute() / release)] if graphs else []
    process = subprocess.run(
        [str(environments.python_of(release)), "-m", "tests.versions.probe", *options, *checks],
        cwd=environments.PLUGIN_ROOT,
        env=environments.environ_of(release, site, scratch),
        capture_output=True,
        text=True,
    )
    outcome = Outcome(release, checks, log=process.stderr[-4000:])
    for line in process.stdout.splitlines():
        if line.startswith('{"check"'):
            result = json.loads(line)
            outcome.problems[result["check"]] = result["problems"]
    return outcome


def columns() -> dict[str, set[str]]:
    """The table's columns of checks, and the names of those that each of them has."""
    deepseek = [case for case in cases() if case.model in (DEEPSEEK_V3, DEEPSEEK_MTP)]
    found = {"forms of RoPE": {str(variant) for variant in all_variants()}}
    for column in dict.fromkeys(each.column for each in CHECKPOINTS):
        found[column] = {str(case) for case in deepseek if case.checkpoint.column == column}
    found["other models"] = {str(case) for case in cases() if case not in deepseek}
    return found | {"sparse": {str(SPARSE)}}


def markdown_header() -> str:
    titles = ["vLLM", "torch", "hooks", *columns(), "end to end"]
    return f"{_row(titles)}\n{_row(['---'] * len(titles))}"


def markdown_row(outcome: Outcome) -> str:
    """One line of the support table: of how many of the checks that were run every layer was fused, with a letter for
    each limit in them; where whole engines ran, by `end_to_end.json`."""
    release = outcome.release
    engines = json.loads(END_TO_END.read_text())
    cells = [release, environments.TORCH_OF_RELEASE[release], "yes" if outcome.passed(HOOKS) else "no"]
    cells += [_cell(outcome, [check for check in outcome.checks if check in names]) for names in columns().values()]
    cells.append(", ".join(engines.get(release, [])))
    return _row(cells)


def _cell(outcome: Outcome, checks: list[str]) -> str:
    if not checks:
        return ""
    known = [limits.limit_of(outcome.release, check) for check in checks if not outcome.passed(check)]
    letters = sorted({f"({limits.letter_of(limit)})" for limit in known if limit is not None})
    return " ".join([f"{sum(map(outcome.passed, checks))}/{len(checks)}", *letters])


def markdown_reasons() -> str:
    """The reasons behind the letters of the table."""
    found = {
        limits.letter_of(limit): limit.reason
        for release in environments.TORCH_OF_RELEASE
        for check in checks_of(release)
        if (limit := limits.limit_of(release, check))
    }
    return "\n".join(f"- ({letter}) {found[letter]}." for letter in sorted(found))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
