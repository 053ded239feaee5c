# SPDX-License-Identifier: Apache-2.0
"""Why a vLLM process failed: `python examples/_cause.py LOG` prints the errors in its log, without the tracebacks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# vLLM puts the process, and the level with time and place, before a line.
PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|CRITICAL|WARNING|INFO) [^\]]*\] )?")
ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Exit|Interrupt|Failed)\b(?:: .*)?$|^\S+: error: ")
# They say that another process has failed, which tells its error itself.
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "WorkerProc initialization failed")
MOST, FOLLOWING = 4, 3


def cause(log: Path) -> str:
    """The errors in a log, each once and with the lines that belong to it; its last lines if it has none."""
    lines = [PREFIX.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    found: dict[str, None] = {}
    for number, line in enumerate(lines):
        if ERROR.match(line) and not any(word in line for word in CONSEQUENCES):
            found["\n".join([line, *_belonging(lines[number + 1 :])])] = None
    return "\n".join(list(found)[:MOST]) if found else "\n".join(lines[-25:])


def _belonging(lines: list[str]) -> list[str]:
    """The indented lines with which an error goes on, as pydantic's do."""
    result = []
    for line in lines[:FOLLOWING]:
        if not re.match(r"\s+\S", line) or re.match(r"\s+(File \"|raise |\^)", line):
            break
        result.append(line)
    return result


if __name__ == "__main__":
    print(cause(Path(sys.argv[1])))
