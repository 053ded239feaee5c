# SPDX-License-Identifier: Apache-2.0
"""Finds steps and MLA layers in the recorded kernels of decode steps, for profile_decode.py. Needs no GPU.

Attention is the anchor: its kernel runs once per MLA layer. Walking back from it over a known number of GEMMs gives the
layer's qkv_a GEMM. Kernels that run once per step tell how many layers a step has.
"""

from __future__ import annotations

import bisect
import collections
import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from _common import markdown_table


class SegmentationError(RuntimeError):
    """The recording has no pattern that looks like MLA layers; the message says which option may help."""


class Event(NamedTuple):
    """One kernel: start and duration in microseconds, and its name."""

    start: float
    duration: float
    name: str

    @property
    def end(self) -> float:
        """When it ended, in microseconds."""
        return self.start + self.duration

    @property
    def family(self) -> str:
        """The name without the number that Inductor gives a kernel within its graph: layers differ in it."""
        return re.sub(r"^(triton_\w+?)_\d+$", r"\1_*", self.name)


@dataclass(frozen=True)
class Patterns:
    """Regular expressions that tell kernels apart, searched without regard to case in the head of the kernel name.

    Args:
        gemms: GEMMs from qkv_a to attention. Three with stock vLLM: qkv_a and q_b (or kv_a and q), then absorbed kv_b.
    """

    attention: str = r"mla|attn|attention|fmha|flash_fwd|_fwd_grouped_kernel_stage1"
    gemm: str = r"gemm|gemv|nvjet|bmm|cijk_|wvsplitk|matmul|splitk_?reduce|triton_tem_"
    gemms: int = 3
    not_attention: str = (
        r"cache|concat|combine|metadata|prepare_|stage2|norm|quant|rotary|(?<![a-z])rope|triton_[a-z]+_fused"
    )
    continues_gemm: str = r"splitk_?reduce"

    def is_gemm(self, name: str) -> bool:
        """Whether the kernel is a matrix product or the reduction that ends one."""
        return _matches(self.gemm, name) and not self.is_attention(name)

    def starts_gemm(self, name: str) -> bool:
        """Whether the kernel begins a matrix product."""
        return self.is_gemm(name) and not _matches(self.continues_gemm, name)

    def is_attention(self, name: str) -> bool:
        """Whether the kernel may be decode attention itself."""
        return _matches(self.attention, name) and not _matches(self.not_attention, name)


def _matches(pattern: str, name: str) -> bool:
    # Template parameters further on name types of other kernels.
    return bool(re.search(pattern, name[:120], re.IGNORECASE))


@dataclass(frozen=True)
class Layer:
    """Positions of one MLA layer: [qkv_a GEMM, attention), and the next layer's qkv_a GEMM, where it ends."""

    qkv_a: int
    attention: int
    end: int


@dataclass(frozen=True)
class KernelRow:
    """A kernel between the qkv_a GEMM and attention."""

    name: str
    per_layer: float
    us_per_layer: float


@dataclass(frozen=True)
class DecodeSummary:
    """What one recording says; times in microseconds.

    Args:
        same_pattern: share of the layers whose kernels up to attention are those of most layers.
        rows: kernels between the qkv_a GEMM and attention, GEMMs left out, in the order in which they run.
        gemms_per_layer, gemm_us_per_layer: the GEMMs from qkv_a to attention, for reference.
        to_attention_us: from the end of the qkv_a GEMM to the start of attention (median over layers).
        pause_us: from the end of a kernel to the start of the next, up to attention (median).
        layer_us: from the qkv_a GEMM of a layer to that of the next (median).
        busy_us_per_step: time in which at least one kernel ran.
        layer_events: the kernels of the layer of median length, for the picture.
    """

    attention_kernel: str
    steps: int
    layers: int
    same_pattern: float
    rows: list[KernelRow]
    gemms_per_layer: float
    gemm_us_per_layer: float
    to_attention_us: float
    pause_us: float
    kernels_per_step: float
    layer_us: float
    busy_us_per_step: float
    layer_events: list[Event]

    @property
    def kernels_per_layer(self) -> float:
        """Kernels between the qkv_a GEMM and attention, GEMMs not counted."""
        return sum(row.per_layer for row in self.rows)

    @property
    def us_per_layer(self) -> float:
        """Their time per layer, in microseconds."""
        return sum(row.us_per_layer for row in self.rows)


