# SPDX-License-Identifier: Apache-2.0
"""Times the kernel on this GPU beside stock vLLM's ops, the launch floor and the copy bandwidth.

Every figure is the median over replays of a CUDA graph that holds many calls on rotating inputs, divided by the calls:
launch gaps count, the host does not. Inputs exceed the L2 cache together where a cell is large enough.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_mla_fusion import __version__, kernel
from vllm_mla_fusion.host import support
from vllm_mla_fusion.installation import install_extra
from vllm_mla_fusion.tools import bench_cells
from vllm_mla_fusion.tools.bench_cells import HEADS, KV_CACHE_DTYPES, TOKENS, VARIANT_HEADS, VARIANT_TOKENS, WHOLE, Cell

_MAX_CALLS, _MIN_CALLS, _MAX_SETS, _MAX_BYTES = 200, 20, 64, 8 << 30


@dataclass
class Row:
    """Microseconds per call; None where vLLM is not installed."""

    cell: Cell
    ours: float
    stock_fused: float | None = None
    stock_unfused: float | None = None

    @property
    def times_as_fast(self) -> float | None:
        """Stock over ours: its fused op, or, for work that it has no fused op for, its kernels for that."""
        stock = self.stock_fused if self.cell.work == WHOLE else self.stock_unfused
        return stock / self.ours if stock else None

    def bandwidth_share(self, copy_bandwidth: float) -> float:
        return self.cell.bytes_moved / (self.ours * 1e-6) / copy_bandwidth


@dataclass
class Report:
    """All rows with what they were measured on. `copy_bandwidth`: bytes read and written per second."""

    gpu: str
    versions: dict[str, str]
    replays: int
    floor: float
    copy_bandwidth: float
    rows: list[Row] = field(default_factory=list)


def _time(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Microseconds per call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / len(calls)


def _floor(replays: int) -> float:
    one = torch.zeros(1, device="cuda")
    return _time([lambda: one.add_(1)] * _MAX_CALLS, replays)


def _copy_bandwidth(replays: int) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    micros = _time([lambda: target.copy_(source)] * 4, replays)
    return 2 * source.numel() / (micros * 1e-6)


def measure_cell(cell: Cell, replays: int) -> Row:
    """Times one cell: ours, and stock vLLM's if it is installed, on the same inputs."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(
        _MAX_SETS, max(2, math.ceil(3 * l2_bytes / cell.bytes_moved)), max(2, _MAX_BYTES // (6 * cell.bytes_moved))
    )
    sets = list(bench_cells.sets(cell, count, "cuda"))
    num_calls = max(_MIN_CALLS, min(_MAX_CALLS, 4 * count))

    def time(function: bench_cells.TimedCall) -> float:
        return _time([lambda s=sets[i % count]: function(s) for i in range(num_calls)], replays)  # type: ignore[misc]

    row = Row(cell, time(bench_cells.ours(cell)))
    ops = bench_cells.stock_kernels()
    for column, call in (bench_cells.stock(cell, ops) if ops is not None else {}).items():
        setattr(row, column, time(call))
    return row


def run(cells: list[Cell], replays: int, say: Callable[[str], None] = print) -> Report:
    """Measures the cells on the current GPU.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("The benchmark needs a CUDA or ROCm GPU that torch can see; run `vllm-mla-fusion doctor`.")
    kernel.load()
    versions = {"vllm-mla-fusion": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if bench_cells.stock_kernels() is not None:
        versions["vllm"] = support.installed_vllm_version()
    report = Report(torch.cuda.get_device_name(), versions, replays, _floor(replays), _copy_bandwidth(replays))
    copy = report.copy_bandwidth / 1e12
    say(f"{report.gpu}, {versions}; one-element kernel {report.floor:.2f} us, copy {copy:.2f} TB/s")
    for index, cell in enumerate(cells):
        report.rows.append(measure_cell(cell, replays))
        say(f"[{index + 1}/{len(cells)}] {_line(report.rows[-1], report)}")
    return report


_RATIO = "times as fast as stock's"
_HEADER = ("tokens", "heads", "KV", "variant", "stock unfused", "stock fused", "ours", _RATIO, "of copy")


def _cells(row: Row, report: Report) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    cell = row.cell
    variant = [str(cell.dtype).removeprefix("torch."), "neox" if cell.is_neox else "gptj"]
    if cell.cos_sin_dtype != cell.dtype:
        variant.append("fp32 cos/sin")
    if cell.norm:
        variant.append("with norm")
    if cell.work != WHOLE:
        variant.append(cell.work)
    if cell.q_quant != "none":
        variant.append(f"{cell.q_quant} fp8")
    share = f"{row.bandwidth_share(report.copy_bandwidth):.0%}"
    return (
        str(cell.num_tokens), str(cell.num_heads), cell.kv_cache_dtype, " ".join(variant),
        number(row.stock_unfused), number(row.stock_fused), number(row.ours), number(row.times_as_fast), share,
    )  # fmt: skip


def _line(row: Row, report: Report) -> str:
    return "  ".join(f"{name} {value}" for name, value in zip(_HEADER, _cells(row, report), strict=True))


def geometric_mean(report: Report) -> float | None:
    """Of `times_as_fast`, over all rows that have it."""
    ratios = [row.times_as_fast for row in report.rows if row.times_as_fast]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def markdown(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    mean = geometric_mean(report)
    lines = [
        f"{report.gpu}; {versions}; microseconds per call, CUDA graph, median of {report.replays} replays; one-element "
        f"kernel {report.floor:.2f} us, device copy {report.copy_bandwidth / 1e12:.2f} TB/s"
        + (f"; geometric mean: {mean:.2f} {_RATIO}" if mean else "")
        + ".",
        "",
        "| " + " | ".join(_HEADER) + " |",
        "|" + "---|" * len(_HEADER),
        *("| " + " | ".join(_cells(row, report)) + " |" for row in report.rows),
    ]
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The report with what follows from it: the ratio and the share of the copy bandwidth per row, the mean ratio."""
    data = asdict(report) | {"geometric_mean": geometric_mean(report)}
    for row, found in zip(report.rows, data["rows"], strict=True):
        found["times_as_fast_as_stock"] = row.times_as_fast
        found["of_copy_bandwidth"] = row.bandwidth_share(report.copy_bandwidth)
    return data


