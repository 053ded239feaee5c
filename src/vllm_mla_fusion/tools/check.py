# SPDX-License-Identifier: Apache-2.0
"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "untried", "problem"]


@dataclass(frozen=True)
class Check:
    """What was found.

    Args:
        name: What was looked at.
        status: ``"problem"`` makes the doctor's exit code 1; ``"untried"`` claims nothing, since it could not be tried;
            ``"note"`` deserves a look.
        detail: What was found.
        remedy: What to do; set for every problem.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
