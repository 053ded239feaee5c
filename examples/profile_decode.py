# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of one decode step, with and without the fused kernel. Recording needs a GPU; it uses one.

python examples/profile_decode.py --model deepseek-ai/DeepSeek-V2-Lite-Chat --load-format dummy

Prints which kernels run between the qkv_a GEMM and attention, how often and how long, per layer and per step, and draws
one layer of each mode. Mode `upstream` is stock vLLM with its own fuse_rope_kvcache_cat_mla. The kernels are kept in
events_MODE.json, so `--from-events DIR` makes tables and picture again without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _common import (
    MODES,
    UPSTREAM_FUSION,
    ChildError,
    add_out,
    add_timeout,
    environment,
    facts_line,
    fusion_line,
    json_object,
    measured_on,
    merged,
    positive_int,
    run_logged,
    write_results,
)
from _decode_events import DecodeSummary, Event, Patterns, SegmentationError, markdown, short_name, summarise

WARM_UP_STEPS, PROMPT_LEN = 20, 64


# --- recording, in a process of its own -------------------------------------------------------------------------------


def engine_arguments(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Arguments of vllm.LLM for one mode; those of the user win."""
    result: dict[str, Any] = {
        "model": args.model,
        "load_format": args.load_format,
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": args.batch,
        "enable_prefix_caching": False,
    }
    if args.layers:
        result["hf_overrides"] = {"num_hidden_layers": args.layers}
    if mode == "upstream":
        result = merged(result, UPSTREAM_FUSION)
    return merged(result, args.engine_args)


def record(args: argparse.Namespace) -> None:
    """Decodes with a full batch in this process and writes the kernels of `args.steps` steps to `args.record_to`."""
    # In one process, or the profiler sees nothing; FlashInfer's sampler would need a compiler.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    engine = LLM(**engine_arguments(args, args.modes[0])).llm_engine
    max_tokens = WARM_UP_STEPS + 3 * args.steps + 50
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    for i in range(args.batch):
        tokens = [2 + (7 * i + j) % 1000 for j in range(PROMPT_LEN)]
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=tokens), sampling)
    _step(engine, WARM_UP_STEPS)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        _step(engine, args.steps)
        torch.cuda.synchronize()
    events = [
        (event.time_range.start, event.time_range.end - event.time_range.start, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    walls = _step(engine, args.steps)
    torch.cuda.synchronize()
    data = {"batch": args.batch, "wall_us": 1e6 * statistics.median(walls), "events": sorted(events)}
    args.record_to.write_text(json.dumps(data))


def _step(engine: Any, count: int) -> list[float]:
    """Runs engine steps and returns the seconds that each took."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def check_gpu() -> None:
    """Raises:
    SystemExit: there is no GPU to record on.
    """
    import torch

    if torch.cuda.device_count() == 0:
        sys.exit("Recording needs a GPU and torch sees none; with recorded events use --from-events DIR.")


def record_modes(args: argparse.Namespace) -> None:
    """Records each mode in a fresh process.

    Raises:
        ChildError: a recording failed.
    """
    facts = measured_on()
    for mode in args.modes:
        path = args.out / f"events_{mode}.json"
        log = path.with_suffix(".log")
        print(f"{mode}: recording, log in {log} ...", flush=True)
        # The last --modes wins.
        command = [sys.executable, __file__, *sys.argv[1:], "--modes", mode, "--record-to", str(path)]
        run_logged(command, environment(mode), log, args.timeout)
        described = {"mode": mode, "model": args.model, "measured_on": facts, "plugin": fusion_line(log)}
        path.write_text(json.dumps({**described, **json.loads(path.read_text())}))


# --- tables and picture -----------------------------------------------------------------------------------------------


def load_events(path: Path) -> tuple[list[Event], dict[str, Any]]:
    """The events of a file and what else it says; a bare list of [start_us, duration_us, kernel name] will do."""
    data = json.loads(path.read_text())
    described = {"events": data} if isinstance(data, list) else data
    events = sorted(Event(*event) for event in described.pop("events"))
    return events, described


def event_files(folder: Path, modes: list[str]) -> dict[str, Path]:
    """events_MODE.json (or ev_MODE.json) of the modes that `folder` has.

    Raises:
        SystemExit: it has none.
    """
    candidates = {mode: [folder / f"events_{mode}.json", folder / f"ev_{mode}.json"] for mode in modes}
    found = {mode: next((p for p in paths if p.is_file()), None) for mode, paths in candidates.items()}
    if not any(found.values()):
        sys.exit(
            f"{folder} has no events_MODE.json for any of the modes {', '.join(modes)}; record them on a GPU first"
        )
    return {mode: path for mode, path in found.items() if path}


def report(args: argparse.Namespace, folder: Path) -> None:
    """Prints and writes profile_decode.md, .json and .png from the event files of `folder`.

    Raises:
        SegmentationError: no layers can be found in a recording.
    """
    patterns = Patterns(args.attention, args.gemm, args.gemms_before_attention)
    summaries: dict[str, DecodeSummary] = {}
    described: dict[str, dict[str, Any]] = {}
    for mode, path in event_files(folder, args.modes).items():
        events, described[mode] = load_events(path)
        try:
            summaries[mode] = summarise(events, patterns)
        except SegmentationError as error:
            raise SegmentationError(f"{path}: {error}") from None
    lines = [markdown(summaries)]
    for mode, facts in described.items():
        if "wall_us" in facts:
            lines.append(
                f"Step of {mode} as the host sees it, without the profiler: {facts['wall_us']:.0f} us (median)."
            )
        if facts.get("plugin"):
            lines.append(f"Plugin, {mode}: {facts['plugin']}")
    first = next(iter(described.values()))
    if "measured_on" in first:
        lines.append(f"{first['model']}, batch {first['batch']}, {facts_line(first['measured_on'])}.")
    data = {mode: {**described[mode], **asdict(summary)} for mode, summary in summaries.items()}
    write_results(args.out, "profile_decode", data, "\n\n".join(lines))
    draw(summaries, patterns, args.out / "profile_decode.png")


def draw(summaries: dict[str, DecodeSummary], patterns: Patterns, path: Path) -> None:
    """Draws the median layer of each mode, one row each, from its qkv_a GEMM to the next layer's."""
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is missing; pip install matplotlib and run again with --from-events.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(summaries), 1, figsize=(14, 0.6 + 1.5 * len(summaries)), sharex=True, squeeze=False)
    for axis, (mode, summary) in zip(axes[:, 0], summaries.items(), strict=True):
        _draw_layer(axis, mode, summary, patterns)
    axes[-1, 0].set_xlabel("microseconds since the start of the qkv_a GEMM")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(f"Picture: {path}")


