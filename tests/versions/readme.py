# SPDX-License-Identifier: Apache-2.0
"""The support table of tests/README.md: the matrix's own table between two comments, and the reasons under it."""

from collections.abc import Iterable

from . import environments, matrix

README = environments.PLUGIN_ROOT / "tests/README.md"
BEGIN = "<!-- by `python -m tests.versions --readme` -->\n"
END = "<!-- end of the table -->\n"


def write(outcome: matrix.Outcome) -> None:
    """Puts the row of this outcome into the table of tests/README.md; those of other releases stay.

    Raises:
        ValueError: it has not both comments.
    """
    before, old, after = _parts()
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| 0.")}
    rows[outcome.release] = matrix.markdown_row(outcome)
    README.write_text(f"{before}{BEGIN}{_table(rows)}{END}{after}")


def current_table() -> str:
    """The table that tests/README.md has."""
    return _parts()[1]


def table(outcomes: Iterable[matrix.Outcome]) -> str:
    return _table({outcome.release: matrix.markdown_row(outcome) for outcome in outcomes})


def _table(rows: dict[str, str]) -> str:
    ordered = [rows[release] for release in environments.TORCH_OF_RELEASE if release in rows]
    return "\n".join([matrix.markdown_header(), *ordered, "", matrix.markdown_reasons()]) + "\n"


def _parts() -> tuple[str, str, str]:
    before, begin, rest = README.read_text().partition(BEGIN)
    content, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} needs the lines {BEGIN!r} and {END!r} around the support table; put them back")
    return before, content, after
