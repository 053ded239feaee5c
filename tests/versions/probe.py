# SPDX-License-Identifier: Apache-2.0
"""Runs in one release's environment: loads the plugin as vLLM does and prints a JSON line for each thing it checks."""

import argparse
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .configurations import Case, cases, one_pass_cases
from .extent import CI_RELEASES
from .variants import IN_PLACE, IN_PLACE_NAME, SPARSE, Variant, all_variants

# As in a server, the plugin is loaded before vLLM's model code is imported; hence the imports inside the functions.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=Path, help="folder for the graphs of each variant as text")
    parser.add_argument("checks", nargs="+", help="names of what to check; the hooks come first in any case")
    arguments = parser.parse_args()
    report_check("hooks", _hook_problems)
    with tempfile.TemporaryDirectory() as scratch:
        for name, problems_of in _checks(Path(scratch), arguments.graphs).items():
            if name in arguments.checks:
                report_check(name, problems_of)


def _checks(scratch: Path, graphs_folder: Path | None) -> dict[str, Callable[[], Iterable[str]]]:
    checks: dict[str, Callable[[], Iterable[str]]] = {}
    for variant in all_variants():
        checks[str(variant)] = partial(_problems_of, variant, scratch, graphs_folder)
    checks[IN_PLACE_NAME] = partial(_in_place_problems, scratch, graphs_folder)
    checks[str(SPARSE)] = partial(_sparse_problems, scratch)
    for case in cases():
        checks[str(case)] = partial(_case_problems, case, scratch, graphs_folder)
    for name, case in one_pass_cases(CI_RELEASES[0]).items():
        checks[name] = partial(_one_pass_problems, case, scratch)
    return checks


def _hook_problems() -> Iterable[str]:
    from vllm_mla_fusion import kernel

    from . import hooks

    # The kernel is not run here and its build is tested elsewhere; nothing here should depend on a compiler.
    target = SimpleNamespace(backend="cuda", archs=["sm_90"])
    patch.multiple(kernel, failure=lambda: None, load=lambda: target).start()
    return hooks.problems()


def _problems_of(variant: Variant, scratch: Path, graphs_folder: Path | None) -> Iterable[str]:
    from vllm_mla_fusion.host import report

    from . import codegen, graphs, hooks, stock_model, tracing, world

    report._left_alone.clear()
    config = stock_model.vllm_config(variant, scratch / "model")
    yield from hooks.config_problems(config)
    world.enter(config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = stock_model.build(config, variant, mode)
    trace = tracing.trace_compilation(model, config, mode)
    if graphs_folder is not None:
        trace.write(graphs_folder / f"{variant}.txt")
    yield from graphs.problems_of(variant, trace)
    yield from codegen.problems_of(variant, trace.code)
    yield from (f"the pass says: {reason}" for reason in report._left_alone)
    with mode:
        yield from hooks.layer_problems(config, variant.cache_dtype)
        yield from hooks.worker_problems(config, model)


def _in_place_problems(scratch: Path, graphs_folder: Path | None) -> Iterable[str]:
    from . import in_place, stock_model, tracing, world

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    config = stock_model.vllm_config(IN_PLACE, scratch / "model")
    world.enter(config)
    model = stock_model.build(config, IN_PLACE, mode)
    with in_place.pass_that_rotates_in_place():
        trace = tracing.trace_compilation(model, config, mode)
    if graphs_folder is not None:
        trace.write(graphs_folder / f"{IN_PLACE_NAME}.txt")
    yield from in_place.problems_of(trace)


def _sparse_problems(scratch: Path) -> Iterable[str]:
    from vllm_mla_fusion.host import report

    from . import sparse, stock_model, tracing, world

    report._left_alone.clear()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with sparse.pretended_kernels():
        config = stock_model.vllm_config(SPARSE, scratch / "model")
        world.enter(config)
        model = stock_model.build(config, SPARSE, mode)
        sparse.prepare(model)
        trace = tracing.trace_compilation(model, config, mode)
    yield from sparse.problems_of(trace)
    yield from (f"the pass says: {reason}" for reason in report._left_alone)


def _case_problems(case: Case, scratch: Path, graphs_folder: Path | None) -> Iterable[str]:
    from . import judge

    return judge.problems_of_case(case, scratch / "whole", graphs_folder)


def _one_pass_problems(case: Case, scratch: Path) -> Iterable[str]:
    from . import one_pass

    return one_pass.problems_of(case, scratch / "whole")


def report_check(name: str, find_problems: Callable[[], Iterable[str]]) -> None:
    problems = []
    start = time.process_time()
    try:
        problems.extend(find_problems())
    except Exception:
        problems.append(traceback.format_exc())
    torch.set_default_dtype(torch.float32)  # what fails leaves another one behind
    seconds = round(time.process_time() - start, 1)
    print(json.dumps({"check": name, "problems": problems, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
