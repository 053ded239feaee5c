# SPDX-License-Identifier: Apache-2.0
"""`vllm bench serve` with and without the fused kernel, interleaved (off, on, on, off, ...) and compared in pairs.

python examples/benchmark_serving.py --model deepseek-ai/DeepSeek-V2-Lite-Chat --load-format dummy --both-up

Starts and stops the servers itself, on 127.0.0.1. `on` is MLA_FUSION=strict, so an unfused server cannot be measured by
mistake. A pair is an off and an on run, one after the other, with the same requests; the interval of the change says
whether a gain is more than noise. Every second pair begins with on, so that a steady drift of the machine cancels out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from _common import (
    ChildError,
    Server,
    add_out,
    counted,
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

from vllm_mla_fusion.installation import install_extra

Pair = dict[str, dict[str, float]]  # mode, metric

WARM_UP = 0
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
    label = "not counted" if pair == WARM_UP else f"pair {pair}"
    print(f"{label}, {mode}: " + ", ".join(f"{m.name} {figures[m.key]:.3f}" for m in METRICS), flush=True)
    return figures


def measure_pairs(args: argparse.Namespace) -> list[Pair]:
    """All pairs of runs.

    Raises:
        ChildError: a server or a benchmark failed.
    """
    pairs = []
    with ExitStack() as both:
        servers = _both_servers(args, both) if args.both_up else {}
        for number in range(1, args.repeats + 1):
            figures = {}
            for mode in SERVER_MODES if number % 2 else reversed(SERVER_MODES):
                with nullcontext(servers[mode]) if args.both_up else _server(args, mode) as server:
                    figures[mode] = measure(args, server, mode, number)
            pairs.append(figures)
    return pairs


def _both_servers(args: argparse.Namespace, both: ExitStack) -> dict[str, Server]:
    # A server that is not told how much cache it may have measures the free memory: nobody else may start then.
    together = "--kv-cache-memory-bytes" in args.serve_args
    with ThreadPoolExecutor(len(SERVER_MODES) if together else 1) as pool:
        servers = pool.map(lambda mode: both.enter_context(_server(args, mode)), SERVER_MODES)
    return dict(zip(SERVER_MODES, servers, strict=True))


@contextmanager
def _server(args: argparse.Namespace, mode: str) -> Iterator[Server]:
    """A server that has already seen one run, which is not counted."""
    log = args.out / f"server_{mode}.log"
    print(f"starting the server, MLA fusion {mode}, log in {log} ...", flush=True)
    with running_server(args.model, SERVER_MODES[mode], server_arguments(args), log) as server:
        measure(args, server, mode, WARM_UP)
        yield server


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A metric over all pairs.

    Args:
        off, on: median, smallest and largest run.
        percent: geometric mean over the pairs of on / off, as a change in percent; None if a figure is 0.
        interval: its 95 % confidence interval (Student's t on the logarithms); None with a single pair.
        verdict: `better` or `worse` if the interval leaves out 0, else `within noise`; `-` without a change.
    """

    name: str
    off: tuple[float, float, float]
    on: tuple[float, float, float]
    percent: float | None
    interval: tuple[float, float] | None
    verdict: str


def compare(metric: Metric, pairs: Sequence[Pair]) -> Change:
    """Compares the paired runs in one metric."""
    off = [pair["off"][metric.key] for pair in pairs]
    on = [pair["on"][metric.key] for pair in pairs]
    spread_off, spread_on = ((statistics.median(x), min(x), max(x)) for x in (off, on))
    if not all(figure > 0 for figure in (*off, *on)):
        # Such as TPOT of one token per request.
        return Change(metric.name, spread_off, spread_on, None, None, "-")
    logs = [math.log(b / a) for a, b in zip(off, on, strict=True)]
    mean, interval, verdict = statistics.fmean(logs), None, "one pair: no interval"
    if len(logs) > 1:
        half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        low, high = (_percent(mean - half), _percent(mean + half))
        interval = (low, high)
        better = "better" if (low > 0) == metric.higher_is_better else "worse"
        verdict = "within noise" if low <= 0 <= high else better
    return Change(metric.name, spread_off, spread_on, _percent(mean), interval, verdict)


