# SPDX-License-Identifier: Apache-2.0
"""What becomes of a test whose needs are not there, which tests are light, and how they are spread over processes."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Generator
from itertools import chain, zip_longest
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker and its engines, on whichever core is free, before torch starts more: small tensors
    # gain nothing from two, and lose much where threads of a team wait for one that has no core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
import torch
from engine_run import MODEL

COMPILE_ONCE = Path(__file__).parent / "engine" / "compile_once"
# Set by .ci/run: what would be skipped fails, unless it needs a GPU.
LEAVE_NONE_OUT = os.environ.get("MLA_TEST_LEAVE_NONE_OUT") == "1"


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA or ROCm GPU"


def _no_model() -> str | None:
    is_there = (MODEL / "config.json").exists()
    return None if is_there else f"no model in {MODEL}: put tiny-mla there, or name its folder in MLA_TEST_MODEL"


def _no_hip_compilers() -> str | None:
    from hip_build import BITCODE, INSTALL

    is_there = shutil.which("clang++-19") and BITCODE.exists() and importlib.util.find_spec("ziglang")
    return None if is_there else f"the compilers for AMD GPUs are missing: run {INSTALL} as root"


def _no_releases() -> str | None:
    from tests.versions.environments import TORCH_OF_RELEASE, matrix_dir

    if all((matrix_dir() / f"vllm-{release}").exists() for release in TORCH_OF_RELEASE):
        return None
    ask = [sys.executable, "-m", "pip", "--retries=0", "--timeout=20", "index", "versions", "vllm"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return None
    return f"the matrix's wheels are not all in {matrix_dir()}, and pip finds no index: {answer.stderr.strip()[-200:]}"


NEEDS: dict[str, Callable[[], str | None]] = {
    "gpu": functools.cache(_no_gpu),
    "engine": functools.cache(_no_model),
    "hip": functools.cache(_no_hip_compilers),
    "versions": functools.cache(_no_releases),
}
HEAVY = (*NEEDS, "slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Engines on the CPU compile Inductor's C++ once, whichever test starts them."""
    cache, compiler = getattr(item.config, "cache", None), shutil.which("g++")
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("engine") and NEEDS["gpu"]() and cache and compiler:
            patch.setenv("MLA_TEST_CXX", compiler)
            patch.setenv("MLA_TEST_CXX_CACHE", str(cache.mkdir(f"inductor-{torch.__version__}")))
            patch.setenv("PATH", str(COMPILE_ONCE), prepend=os.pathsep)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in NEEDS.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if LEAVE_NONE_OUT and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"left out, and MLA_TEST_LEAVE_NONE_OUT is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if LEAVE_NONE_OUT and report.outcome == "skipped":
        report.outcome, report.longrepr = "failed", f"left out, and MLA_TEST_LEAVE_NONE_OUT is set: {report.longrepr}"
    return report


class _AtOnce:
    """Tells of what failed, and of what took long, when it happens: a CI that is ended has no summary."""

    LONG_SECONDS, LINES = 60, 25

    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.get_plugin("terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Without the group that xdist puts behind it.
        name = report.nodeid.partition("@")[0]
        if report.failed:
            last = "\n".join(report.longreprtext.splitlines()[-self.LINES :])
            self.terminal.write_line(f"\nfailed: {name} after {report.duration:.0f} s\n{last}")
        elif report.duration > self.LONG_SECONDS:
            self.terminal.write_line(f"\n{report.duration:.0f} s: {name} ({report.when})")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if LEAVE_NONE_OUT and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_AtOnce(config))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not any(map(item.get_closest_marker, HEAVY)):
            item.add_marker("light")
    if hasattr(config, "workerinput"):
        items[:] = _spread(items)


def pytest_collection_finish() -> None:
    """What is there now stays to the end: to search it for garbage took a fifth of the generator's time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _spread(items: list[pytest.Item]) -> list[pytest.Item]:
    """Whole files first, the largest of all, so that no worker is left with one at the end: light ones, and those whose
    tests share a fixture. Then, for whichever worker is free, engines and releases in turn; last what takes seconds.
    """
    groups: dict[str, dict[str, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        kind = next((marker for marker in ("engine", "versions") if item.get_closest_marker(marker)), "other")
        is_of_file = (kind == "other" and not item.get_closest_marker("slow")) or _shares_with_its_file(item)
        name = str(item.path) if is_of_file else item.nodeid
        item.add_marker(pytest.mark.xdist_group(name))
        if hasattr(item, "_id"):
            # Where pytest 9.2 keeps a test's name; xdist 3.8 adds the group to an attribute that it no longer reads.
            item._id = type(item._id).parse(f"{item.nodeid}@{name}")
        groups["file" if is_of_file else kind][name].append(item)
    # The matrix's releases, then ROCm's; the many short ones of fx last.
    in_turn = chain.from_iterable(
        zip_longest(groups["engine"].values(), reversed(groups["versions"].values()), fillvalue=[])
    )
    files = sorted(groups["file"].values(), key=len, reverse=True)
    return list(chain.from_iterable([*files, *in_turn, *reversed(groups["other"].values())]))


def _shares_with_its_file(item: pytest.Item) -> bool:
    """Whether a fixture is made once for the tests of its file."""
    fixtures = chain.from_iterable(item._fixtureinfo.name2fixturedefs.values())
    return any(fixture.scope in ("module", "package") for fixture in fixtures)
