# SPDX-License-Identifier: Apache-2.0
"""tests/README.md claims what the matrix finds when all is well, for every release of the matrix."""

import pytest

from . import environments, limits, matrix, readme
from .extent import Extent

# Which model classes a release has is read from its wheel.
pytestmark = pytest.mark.versions


def clean(release: str) -> matrix.Outcome:
    checks = matrix.checks_of(release, Extent.TABLE)
    known = {check: limits.limit_of(release, check) for check in checks}
    return matrix.Outcome(release, checks, {check: [limit.shows] if limit else [] for check, limit in known.items()})


def test_table_of_the_readme() -> None:
    """The rows that are there: none claims what was not run."""
    table = readme.current_table()
    releases = [release for release in environments.TORCH_OF_RELEASE if f"| {release} |" in table]
    assert table == (readme.table(map(clean, releases)) if releases else "")


def test_a_problem_shows_in_the_table() -> None:
    outcome = clean("0.26.0")
    row = matrix.markdown_row(outcome)
    outcome.problems[outcome.checks[1]] = ["a problem"]
    assert not outcome.is_clean()
    assert matrix.markdown_row(outcome) != row