def summarise(events: Sequence[Event], patterns: Patterns) -> DecodeSummary:
    """Segments a recording and adds it up over its complete steps.

    Args:
        events: kernels of at least two decode steps, sorted by start.

    Raises:
        SegmentationError: no attention kernel, less than two steps, or fewer GEMMs before attention than expected.
    """
    attention = attention_kernel(events, patterns)
    anchors = [i for i, event in enumerate(events) if event.name == attention]
    per_step = layers_per_step(events, anchors)
    steps = (len(anchors) - 1) // per_step
    if steps == 0:
        raise SegmentationError("only one decode step was recorded; record at least two (--steps)")
    # From one anchor to the same anchor `steps` steps later: whole steps, wherever the recording was cut.
    anchors = anchors[-steps * per_step - 1 :]
    layers = find_layers(events, anchors, patterns)
    # The recording's last layer is cut at attention.
    whole = layers[:-1] or layers
    windows = [events[layer.qkv_a : layer.attention] for layer in layers]
    names = [tuple(event.family for event in window) for window in windows]
    pauses = [after.start - before.end for window in windows for before, after in itertools.pairwise(window)]
    usual, usual_count = collections.Counter(names).most_common(1)[0]
    rows, gemms = _add_up(windows, patterns)
    span = events[anchors[0] : anchors[-1]]
    return DecodeSummary(
        attention_kernel=attention,
        steps=steps,
        layers=per_step,
        same_pattern=usual_count / len(windows),
        rows=rows,
        gemms_per_layer=gemms.per_layer,
        gemm_us_per_layer=gemms.us_per_layer,
        to_attention_us=statistics.median(
            events[layer.attention].start - _end_of_qkv_a(events, layer, patterns) for layer in layers
        ),
        pause_us=statistics.median(pauses),
        kernels_per_step=len(span) / steps,
        layer_us=statistics.median(_length(events, layer) for layer in whole),
        busy_us_per_step=busy_time(span) / steps,
        layer_events=_median_layer(events, [x for x, found in zip(whole, names, strict=False) if found == usual]),
    )


def attention_kernel(events: Sequence[Event], patterns: Patterns) -> str:
    """The attention kernel: of the kernels that may be it the most frequent, then the longest.

    Raises:
        SegmentationError: there is none.
    """
    counts: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        counts[event.name] += 1
        times[event.name] += event.duration
    candidates = [name for name in counts if patterns.is_attention(name)]
    if not candidates:
        frequent = "\n  ".join(short_name(name) for name, _ in times.most_common(20))
        raise SegmentationError(
            f"no attention kernel found; name it with --attention REGEX. Longest kernels:\n  {frequent}"
        )
    return max(candidates, key=lambda name: (counts[name], times[name]))


def layers_per_step(events: Sequence[Event], anchors: Sequence[int]) -> int:
    """How many anchors a step has: the usual number of them between two runs of kernels that run once per step."""
    positions = collections.defaultdict(list)
    for i, event in enumerate(events):
        positions[event.name].append(i)
    votes: collections.Counter[int] = collections.Counter()
    for places in positions.values():
        before = [bisect.bisect(anchors, place) for place in places]
        distances = collections.Counter(b - a for a, b in itertools.pairwise(before) if b > a)
        # Kernels of every layer come back after one anchor and say nothing about steps.
        if distances and 1 not in distances:
            votes[distances.most_common(1)[0][0]] += 1
    return votes.most_common(1)[0][0] if votes else 1


def find_layers(events: Sequence[Event], anchors: Sequence[int], patterns: Patterns) -> list[Layer]:
    """The layers between the first and the last anchor; `anchors` are positions of the attention kernel.

    Raises:
        SegmentationError: there are fewer GEMMs between two attention kernels than from qkv_a to attention.
    """
    starts = []
    for previous, anchor in itertools.pairwise(anchors):
        gemms = [i for i in range(previous + 1, anchor) if patterns.starts_gemm(events[i].name)]
        if len(gemms) < patterns.gemms:
            names = "\n  ".join(short_name(event.name) for event in events[previous : anchor + 1])
            raise SegmentationError(
                f"expected at least {patterns.gemms} GEMMs between two attention kernels, found {len(gemms)}; "
                f"see --gemm and --gemms-before-attention. Kernels:\n  {names}"
            )
        starts.append(gemms[-patterns.gemms])
    # The last window has no successor that ends its layer; its own attention does.
    ends = [*starts[1:], anchors[-1]]
    return [Layer(start, anchor, end) for start, anchor, end in zip(starts, anchors[1:], ends, strict=True)]


def busy_time(events: Sequence[Event]) -> float:
    """Microseconds in which at least one of the events ran; `events` are sorted by start."""
    busy, covered_until = 0.0, float("-inf")
    for event in events:
        busy += max(0.0, event.end - max(event.start, covered_until))
        covered_until = max(covered_until, event.end)
    return busy


