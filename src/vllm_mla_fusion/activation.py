# SPDX-License-Identifier: Apache-2.0
"""What the environment variable MLA_FUSION asks for."""

import enum
import os

VARIABLE = "MLA_FUSION"
NORM_VARIABLE = "MLA_FUSION_NORM"


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


class Norm(enum.Enum):
    """Whether the latent's RMSNorm joins the kernel: where it is a kernel of its own, wherever possible, or not."""

    AUTO = "auto"
    ALWAYS = "1"
    NEVER = "0"


def norm() -> Norm:
    """What MLA_FUSION_NORM asks for.

    Raises:
        ValueError: it has another value than the accepted ones.
    """
    value = os.environ.get(NORM_VARIABLE, "").strip()
    try:
        return Norm(value or "auto")
    except ValueError:
        raise ValueError(
            f"{NORM_VARIABLE} must be auto or unset (fuse the norm where that wins), 1 (wherever possible) or 0 "
            f"(never), got {value!r}; set one of these or unset it"
        ) from None
