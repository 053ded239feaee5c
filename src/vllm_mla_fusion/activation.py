# SPDX-License-Identifier: Apache-2.0
"""What the environment variable MLA_FUSION asks for."""

import enum
import os

VARIABLE = "MLA_FUSION"


class Mode(enum.Enum):
    """OFF changes nothing; ON fuses where it is safe and warns otherwise; STRICT raises where ON warns."""

    OFF = "0"
    ON = "1"
    STRICT = "strict"


def mode() -> Mode:
    """The mode of this process.

    Raises:
        ValueError: MLA_FUSION has another value than the accepted ones.
    """
    value = os.environ.get(VARIABLE, "").strip()
    try:
        return Mode(value or "0")
    except ValueError:
        raise ValueError(
            f"{VARIABLE} must be 0 or unset (off), 1 (fuse where it is safe) or strict (raise where it is not), "
            f"got {value!r}; set one of these or unset it"
        ) from None
