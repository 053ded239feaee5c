# SPDX-License-Identifier: Apache-2.0
"""`vllm bench serve` with and without the fused kernel, interleaved (off, on, off, on, ...) and compared in pairs.

python examples/benchmark_serving.py --model deepseek-ai/DeepSeek-V2-Lite-Chat --load-format dummy --both-up

Starts and stops the servers itself, on 127.0.0.1. `on` is MLA_FUSION=strict, so an unfused server cannot be measured by
mistake. A pair is an off run and the on run after it, with the same requests; the interval of the change says whether a
gain is more than noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from _common import (
    ChildError,
    Server,
    environment,
    facts_line,
    fusion_line,
    markdown_table,
    measured_on,
    positive_int,
    run_logged,
    running_server,
    vllm_command,
    write_results,
)

SERVER_MODES = {"off": "off", "on": "strict"}


@dataclass(frozen=True)
class Metric:
    """A figure in the result file of `vllm bench serve`."""

    key: str
    name: str
    higher_is_better: bool = False


METRICS = [
    Metric("mean_tpot_ms", "TPOT, mean, ms"),
    Metric("median_tpot_ms", "TPOT, median, ms"),
    Metric("median_itl_ms", "ITL, median, ms"),
    Metric("median_ttft_ms", "TTFT, median, ms"),
    Metric("p99_ttft_ms", "TTFT, p99, ms"),
    Metric("output_throughput", "output tokens/s", higher_is_better=True),
    Metric("request_throughput", "requests/s", higher_is_better=True),
]


# --- measuring --------------------------------------------------------------------------------------------------------


def server_arguments(args: argparse.Namespace) -> list[str]:
    """Arguments of `vllm serve`."""
    result = ["--load-format", args.load_format, "--served-model-name", "bench", *shlex.split(args.serve_args)]
    if args.tokenizer:
        result += ["--tokenizer", args.tokenizer]
    if args.both_up and not any(argument.startswith("--gpu-memory-utilization") for argument in result):
        result += ["--gpu-memory-utilization", "0.42"]
    return result


def bench_arguments(args: argparse.Namespace, url: str, seed: int, result: Path) -> list[str]:
    """Arguments of `vllm bench serve`."""
    options = {
        "base-url": url,
        "backend": "vllm",
        "model": "bench",
        "tokenizer": args.tokenizer or args.model,
        "dataset-name": "random",
        "random-input-len": args.input_len,
        "random-output-len": args.output_len,
        "num-prompts": args.num_prompts,
        "max-concurrency": args.max_concurrency,
        "request-rate": args.request_rate,
        "num-warmups": args.max_concurrency,
        "temperature": 0,
        "seed": seed,
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": 99,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    pairs = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [*pairs, "--ignore-eos", "--save-result", "--disable-tqdm", *shlex.split(args.bench_args)]


def measure(args: argparse.Namespace, server: Server, mode: str, pair: int) -> dict[str, float]:
    """One run against a server.

    Raises:
        ChildError: the benchmark or one of its requests failed.
    """
    result = (args.out / f"run_{pair}_{mode}.json").resolve()
    # Both modes of a pair get the same requests; another pair gets others, which the prefix cache does not hold.
    command = [*vllm_command("bench", "serve"), *bench_arguments(args, server.url, pair, result)]
    run_logged(command, environment("off"), result.with_suffix(".log"))
    data = json.loads(result.read_text())
    if data["completed"] != args.num_prompts:
        raise ChildError(f"{data['completed']} of {args.num_prompts} requests completed; see {server.log}")
    figures = {metric.key: float(data[metric.key]) for metric in METRICS}
    print(f"pair {pair}, {mode}: " + ", ".join(f"{m.name} {figures[m.key]:.3f}" for m in METRICS), flush=True)
    return figures


def measure_pairs(args: argparse.Namespace) -> tuple[list[dict[str, dict[str, float]]], str]:
    """All pairs, and what the plugin logged in the last fused server.

    Raises:
        ChildError: a server or a benchmark failed.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = []
    with ExitStack() as servers:
        for pair in range(args.repeats):
            figures = {}
            for mode in SERVER_MODES:
                if not args.both_up:
                    servers.close()
                if pair == 0 or not args.both_up:
                    running[mode] = servers.enter_context(_server(args, mode))
                figures[mode] = measure(args, running[mode], mode, pair)
            pairs.append(figures)
    return pairs, fusion_line(args.out / "server_on.log")
