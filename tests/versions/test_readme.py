# SPDX-License-Identifier: Apache-2.0
"""tests/README.md claims what the matrix finds when all is well, for every release of the matrix."""

from . import environments, limits, matrix, readme
from .variants import all_variants


def clean(release: str) -> matrix.Outcome:
    checks = matrix.checks_of(release)
    known = {check: limits.limit_of(release, check) for check in checks}
    return matrix.Outcome(release, checks, {check: [limit.shows] if limit else [] for check, limit in known.items()})


def test_table_of_the_readme() -> None:
    """The rows that are there: a run of every release takes hours, and none claims what was not run."""
    table = readme.current_table()
    releases = [release for release in environments.TORCH_OF_RELEASE if f"| {release} |" in table]
    assert table == (readme.table(map(clean, releases)) if releases else "")


def test_a_problem_shows_in_the_table() -> None:
    outcome = clean("0.26.0")
    row = matrix.markdown_row(outcome)
    outcome.problems[str(all_variants()[0])] = ["a problem"]
    assert not outcome.is_clean()
    assert matrix.markdown_row(outcome) != row
