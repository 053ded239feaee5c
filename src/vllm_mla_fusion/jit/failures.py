# SPDX-License-Identifier: Apache-2.0
"""A failed build is told to the other processes of the same start instead of being repeated by each of them."""

import contextlib
import json
import os
import time
from pathlib import Path

from vllm_mla_fusion.jit.cache import FAILURE_LOG, host_name
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.explain import compile_error


def failure_log(final: Path) -> Path:
    """Where the output of the failed build of ``final`` lies."""
    return final.with_name(f"{final.name}{FAILURE_LOG}")


def remember(final: Path, output: str, fault: str | None) -> BuildError:
    """Writes down what the build said and that it was this process's; returns the error for people."""
    log = failure_log(final)
    with contextlib.suppress(OSError):
        log.write_text(json.dumps({**_process(os.getpid()), "fault": fault}) + "\n" + output)
    return compile_error(output, log, fault)


def raise_known(final: Path, waited_since: float | None, lasts: float) -> None:
    """Reports a failure that this process waited for, or that is young and whose process still lives.

    Once that has ended this is another start, before which the cause may have gone.
    """
    log, now = failure_log(final), time.time()
    try:
        failed, (head, _, output) = log.stat().st_mtime, log.read_text(errors="replace").partition("\n")
        record = json.loads(head)
        lives = record == {**_process(record["pid"]), "fault": record["fault"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    waited = waited_since is not None and waited_since <= failed
    if waited or (lives and now - lasts <= failed < now):
        error = compile_error(output, log, record["fault"])
        raise BuildError(error.problem, f"{error.remedy} `vllm-mla-fusion build` tries again at once.")


def _process(pid: int) -> dict[str, object]:
    """What tells a process of this host from all others, later ones of the same number included."""
    try:
        # The name, in parentheses, may have spaces.
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = None
    return {"host": host_name(), "pid": pid, "began": began}
