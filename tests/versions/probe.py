# SPDX-License-Identifier: Apache-2.0
"""Runs inside one release's environment: loads the plugin as vLLM does and reports on each variant, a JSON line each."""

import argparse
import json
import tempfile
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import vllm
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.plugins import load_general_plugins

from tests.versions.variants import Variant, all_variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=Path, help="folder for the graphs of each variant as text")
    graphs_folder = parser.parse_args().graphs
    _load_plugin()
    _report(vllm=vllm.__version__, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        for variant in all_variants():
            try:
                problems = _problems_of(variant, Path(scratch), graphs_folder)
            except Exception:
                problems = [traceback.format_exc()]
            _report(variant=str(variant), problems=problems)


def _load_plugin() -> None:
    from vllm_mla_fusion import kernel

    # The kernel is not run here and its build is tested elsewhere; the hooks must not depend on a compiler.
    patch.object(kernel, "failure", lambda: None).start()
    load_general_plugins()


def _problems_of(variant: Variant, scratch: Path, graphs_folder: Path | None) -> list[str]:
    from vllm_mla_fusion import compat, report

    from tests.versions import checks, stock_model, tracing

    config = stock_model.vllm_config(variant, scratch / "model")
    if not torch.distributed.is_initialized():
        stock_model.init_single_process(config, scratch / "rendezvous")
    report._left_alone.clear()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = stock_model.build(config, variant, mode)
    try:
        trace = tracing.trace_compilation(model, config, mode)
    finally:
        torch._dynamo.reset()
    if graphs_folder is not None:
        _write(trace, graphs_folder / f"{variant}.txt")
    problems = checks.problems_of(variant, trace)
    if not all(isinstance(manager, compat.FusionPassManager) for manager in trace.pass_managers):
        problems.append(f"pass managers are {trace.pass_managers}, not the plugin's")
    if compat.UPDATE_OP in config.compilation_config.splitting_ops:
        problems.append(f"{compat.UPDATE_OP} is still a splitting op")
    return problems + [f"the pass says: {reason}" for reason in report._left_alone]


def _write(trace: "tracing.Trace", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = zip(trace.before, trace.after, strict=True)
    path.write_text("\n\n".join(f"BEFORE\n{before}\nAFTER\n{after}" for before, after in pairs))


def _report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
