# SPDX-License-Identifier: Apache-2.0
"""How much of the matrix is run."""

from enum import Enum


class Extent(Enum):
    """`ALL` takes hours; `TABLE` has each form of checkpoint, RoPE and model class, for the table of tests/README.md;
    `QUICK` is for CI, which runs it for the two releases of `CI_RELEASES`: each has its part of what there is."""

    ALL = "all"
    TABLE = "table"
    QUICK = "quick"


# The last release with torch 2.11, and the newest.
CI_RELEASES = ("0.26.0", "0.33.0")