def t_quantile(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees_of_freedom))


def _percent(log_ratio: float) -> float:
    return 100 * math.expm1(log_ratio)


def changes_table(changes: Sequence[Change]) -> str:
    """The Markdown table of the changes."""
    rows = [
        [
            c.name,
            *("{:.2f} ({:.2f} to {:.2f})".format(*spread) for spread in (c.off, c.on)),
            "-" if c.percent is None else f"{c.percent:+.2f} %",
            "-" if c.interval is None else f"{c.interval[0]:+.2f} to {c.interval[1]:+.2f} %",
            c.verdict,
        ]
        for c in changes
    ]
    return markdown_table(["median (range)", "off", "on", "change", "95 % interval", "on is"], rows)


# --- command ----------------------------------------------------------------------------------------------------------


def _chance(compared: int) -> str:
    if compared == 0:
        return "No interval: --repeats 2 or more tells a change from noise, the default 6 does so better."
    return (
        f"{counted(compared, 'metric')} at 95 % each: were they independent, {1 - 0.95**compared:.0%} of such "
        "benchmarks would call one of them better or worse by chance alone."
    )


def report(args: argparse.Namespace, pairs: list[Pair], plugin: str, facts: dict[str, str]) -> None:
    """Prints and writes benchmark_serving.md and benchmark_serving.json."""
    changes = [compare(metric, pairs) for metric in METRICS]
    compared = sum(change.interval is not None for change in changes)
    lines = [
        changes_table(changes),
        "",
        _chance(compared),
        f"{counted(len(pairs), 'pair')} of interleaved runs after a warm-up run, "
        f"{'both servers up' if args.both_up else 'each on a fresh server'}; "
        f"{counted(args.num_prompts, 'request')} of {args.input_len} + {args.output_len} tokens, "
        f"concurrency {args.max_concurrency}, request rate {args.request_rate}.",
        f"{args.model}, {facts_line(facts)}.",
        f"Plugin: {plugin}",
    ]
    data = {
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "measured_on": facts,
        "plugin": plugin,
        "changes": [asdict(change) for change in changes],
        "pairs": pairs,
    }
    write_results(args.out, "benchmark_serving", data, "\n".join(lines))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or directory")
    parser.add_argument("--tokenizer", help="another tokenizer than the model's")
    parser.add_argument("--load-format", default="auto", help="vLLM's; dummy needs no weights (%(default)s)")
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=6,
        help="pairs of runs; drift cancels out if they are even (%(default)s)",
    )
    parser.add_argument(
        "--both-up",
        action="store_true",
        help="start each server once, both at a time if --serve-args has --kv-cache-memory-bytes, and alternate; needs "
        "twice the memory",
    )
    parser.add_argument("--input-len", type=positive_int, default=128, help="prompt tokens (%(default)s)")
    parser.add_argument("--output-len", type=positive_int, default=128, help="generated tokens (%(default)s)")
    parser.add_argument("--num-prompts", type=positive_int, default=64, help="requests per run (%(default)s)")
    parser.add_argument("--max-concurrency", type=positive_int, default=8, help="requests at a time (%(default)s)")
    parser.add_argument("--request-rate", default="inf", help="requests per second (%(default)s)")
    parser.add_argument("--serve-args", default="", help="more arguments of `vllm serve`, as one string")
    parser.add_argument("--bench-args", default="", help="more arguments of `vllm bench serve`, as one string")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    """Measures and reports."""
    args = parse_args()
    if importlib.util.find_spec("scipy") is None:
        sys.exit(f"scipy is not installed; {install_extra('bench')}")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        pairs = measure_pairs(args)
    except ChildError as error:
        sys.exit(str(error))
    report(args, pairs, fusion_line(args.out / "server_on.log"), measured_on())


if __name__ == "__main__":
    main()