def plot(report: Report, path: Path) -> None:
    """One panel per number of heads: time over tokens in the grid's cells, ours and stock, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heads = sorted({row.cell.num_heads for row in report.rows})
    figure, axes = pyplot.subplots(1, len(heads), figsize=(5.5 * len(heads), 4), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], heads, strict=True):
        for dtype, style in zip(KV_CACHE_DTYPES, ("-", "--"), strict=True):
            rows = [row for row in report.rows if row.cell.num_heads == count and row.cell.kv_cache_dtype == dtype]
            for name, color in (("stock_unfused", "tab:gray"), ("stock_fused", "tab:orange"), ("ours", "tab:blue")):
                points = [(row.cell.num_tokens, getattr(row, name)) for row in rows if getattr(row, name)]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), style, color=color, marker="o", ms=3, label=f"{name}, KV {dtype}"
                    )
        axis.axhline(report.floor, color="k", lw=0.8, ls=":", label="one-element kernel")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{count} heads, {report.gpu}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("microseconds per call")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def save(report: Report, folder: Path, draw: bool) -> None:
    """Writes kernel.md, kernel.json and, if asked, kernel.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.md").write_text(markdown(report))
    (folder / "kernel.json").write_text(json.dumps(as_json(report), indent=1, default=str))
    if draw:
        plot(report, folder / "kernel.png")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, such as 64, got {text!r}")
    return int(text)


def _no_plot(options: argparse.Namespace) -> str:
    """Why there will be no plot; empty if there will be one."""
    if options.no_plot:
        return "--no-plot"
    if options.variants or options.around_q_b:
        return "it shows the whole op's sizes; the table has the rest"
    if importlib.util.find_spec("matplotlib") is None:
        return f"it needs matplotlib: {install_extra('bench')}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """The command `vllm-mla-fusion bench`."""
    parser = argparse.ArgumentParser(prog="vllm-mla-fusion bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=_positive, nargs="+", help=f"default: {TOKENS}; variants {VARIANT_TOKENS}")
    parser.add_argument("--heads", type=_positive, nargs="+", help=f"default: {HEADS}; variants {VARIANT_HEADS}")
    parser.add_argument("--variants", action="store_true", help="time the other pairings and types instead of the grid")
    parser.add_argument(
        "--around-q-b", action="store_true", help="time the ops of models with q-LoRA instead of the grid"
    )
    parser.add_argument(
        "--replays", type=_positive, default=30, help="graph replays per figure, of which the median is taken"
    )
    parser.add_argument("--out", type=Path, help="folder for kernel.md, kernel.json and kernel.png")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(arguments)
    sizes = {name: value for name in ("tokens", "heads") if (value := getattr(options, name))}
    choose = bench_cells.variants if options.variants else bench_cells.grid
    cells = (bench_cells.around_q_b if options.around_q_b else choose)(**sizes)
    no_plot = _no_plot(options)
    if options.out and no_plot:
        print(f"There will be no kernel.png: {no_plot}.")
    try:
        report = run(cells, options.replays)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n" + markdown(report))
    if options.out:
        save(report, options.out, draw=not no_plot)
        ending = f"no plot: {no_plot}" if no_plot else "kernel.png"
        print(f"Written to {options.out}: kernel.md, kernel.json; {ending}.")
    return 0