def _add_up(windows: Sequence[Sequence[Event]], patterns: Patterns) -> tuple[list[KernelRow], KernelRow]:
    counts: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for window in windows:
        for event in window:
            counts[event.family] += 1
            times[event.family] += event.duration
    n = len(windows)
    rows = [KernelRow(name, counts[name] / n, times[name] / n) for name in counts]
    gemms = [row for row in rows if patterns.is_gemm(row.name)]
    started = sum(row.per_layer for row in gemms if patterns.starts_gemm(row.name))
    others = [row for row in rows if not patterns.is_gemm(row.name)]
    return others, KernelRow("GEMMs", started, sum(row.us_per_layer for row in gemms))


def _end_of_qkv_a(events: Sequence[Event], layer: Layer, patterns: Patterns) -> float:
    last = layer.qkv_a
    while patterns.is_gemm(events[last + 1].name) and not patterns.starts_gemm(events[last + 1].name):
        last += 1
    return events[last].end


def _length(events: Sequence[Event], layer: Layer) -> float:
    return events[layer.end].start - events[layer.qkv_a].start


def _median_layer(events: Sequence[Event], layers: Sequence[Layer]) -> list[Event]:
    ordered = sorted(layers, key=lambda layer: _length(events, layer))
    layer = ordered[len(ordered) // 2]
    return list(events[layer.qkv_a : layer.end])


def short_name(name: str, width: int = 60) -> str:
    """A kernel name without return type, arguments and template parameters; generic kernels keep what they apply."""
    plain = re.sub(r"^std::enable_if<.*?>::type |^void |\(anonymous namespace\)::|at::native::", "", name)
    base = re.split(r"[<(]", plain, maxsplit=1)[0]
    inner = re.search(r"(\w+_kernel_cuda|\w+Functor|CatArray\w+|FlashAttn\w+|Sm\d+\w*(?:Mla|Fmha|Gemm)\w*)", plain)
    if inner and re.search(r"device_kernel|elementwise_kernel|reduce_kernel", base):
        base += f"<{inner[1]}>"
    return base if len(base) <= width else f"{base[: width - 1]}…"


def markdown(summaries: dict[str, DecodeSummary]) -> str:
    """Two tables: the modes side by side, then each mode's kernels between the qkv_a GEMM and attention."""
    return "\n\n".join([_overview(summaries), _kernel_table(summaries), *_remarks(summaries)])


def _overview(summaries: dict[str, DecodeSummary]) -> str:
    figures = {
        "kernels between qkv_a and attention, per layer": lambda s: f"{s.kernels_per_layer:.2f}",
        "their time per layer, us": lambda s: f"{s.us_per_layer:.2f}",
        "kernels between qkv_a and attention, per step": lambda s: f"{s.kernels_per_layer * s.layers:.1f}",
        "their time per step, us": lambda s: f"{s.us_per_layer * s.layers:.1f}",
        "end of qkv_a to start of attention, us (median)": lambda s: f"{s.to_attention_us:.2f}",
        "pause between two of these kernels, us (median)": lambda s: f"{s.pause_us:.2f}",
        "qkv_a to the next layer's qkv_a, us (median)": lambda s: f"{s.layer_us:.2f}",
        "all kernels per step": lambda s: f"{s.kernels_per_step:.1f}",
        "GPU busy per step, us": lambda s: f"{s.busy_us_per_step:.1f}",
    }
    rows = [[text, *(figure(s) for s in summaries.values())] for text, figure in figures.items()]
    return markdown_table(["One decode step (GEMMs not counted in the first four)", *summaries], rows)


def _kernel_table(summaries: dict[str, DecodeSummary]) -> str:
    rows = []
    for mode, summary in summaries.items():
        n = summary.layers
        for row in summary.rows:
            cells = _cells(row.per_layer, row.us_per_layer, n)
            rows.append([f"{mode}: `{short_name(row.name)}`", *cells])
        rows.append([f"{mode}: **sum**", *_cells(summary.kernels_per_layer, summary.us_per_layer, n)])
        gemms = _cells(summary.gemms_per_layer, summary.gemm_us_per_layer, n)
        rows.append([f"{mode}: not counted: GEMMs, qkv_a included", *gemms])
    return markdown_table(["Kernel", "per layer", "us per layer", "per step", "us per step"], rows)


def _cells(per_layer: float, us_per_layer: float, layers: int) -> list[str]:
    return [f"{per_layer:.2f}", f"{us_per_layer:.2f}", f"{per_layer * layers:.1f}", f"{us_per_layer * layers:.1f}"]


def _remarks(summaries: dict[str, DecodeSummary]) -> list[str]:
    return [
        f"{mode}: {s.layers} MLA layers per step, mean of {s.steps} steps; {s.same_pattern:.0%} of the layers show the "
        f"same kernels; attention is `{short_name(s.attention_kernel)}`."
        for mode, s in summaries.items()
    ]
