# SPDX-License-Identifier: Apache-2.0
"""The kernel's benchmark without a GPU: what it would time, and what it makes of a made-up report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from vllm_mla_fusion.tools import bench, bench_cells
from vllm_mla_fusion.tools.bench import Report, Row
from vllm_mla_fusion.tools.bench_cells import AFTER, BEFORE, WHOLE, Cell


@pytest.fixture
def report() -> Report:
    """Ratios 2 and 8; 1.5e12 bytes per second is what copying reaches."""
    rows = [
        Row(Cell(2, 16), 4.0, 8.0, 10.0),
        Row(Cell(64, 128, "fp8"), 2.0, 16.0, 20.0),
        Row(Cell(2, 16, norm=True), 5),
    ]
    return Report("a GPU", {"torch": "2"}, 30, 1.0, 1.5e12, rows)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, report: Report) -> list[tuple[list[Cell], int]]:
    """What `run` was called with; it returns the made-up report."""
    calls: list[tuple[list[Cell], int]] = []
    monkeypatch.setattr(bench, "run", lambda cells, replays: calls.append((cells, replays)) or report)
    return calls


@pytest.mark.parametrize(
    ("cell", "bytes_per_token"),
    [
        # q_pe both ways 16 * 64 * 2 * 2, k_pe both ways 256, kv_c 1024, 576 cache values, two int64, 64 of cos and sin.
        (Cell(3, 16), 4096 + 256 + 1024 + 576 * 2 + 16 + 128),
        (Cell(3, 16, "fp8"), 4096 + 256 + 1024 + 576 + 16 + 128),
        (Cell(3, 128, cos_sin_dtype=torch.float32), 32768 + 256 + 1024 + 1152 + 16 + 256),
        (Cell(3, 16, norm=True), 4096 + 256 + 1024 + 1152 + 16 + 128 + 1024),
        # q_c in 1536 * 2, out 1536 in fp8 with 12 scales, the latent's norm; or RoPE of the query with one int64.
        (Cell(3, 0, work=BEFORE, q_quant="group"), 3072 + 1536 + 48 + 256 + 1024 + 1152 + 16 + 128 + 1024),
        (Cell(3, 0, work=BEFORE), 3072 + 3072 + 256 + 1024 + 1152 + 16 + 128 + 1024),
        (Cell(3, 16, work=AFTER), 4096 + 8 + 128),
    ],
)
def test_bytes_moved(cell: Cell, bytes_per_token: int) -> None:
    assert cell.bytes_moved == 3 * bytes_per_token


def test_geometric_mean(report: Report) -> None:
    assert bench.geometric_mean(report) == pytest.approx(4.0)
    report.rows = report.rows[-1:]
    assert bench.geometric_mean(report) is None


def test_markdown(report: Report) -> None:
    head, _, header, _, *rows = bench.markdown(report).splitlines()
    assert head.startswith(
        "a GPU; torch 2; microseconds per call, CUDA graph, median of 30 replays; one-element kernel"
    )
    assert head.endswith("copy 1.50 TB/s; geometric mean: 4.00 times as fast as stock's.")
    assert header.endswith("| stock unfused | stock fused | ours | times as fast as stock's | of copy |")
    # 2 * 6672 bytes in 4 us, 64 * 34768 in 2 us.
    assert rows == [
        "| 2 | 16 | auto | bfloat16 gptj | 10.00 | 8.00 | 4.00 | 2.00 | 0% |",
        "| 64 | 128 | fp8 | bfloat16 gptj | 20.00 | 16.00 | 2.00 | 8.00 | 74% |",
        "| 2 | 16 | auto | bfloat16 gptj with norm | - | - | 5.00 | - | 0% |",
    ]


def test_everything_is_saved(report: Report, asked: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert bench.main(["--out", str(out)]) == 0
    assert (out / "kernel.md").read_text() == bench.markdown(report)
    assert (out / "kernel.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((out / "kernel.json").read_text())
    assert (data["gpu"], data["geometric_mean"]) == ("a GPU", pytest.approx(4.0))
    assert [row["times_as_fast_as_stock"] for row in data["rows"]] == [2.0, 8.0, None]
    assert data["rows"][1]["of_copy_bandwidth"] == pytest.approx(64 * 34768 / 2e-6 / 1.5e12)
    assert data["rows"][0]["cell"]["dtype"] == "torch.bfloat16"
    assert "no kernel.png" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (None, "pip install 'matplotlib"),
        ("--no-plot", "--no-plot"),
        ("--variants", "the whole op's sizes"),
        ("--around-q-b", "the whole op's sizes"),
    ],
)
def test_without_a_plot_the_results_are_saved(
    argument: str | None, reason: str, asked: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    if argument is None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert bench.main(["--out", str(tmp_path), *filter(None, [argument])]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel.json", "kernel.md"]
    said = capsys.readouterr().out.splitlines()
    assert "no kernel.png" in said[0], "before the run"
    assert "no plot" in said[-1]
    assert reason in said[0]
    assert reason in said[-1]


def test_any_sizes(asked: list) -> None:
    assert bench.main(["--tokens", "32", "7", "--heads", "4", "--replays", "2"]) == 0
    assert bench.main(["--variants", "--heads", "128"]) == 0
    assert bench.main([]) == 0
    (sizes, replays), (variants, _), (grid, _) = asked
    assert (sizes, replays) == ([Cell(t, 4, d) for d in ("auto", "fp8") for t in (32, 7)], 2)
    assert {(cell.num_tokens, cell.num_heads) for cell in variants} == {(64, 128), (4096, 128)}
    assert (len(variants), len(set(variants)), len(grid)) == (16, 16, 28)


def test_the_ops_around_q_b(asked: list) -> None:
    assert bench.main(["--around-q-b", "--heads", "16"]) == 0
    assert bench.main(["--around-q-b", "--tokens", "8"]) == 0
    (one, _), (other, _) = asked
    assert (len(one), len(other)) == (4 * 7 + 7, 4 + 2)
    assert {cell.work for cell in one} == {BEFORE, AFTER}


CALLS = [*bench_cells.around_q_b((3,), (2,)), *bench_cells.variants((3,), (2,)), Cell(300, 2, work=BEFORE)]


@pytest.mark.parametrize("cell", CALLS, ids=str)
def test_our_calls_write_what_the_work_is(cell: Cell) -> None:
    (tensors,) = bench_cells.sets(cell, 1, "cpu")
    for name in ("k_pe_out", "kv_c_normed_out", "q_c_out"):
        tensors[name].view(torch.uint8).fill_(0xFF)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    bench_cells.ours(cell)(tensors)
    rows = {"kv_cache", "k_pe_out"} | ({"kv_c_normed_out"} if cell.norm or cell.work == BEFORE else set())
    query = {"q_c_out"} | ({"q_scales"} if cell.q_quant in ("group", "token") else set())
    expected = {WHOLE: rows | {"q_pe"}, BEFORE: rows | query, AFTER: {"q_pe"}}[cell.work]
    assert {name for name in tensors if not same_bytes(tensors[name], before[name])} == expected


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("arguments", ["--tokens 0", "--heads -1", "--replays 0", "--tokens x", "--tokens"])
def test_sizes_that_mean_nothing(arguments: str, asked: list, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments.split())
    assert not asked
    name, *value = arguments.split()
    expected = (
        f"expected a whole number of at least 1, such as 64, got '{value[0]}'" if value else "expected at least one"
    )
    assert f"argument {name}: {expected}" in capsys.readouterr().err


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().err