def _draw_layer(axis: Any, mode: str, summary: DecodeSummary, patterns: Patterns) -> None:
    colours = iter(["tab:orange", "tab:green", "tab:red", "tab:purple", "tab:pink", "tab:olive", "tab:cyan"] * 9)
    colour_of = {summary.attention_kernel: "tab:blue"}
    start, attention_came = summary.layer_events[0].start, False
    for event in summary.layer_events:
        attention_came = attention_came or event.name == summary.attention_kernel
        if patterns.is_gemm(event.name):
            colour, label = "0.6", "GEMM"
        elif attention_came and event.name not in colour_of:
            colour, label = "0.85", "other"
        else:
            colour = colour_of[event.name] = colour_of.get(event.name) or next(colours)
            label = "attention" if event.name == summary.attention_kernel else short_name(event.family)
        axis.broken_barh([(event.start - start, event.duration)], (0, 1), color=colour, edgecolor="white", label=label)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axis.set_yticks([])
    axis.set_title(
        f"{mode}: {summary.kernels_per_layer:.0f} kernels, {summary.us_per_layer:.1f} us between qkv_a and attention "
        "(GEMMs not counted)", fontsize=9,
    )  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or directory; a directory with config.json will do for dummy weights")
    parser.add_argument("--load-format", default="auto", help="vLLM's; dummy needs no weights (%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=8, help="sequences in the step (%(default)s)")
    parser.add_argument("--layers", type=positive_int, help="run only the first LAYERS layers (all)")
    parser.add_argument("--steps", type=positive_int, default=20, help="steps to record (%(default)s)")
    parser.add_argument("--engine-args", type=json_object, default={}, help="JSON of vLLM engine arguments")
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=["off", "on"], help="(off on)")
    parser.add_argument("--from-events", type=Path, metavar="DIR", help="take recorded events from DIR; needs no GPU")
    parser.add_argument("--attention", default=Patterns.attention, help="regular expression of attention kernels")
    parser.add_argument("--gemm", default=Patterns.gemm, help="regular expression of GEMM kernels")
    parser.add_argument(
        "--gemms-before-attention", type=positive_int, default=Patterns.gemms,
        help="GEMMs from qkv_a to attention, both it and the absorbed kv_b included (%(default)s)",
    )  # fmt: skip
    add_timeout(parser, 1800)
    add_out(parser)
    parser.add_argument("--record-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.from_events and not args.model:
        parser.error("give --model (recording, needs a GPU) or --from-events DIR (needs none)")
    return args


def main() -> None:
    """Records and reports; as its own child, records one mode."""
    args = parse_args()
    if args.record_to:
        record(args)
        return
    try:
        if args.from_events is None:
            check_gpu()
            args.out.mkdir(parents=True, exist_ok=True)
            record_modes(args)
        report(args, args.from_events or args.out)
    except (ChildError, SegmentationError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
