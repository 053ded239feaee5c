# SPDX-License-Identifier: Apache-2.0
"""GSM8K with and without the fused kernel: lm-eval with its vLLM backend, each mode in a fresh process, then compared.

python examples/gsm8k_accuracy.py --model deepseek-ai/DeepSeek-V2-Lite-Chat --model-args '{"max_model_len": 4096}'

Without a network: --offline-data DIR, where DIR holds train.jsonl and test.jsonl with the fields question and answer.
In a checkout, `pip install '.[eval]'` brings what it needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import (
    MODES,
    OFFLINE,
    ChildError,
    accept_cpu_build,
    add_out,
    add_timeout,
    environment,
    facts_line,
    fusion_line,
    json_object,
    markdown_table,
    measured_on,
    merged,
    positive_int,
    run_logged,
    write_results,
)

from vllm_mla_fusion.installation import install_extra

FILTERS = {"strict-match": "strict match", "flexible-extract": "flexible match"}


# --- one run, in a process of its own ---------------------------------------------------------------------------------


def local_files(folder: Path) -> dict[str, str]:
    """The files of --offline-data.

    Raises:
        SystemExit: one is missing.
    """
    files = {split: folder.resolve() / f"{split}.jsonl" for split in ("train", "test")}
    for path in files.values():
        if not path.is_file():
            sys.exit(f"--offline-data must hold train.jsonl and test.jsonl, but {path} does not exist")
    return {split: str(path) for split, path in files.items()}


def gsm8k_task(offline_data: Path | None) -> Any:
    """lm-eval's own gsm8k task, on local files if a directory is given."""
    import yaml
    from lm_eval import tasks

    spec: str | dict[str, Any] = "gsm8k"
    if offline_data is not None:
        built_in = yaml.safe_load((Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())
        data_files = {"data_files": local_files(offline_data)}
        spec = {**built_in, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data_files}
    return tasks.TaskManager().load([spec])["tasks"]["gsm8k"]


def evaluate(args: argparse.Namespace) -> None:
    """Runs lm-eval in this process and writes its table and samples to `args.run_to`."""
    accept_cpu_build()
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    # Loaded before the engine starts, so that missing data shows at once.
    task = gsm8k_task(args.offline_data)
    result = simple_evaluate(
        model="vllm",
        model_args=merged({"pretrained": args.model}, args.model_args),
        tasks=[task],
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size="auto",
        log_samples=True,
    )
    samples: dict[int, dict[str, Any]] = {}
    for sample in result["samples"]["gsm8k"]:
        row = samples.setdefault(sample["doc_id"], {"generation": sample["resps"][0][0]})
        row[sample["filter"]] = bool(sample["exact_match"])
    run = {"table": make_table(result), "results": result["results"]["gsm8k"], "samples": samples}
    args.run_to.write_text(json.dumps(run, default=str))


# --- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same problems under one filter; scores are shares of 1.

    Args:
        stderr_off: standard error that lm-eval gives for `off`.
        difference: `on` - `off`.
        stderr_difference: standard error of the paired difference.
        only_off, only_on: problems that one run alone solved.
        p_value: McNemar's exact test, two-sided: how likely so uneven a split of these is by chance.
    """

    name: str
    n: int
    off: float
    stderr_off: float
    on: float
    stderr_on: float
    difference: float
    stderr_difference: float
    only_off: int
    only_on: int
    p_value: float


def mcnemar_exact(only_off: int, only_on: int) -> float:
    """Two-sided exact p-value of McNemar's test on the counts of the two kinds of disagreement."""
    from scipy.stats import binomtest

    return float(binomtest(only_on, only_off + only_on).pvalue) if only_off + only_on else 1.0


def compare(off: dict[str, Any], on: dict[str, Any], name: str) -> Comparison:
    """Compares two runs, as `evaluate` writes them, under the filter `name`.

    Raises:
        ValueError: the runs are not over the same problems.
    """
    if off["samples"].keys() != on["samples"].keys():
        raise ValueError(f"the runs must cover the same problems, got {len(off['samples'])} and {len(on['samples'])}")
    pairs = [(off["samples"][doc][name], on["samples"][doc][name]) for doc in off["samples"]]
    only_off = sum(a and not b for a, b in pairs)
    only_on = sum(b and not a for a, b in pairs)
    n, difference = len(pairs), (only_on - only_off) / len(pairs)
    variance = max(0.0, (only_off + only_on) / n - difference**2) / max(1, n - 1)
    scores = {}
    for label, run in {"off": off, "on": on}.items():
        scores[label] = run["results"][f"exact_match,{name}"]
        scores[f"stderr_{label}"] = run["results"][f"exact_match_stderr,{name}"]
    return Comparison(
        name=FILTERS[name],
        n=n,
        difference=difference,
        stderr_difference=math.sqrt(variance),
        only_off=only_off,
        only_on=only_on,
        p_value=mcnemar_exact(only_off, only_on),
        **scores,
    )


def identical_share(off: dict[str, Any], on: dict[str, Any]) -> float:
    """Share of problems whose generated text is the same to the byte."""
    same = sum(off["samples"][doc]["generation"] == on["samples"][doc]["generation"] for doc in off["samples"])
    return same / len(off["samples"])


def comparison_table(comparisons: list[Comparison]) -> str:
    """The Markdown table of the comparisons."""
    header = ["GSM8K", "off", "on", "difference (paired stderr)", "only off / only on right", "p (McNemar, exact)"]
    rows = [
        [
            f"{c.name}, n = {c.n}",
            f"{c.off:.2%} ± {c.stderr_off:.2%}",
            f"{c.on:.2%} ± {c.stderr_on:.2%}",
            f"{100 * c.difference:+.2f} points ({100 * c.stderr_difference:.2f})",
            f"{c.only_off} / {c.only_on}",
            f"{c.p_value:.3g}",
        ]
        for c in comparisons
    ]
    return markdown_table(header, rows)


# --- command ----------------------------------------------------------------------------------------------------------


def run_modes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs `off` (with --control twice) and `strict`, each in a fresh process, and prints lm-eval's table of each.

    Raises:
        ChildError: a run failed.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for label, mode in {"off": "off", **({"off again": "off"} if args.control else {}), "on": "strict"}.items():
        stem = args.out / f"run_{label.replace(' ', '_')}"
        value = MODES[mode]
        print(f"{label}: MLA_FUSION{f'={value}' if value else ' unset'}, log in {stem}.log ...", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--run-to", f"{stem}.json"]
        extra = OFFLINE if args.offline_data else {}
        run_logged(command, environment(mode, extra), stem.with_suffix(".log"), args.timeout)
        runs[label] = json.loads(stem.with_suffix(".json").read_text())
        runs[label]["plugin"] = fusion_line(stem.with_suffix(".log"))
        print(f"{runs[label]['table']}\n{runs[label]['plugin']}\n", flush=True)
    return runs


def report(args: argparse.Namespace, runs: dict[str, dict[str, Any]], facts: dict[str, str]) -> None:
    """Prints and writes gsm8k.md and gsm8k.json."""
    comparisons = [compare(runs["off"], runs["on"], name) for name in FILTERS]
    identical = identical_share(runs["off"], runs["on"])
    lines = [
        comparison_table(comparisons),
        "",
        f"Identical generations: {identical:.2%} of {comparisons[0].n}.",
    ]
    data: dict[str, Any] = {
        "model": args.model,
        "model_args": args.model_args,
        "num_fewshot": args.num_fewshot,
        "data": str(args.offline_data or "openai/gsm8k"),
        "measured_on": facts,
        "plugin": runs["on"]["plugin"],
        "comparisons": [asdict(c) for c in comparisons],
        "identical_generations": identical,
        "lm_eval_results": {label: run["results"] for label, run in runs.items()},
    }
    if args.control:
        data["identical_generations_control"] = control = identical_share(runs["off"], runs["off again"])
        lines.append(f"Control, off against off again: {control:.2%} identical.")
    lines += [
        f"{args.model}, {args.num_fewshot}-shot, greedy, {facts_line(facts)}.",
        f"Plugin: {runs['on']['plugin']}",
    ]
    write_results(args.out, "gsm8k", data, "\n".join(lines))


def _limit(text: str) -> int:
    if positive_int(text) < 2:
        raise argparse.ArgumentTypeError("expected at least 2 problems, or there is no standard error")
    return int(text)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or directory")
    parser.add_argument("--limit", type=_limit, help="only the first LIMIT problems (all)")
    parser.add_argument("--offline-data", type=Path, help="folder with train.jsonl and test.jsonl; needs no network")
    parser.add_argument("--num-fewshot", type=int, default=5, help="worked examples before each problem (%(default)s)")
    parser.add_argument("--model-args", type=json_object, default={}, help="JSON of vLLM engine arguments")
    parser.add_argument("--control", action="store_true", help="run off twice: how equal are two runs of stock vLLM?")
    add_timeout(parser, 14400)
    add_out(parser)
    parser.add_argument("--run-to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs and compares the modes; as its own child, runs one of them."""
    args = parse_args()
    if args.run_to:
        evaluate(args)
        return
    if args.offline_data:
        local_files(args.offline_data)
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit(f"lm-eval is not installed; {install_extra('eval')}")
    try:
        runs = run_modes(args)
    except ChildError as error:
        sys.exit(str(error))
    report(args, runs, {**measured_on(), "lm-eval": importlib.metadata.version("lm_eval")})


if __name__ == "__main__":  # vLLM may start its engine with spawn, which imports this file again
    main()
