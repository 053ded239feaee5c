# SPDX-License-Identifier: Apache-2.0
"""The support table of tests/README.md: the matrix's own table between two comments, and the reasons under it."""

from collections.abc import Iterable

from . import environments, matrix

README = environments.PLUGIN_ROOT / "tests/README.md"
BEGIN = "<!-- by `python -m tests.versions --readme` -->\n"
END = "<!-- end of the table -->\n"


def write(outcomes: Iterable[matrix.Outcome]) -> None:
    """Puts the table of these outcomes into tests/README.md.

    Raises:
        ValueError: it has not both comments.
    """
    before, _, after = _parts()
    README.write_text(f"{before}{BEGIN}{table(outcomes)}{END}{after}")


def current_table() -> str:
    """The table that tests/README.md has."""
    return _parts()[1]


def table(outcomes: Iterable[matrix.Outcome]) -> str:
    outcomes = list(outcomes)
    lines = [matrix.markdown_header(), *map(matrix.markdown_row, outcomes)]
    return "\n".join([*lines, "", matrix.markdown_reasons(outcomes)]) + "\n"


def _parts() -> tuple[str, str, str]:
    before, begin, rest = README.read_text().partition(BEGIN)
    content, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} needs the lines {BEGIN!r} and {END!r} around the support table; put them back")
    return before, content, after
