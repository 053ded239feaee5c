# SPDX-License-Identifier: Apache-2.0
"""Runs `engine_run.py`, a whole vLLM engine on tiny-mla, in a process of its own.

Without a GPU that is a fork, unless a test asks for more, of one that has imported vLLM as a server does first, before
any plugin: the import takes ten seconds of a core, and most tests ask nothing of it. A fork's log is without what vLLM
says when imported, and a fork ends without an interpreter's last steps.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("engine_run.py")
FORKS = multiprocessing.get_context("forkserver")
# What Python and vLLM read when they start: a fork would have it from the process that has imported vLLM.
READ_AT_IMPORT = {"PYTHONPATH", "VLLM_LOGGING_LEVEL"}
FUSED = "6 of 6 MLA layers fused"
# A slow machine takes a quarter of it; one that hangs shall not take CI's whole time.
TIMEOUT_SECONDS = 1200


@dataclass
class Run:
    returncode: int
    log: str
    result: dict[str, Any]

    def plugin_lines(self, level: str = "") -> list[str]:
        """What the plugin logged, of one level if given."""
        return [line for line in self.log.splitlines() if "MLA fusion" in line and level in line]


def run(
    mode: str,
    cache: Path,
    in_process: bool = False,
    as_users_do: bool = False,
    environ: dict[str, str] | None = None,
    python: str | Path = sys.executable,
    **spec: Any,
) -> Run:
    """Runs an engine with MLA_FUSION=`mode` and all of vLLM's and Inductor's caches in `cache`.

    Args:
        mode: empty: the variable is not set.
        in_process: the engine's core runs in the script's process.
        as_users_do: in an interpreter of its own, and on a CPU compiled as vLLM does it by default.
        environ: further variables.
        python: interpreter whose vLLM is run.
        spec: what `engine_run.py` is asked for.
    """
    # Of this run alone: others may run beside it over the same cache.
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
    spec_file, result_file, log_file = folder / "spec.json", folder / "result.json", folder / "log.txt"
    spec_file.write_text(json.dumps(spec))
    environment = {
        **os.environ,
        # vLLM writes its graphs where others may be reading them.
        "VLLM_CACHE_ROOT": str(cache / f"vllm-{os.environ.get('PYTEST_XDIST_WORKER', '')}"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
    }
    environment.pop("MLA_FUSION", None)
    if mode:
        environment["MLA_FUSION"] = mode
    environment |= environ or {}
    if not as_users_do and can_be_forked(python, environ or {}):
        # vllm-cpu 0.32 cannot load what it has compiled ahead of time, and compiles again; graphs come from its cache.
        environment["VLLM_USE_AOT_COMPILE"] = "0"
        returncode = fork_to_its_end(spec_file, result_file, environment, log_file)
    else:
        command = [str(python), str(SCRIPT), str(spec_file), str(result_file)]
        returncode = run_to_its_end(command, environment, log_file)
    result = json.loads(result_file.read_text()) if result_file.exists() else {}
    return Run(returncode, log_file.read_text(errors="replace"), result)


def can_be_forked(python: str | Path, environ: dict[str, str]) -> bool:
    return str(python) == sys.executable and not READ_AT_IMPORT & environ.keys() and not torch.cuda.is_available()


def fork_to_its_end(spec_file: Path, result_file: Path, environment: dict[str, str], log_file: Path) -> int:
    """Runs `engine_run.main` in a fork of the process with vLLM and ends whatever it leaves behind."""
    FORKS.set_forkserver_preload(["vllm.entrypoints.llm"])
    process = FORKS.Process(target=_in_a_fork, args=(spec_file, result_file, environment, log_file))
    process.start()

    def wait(seconds: float | None) -> int | None:
        process.join(seconds)
        return process.exitcode

    return _to_its_end(process, wait, log_file)


def _in_a_fork(spec_file: Path, result_file: Path, environment: dict[str, str], log_file: Path) -> None:
    os.setsid()
    with log_file.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    import engine_run  # in the path of tests, not of those who run other interpreters

    engine_run.main(spec_file, result_file)


def run_to_its_end(command: list[str], environment: dict[str, str], log_file: Path, folder: Path | None = None) -> int:
    """Runs a command and ends whatever it leaves behind: workers of a failed engine keep their memory and the GPU's."""
    with log_file.open("w") as log:
        # Into a file: workers that are left would keep a pipe open.
        script = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)

    def wait(seconds: float | None) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return script.wait(seconds)
        return None

    return _to_its_end(script, wait, log_file)


def _to_its_end(process: Any, wait: Callable[[float | None], int | None], log_file: Path) -> int:
    """The code with which a process ends, in time or by force, as all of its session then does."""
    try:
        code = wait(TIMEOUT_SECONDS)
        if code is None:
            with log_file.open("a") as log:
                log.write(f"\nno end after {TIMEOUT_SECONDS} s\n")
            return -signal.SIGKILL
        return code
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        wait(None)
