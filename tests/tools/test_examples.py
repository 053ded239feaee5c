# SPDX-License-Identifier: Apache-2.0
"""The examples: each starts, their statistics are right, and the accuracy example finds tiny-mla unharmed."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import decode_recording as made
import pytest
import torch
from engine_run import MODEL

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import _common  # noqa: E402
import benchmark_serving  # noqa: E402
import gsm8k_accuracy  # noqa: E402
import same_text  # noqa: E402
from _decode_events import Event, Patterns, SegmentationError, busy_time, short_name, summarise  # noqa: E402

SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("_"))


def as_in_the_readme(script: str) -> list[str]:
    """The command with which a README calls a script, to be run as it stands there: in a checkout, with MODEL set."""
    texts = [path.read_text() for path in (ROOT / "README.md", EXAMPLES / "README.md")]
    (command, *others) = [
        line for text in texts for line in re.findall(rf"(?:python|bash) examples/{script}[^`#\n]*", text)
    ]
    assert not others
    return ["bash", "-c", f"cd {ROOT} && {command}"]


def engine_environment(model: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "MODEL": str(model.resolve()), "VLLM_CPU_KVCACHE_SPACE": "1"}


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    result = run(sys.executable, EXAMPLES / script, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_serve_script_help() -> None:
    result = run("bash", EXAMPLES / "serve.sh", "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


@pytest.mark.parametrize(("distribution", "server"), [("vllm", "vllm serve m"), ("vllm-cpu", "-m vllm.entrypoints.")])
def test_serve_script_starts_the_server_that_is_installed(distribution: str, server: str, tmp_path: Path) -> None:
    for name in ("vllm", "python"):
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && case "$2" in *\\"{distribution}\\"*) exit 0;; *) exit 1;; esac\n'
            f'echo "MLA_FUSION=$MLA_FUSION {name} $*"\nexit 3\n'
        )
        script.chmod(0o755)
    result = run("bash", EXAMPLES / "serve.sh", "m", "--max-model-len", 64, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 1
    command, where = result.stdout.splitlines()
    assert command.startswith("MLA_FUSION=1 ")
    assert server in command
    assert command.endswith("--served-model-name mla --max-model-len 64")
    log = Path(re.match(r"its log is (\S+);", where)[1])
    assert log.read_text().startswith("MLA_FUSION=1 ")
    log.unlink()
    assert result.stderr.startswith("the server ended before it was ready:\n")


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="vllm-cpu only")
def test_serve_script() -> None:
    """As printed: a server, one answer, no server."""
    environment = engine_environment(MODEL) | {"PORT": str(_common.free_port())}
    result = run(*as_in_the_readme("serve.sh"), **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    *said, fused, answer = result.stdout.splitlines()
    assert len(said) < 20
    assert "6 of 6 MLA layers fused" in fused
    assert json.loads(answer)["choices"][0]["text"].strip().endswith("#### 23")


# --- _common ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "value"), [("off", None), ("upstream", None), ("on", "1"), ("strict", "strict")])
def test_environment_sets_only_the_mode(mode: str, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION", "left over")
    assert _common.environment(mode).get("MLA_FUSION") == value


def test_merged_keeps_nested_values_and_its_arguments() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert _common.merged(base, {"a": {"y": 4}, "b": {"z": 5}}) == {"a": {"x": 1, "y": 4}, "b": {"z": 5}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}


def test_failed_child_shows_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('the cause'); sys.exit(3)"]
    with pytest.raises(_common.ChildError, match=r"exit code 3(.|\n)*the cause"):
        _common.run_logged(command, os.environ, tmp_path / "log")


WAITS_FOR_EVER = """
import subprocess, sys, time
print("RuntimeError: the worker cannot start", flush=True)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_an_engine_that_waits_for_ever_is_ended_with_its_workers(tmp_path: Path, capsys) -> None:
    log = tmp_path / "log"
    began = time.monotonic()
    with pytest.raises(_common.ChildError, match=r"not done after 3 s, the limit of --timeout(.|\n)*cannot start"):
        _common.run_logged([sys.executable, "-c", WAITS_FOR_EVER], os.environ, log, timeout=3)
    assert time.monotonic() - began < 30
    worker = Path("/proc") / log.read_text().split()[-1] / "stat"

    def is_gone() -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return worker.read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    # It is killed, but on a busy machine not yet dead.
    while not is_gone() and time.monotonic() - began < 30:
        time.sleep(0.1)
    assert is_gone()


@pytest.mark.parametrize("script", ["same_text.py", "profile_decode.py", "gsm8k_accuracy.py"])
def test_scripts_that_start_engines_have_a_limit(script: str) -> None:
    told = run(sys.executable, EXAMPLES / script, "--help").stdout
    assert re.search(r"--timeout TIMEOUT\s+seconds for each engine's start and\s+run", told)


FAILED_ENGINE = """\
INFO 11-27 09:00:00 [model.py:1] Resolved architecture: DeepseekV2ForCausalLM
(EngineCore pid=12) ERROR 11-27 09:00:01 [core.py:900] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-27 09:00:01 [core.py:900]   File "/x/core.py", line 1, in run
(EngineCore pid=12) ERROR 11-27 09:00:01 [core.py:900]     raise ValueError(
(EngineCore pid=12) ERROR 11-27 09:00:01 [core.py:900] ValueError: Available memory 1.2 GiB is less than desired
(EngineCore pid=12) Traceback (most recent call last):
(EngineCore pid=12)   File "/x/core.py", line 1, in run
(EngineCore pid=12) ValueError: Available memory 1.2 GiB is less than desired
Traceback (most recent call last):
  File "/x/llm.py", line 7, in main
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, No config.json in /x
    For further information visit https://errors.pydantic.dev
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_cause_of_a_failed_engine_without_its_tracebacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(FAILED_ENGINE)
    expected = """\
ValueError: Available memory 1.2 GiB is less than desired
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, No config.json in /x
    For further information visit https://errors.pydantic.dev
"""
    result = run(sys.executable, EXAMPLES / "_cause.py", log)
    assert result.stdout == expected
    log.write_text("nothing\nof the kind")
    assert run(sys.executable, EXAMPLES / "_cause.py", log).stdout == "nothing\nof the kind\n"


def test_a_long_run_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(_common, "STILL_RUNNING_SECONDS", 0.1)
    _common.run_logged([sys.executable, "-c", "import time; time.sleep(0.5)"], os.environ, tmp_path / "log")
    assert re.fullmatch(r"(  \.\.\. \d s\n)+", capsys.readouterr().out)


@pytest.mark.parametrize(("number", "text"), [(0, "0 pairs"), (1, "1 pair"), (2, "2 pairs")])
def test_counted(number: int, text: str) -> None:
    assert _common.counted(number, "pair") == text


def test_fusion_line_prefers_the_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x\nINFO [report.py:81] MLA fusion 0.1.0 (cpu): 6 of 6 MLA layers fused.\nMLA fusion later\n")
    assert _common.fusion_line(log) == "MLA fusion 0.1.0 (cpu): 6 of 6 MLA layers fused."
    log.write_text("nothing\n")
    assert _common.fusion_line(log) == ""


@pytest.mark.parametrize("text", ["{", "[1]", "dtype=auto"])
def test_json_arguments_are_checked(text: str) -> None:
    result = run(sys.executable, EXAMPLES / "gsm8k_accuracy.py", "--model", "m", "--model-args", text)
    assert result.returncode == 2
    assert "expected a JSON object" in result.stderr


# --- gsm8k_accuracy ---------------------------------------------------------------------------------------------------


def lm_eval_run(strict: list[int], flexible: list[int], texts: list[str]) -> dict:
    samples = {
        str(i): {"generation": text, "strict-match": bool(s), "flexible-extract": bool(f)}
        for i, (s, f, text) in enumerate(zip(strict, flexible, texts, strict=True))
    }
    results = {}
    for name, right in {"strict-match": strict, "flexible-extract": flexible}.items():
        share, n = sum(right) / len(right), len(right)
        results[f"exact_match,{name}"] = share
        results[f"exact_match_stderr,{name}"] = math.sqrt(share * (1 - share) / (n - 1))
    return {"samples": samples, "results": results, "plugin": "", "table": ""}


def test_comparison_counts_pairs() -> None:
    off = lm_eval_run([1, 1, 1, 0, 0, 1, 1, 1], [1] * 8, list("abcdefgh"))
    on = lm_eval_run([1, 0, 0, 1, 0, 0, 1, 1], [1] * 8, list("abcdXXXh"))
    strict = gsm8k_accuracy.compare(off, on, "strict-match")
    assert (strict.n, strict.only_off, strict.only_on) == (8, 3, 1)
    assert strict.difference == pytest.approx(strict.on - strict.off) == pytest.approx(-0.25)
    differences = [0, -1, -1, 1, 0, -1, 0, 0]
    variance = sum((d + 0.25) ** 2 for d in differences) / 7
    assert strict.stderr_difference == pytest.approx(math.sqrt(variance / 8))
    assert strict.p_value == pytest.approx(2 * (1 + 4) / 2**4)  # two-sided: 1 or fewer of 4 coins, doubled
    flexible = gsm8k_accuracy.compare(off, on, "flexible-extract")
    assert (flexible.difference, flexible.stderr_difference, flexible.p_value) == (0, 0, 1)
    assert gsm8k_accuracy.identical_share(off, on) == 5 / 8


def test_mcnemar_needs_disagreement_to_be_uneven() -> None:
    assert gsm8k_accuracy.mcnemar_exact(0, 0) == 1
    assert gsm8k_accuracy.mcnemar_exact(7, 7) == 1
    assert gsm8k_accuracy.mcnemar_exact(0, 10) == pytest.approx(2 / 2**10)
    assert gsm8k_accuracy.mcnemar_exact(10, 0) == pytest.approx(2 / 2**10)


def test_runs_over_different_problems_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same problems, got 2 and 3"):
        gsm8k_accuracy.compare(
            lm_eval_run([1, 1], [1, 1], ["a", "b"]), lm_eval_run([1, 1, 0], [1, 1, 1], ["a", "b", "c"]), "strict-match"
        )


def test_missing_local_data_is_said_before_anything_starts(tmp_path: Path) -> None:
    result = run(sys.executable, EXAMPLES / "gsm8k_accuracy.py", "--model", "m", "--offline-data", tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path / 'train.jsonl'} does not exist" in result.stderr


@pytest.mark.engine
def test_accuracy_of_tiny_mla(tmp_path: Path) -> None:
    """Four problems with five shots, off and fused, each in an engine of its own."""
    result = run(
        sys.executable, EXAMPLES / "gsm8k_accuracy.py", "--model", MODEL, "--offline-data", MODEL, "--limit", 4,
        "--model-args", '{"max_model_len": 2048}', "--out", tmp_path, VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("|gsm8k|") == 2
    data = json.loads((tmp_path / "gsm8k.json").read_text())
    assert "6 of 6 MLA layers fused" in data["plugin"]
    for comparison in data["comparisons"]:
        assert (comparison["n"], comparison["off"], comparison["on"]) == (4, 1.0, 1.0)
    assert data["identical_generations"] == 1.0
    assert "MLA fusion" not in (tmp_path / "run_off.log").read_text()


# --- profile_decode ---------------------------------------------------------------------------------------------------


def recorded(model: str, mode: str) -> list[Event]:
    """A recording of a GPU as it is kept here: each event refers to a list of kernel names."""
    data = json.loads((Path(__file__).parent / "data" / f"decode_{model}_{mode}.json").read_text())
    return [Event(start, duration, data["names"][name]) for start, duration, name in data["events"]]


def family(name: str) -> str:
    return Event(0, 0, name).family


def summary(mode: str, **kwargs: int) -> object:
    return summarise([Event(*event) for event in made.recording(mode, **kwargs)], Patterns())


@pytest.mark.parametrize("cut", [0, 1, 9, 17])
@pytest.mark.parametrize("layers", [1, 2, 4, 27])
def test_decode_is_segmented_wherever_it_was_cut(layers: int, cut: int) -> None:
    off, on = (summary(mode, layers=layers, steps=5, cut=cut) for mode in ("off", "on"))
    assert (off.layers, on.layers) == (layers, layers)
    assert off.attention_kernel == made.ATTENTION
    # One norm more than rope and cache: that of q_a and kv_a.
    assert [row.name for row in off.rows] == [family(name) for name in [made.NORM, *made.BEFORE_ATTENTION["off"]]]
    assert [row.name for row in on.rows] == [family(made.NORM), made.FUSED]
    assert {row.per_layer for row in [*off.rows, *on.rows]} == {1.0}
    assert off.us_per_layer == pytest.approx(1.75 + 1.5 + 2.5 + 2.0)
    assert on.us_per_layer == pytest.approx(1.75 + 2.25)
    assert off.kernels_per_step == len(made.step("off", layers))
    assert off.kernels_per_step - on.kernels_per_step == 2 * layers
    assert (off.gemms_per_layer, off.same_pattern) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("model", "layers", "off_kernels", "on_kernels"),
    [
        ("v2lite", 27, ["poi", "per", "concat_and_cache_mla_kernel"], ["per", "mla_rope_cache_vector"]),
        ("v3rank", 16, ["poi", "red", "poi", "concat_and_cache_mla_kernel"], ["red", "mla_rope_cache_vector"]),
    ],
)
def test_decode_recorded_on_a_gpu(model: str, layers: int, off_kernels: list[str], on_kernels: list[str]) -> None:
    """Two to three steps of stock vLLM on an sm_90 GPU: DeepSeek-V2-Lite without q_lora, a rank of V3 with it."""
    for mode, kernels in {"off": off_kernels, "on": on_kernels}.items():
        found = summarise(recorded(model, mode), Patterns())
        assert (found.layers, found.gemms_per_layer) == (layers, 3.0)
        assert found.same_pattern > 0.95
        assert "FlashAttnFwdSm90" in found.attention_kernel
        assert [row.per_layer for row in found.rows] == [1.0] * len(kernels)
        assert all(kernel in row.name for kernel, row in zip(kernels, found.rows, strict=True))
        assert 1 < found.us_per_layer / len(kernels) < 3


def test_decode_gap_and_busy_time() -> None:
    off = summary("off")
    # From the end of split-K's reduction: norm, GEMM, three kernels, GEMM, and seven pauses of half a microsecond.
    assert off.to_attention_us == pytest.approx(1.75 + 4 + 1.5 + 2.5 + 2.0 + 4 + 7 * 0.5)
    assert off.pause_us == 0.5
    durations = [made.DURATIONS.get(name, 4.0) for name in made.step("off", 4)]
    assert off.busy_us_per_step == pytest.approx(sum(durations))
    last_layer = made.layer("off", is_first=False)
    assert off.layer_us == pytest.approx(sum(made.DURATIONS.get(name, 4.0) + 0.5 for name in last_layer))


def test_decode_picture_shows_a_whole_layer() -> None:
    events = summary("off").layer_events
    assert [event.name for event in events[:2]] == [made.GEMM, made.SPLIT_K]
    assert [event.name for event in events].count(made.ATTENTION) == 1
    assert events[-1].name == made.NORM


def test_busy_time_counts_overlap_once() -> None:
    assert busy_time([Event(0, 10, "a"), Event(2, 3, "b"), Event(8, 4, "c"), Event(20, 1, "d")]) == 13


def test_decode_without_attention_says_what_to_do() -> None:
    events = [Event(start, duration, name.replace("Attn", "X")) for start, duration, name in made.recording("off")]
    with pytest.raises(SegmentationError, match="--attention REGEX"):
        summarise(events, Patterns())


def test_decode_with_too_few_gemms_says_what_to_do() -> None:
    events = [Event(*event) for event in made.recording("off")]
    with pytest.raises(SegmentationError, match="--gemms-before-attention"):
        summarise(events, Patterns(gemms=9))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (made.ATTENTION, "cutlass::device_kernel<FlashAttnFwdSm90>"),
        (made.STOCK_WRITER, "vllm::concat_and_cache_mla_kernel"),
        (made.FUSED, "mla_rope_cache_vector"),
        (made.NORM, made.NORM),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, float>(Params)", "internal::gemvx::kernel"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(X&)::{lambda()#1}>(int)",
            "elementwise_kernel<direct_copy_kernel_cuda>",
        ),
        ("x" * 99, "x" * 59 + "…"),
    ],
)
def test_short_names(name: str, expected: str) -> None:
    assert short_name(name) == expected


def test_profile_from_events(tmp_path: Path) -> None:
    """One file as the script records it, one bare list."""
    facts = {"model": "m", "batch": 8, "wall_us": 900.0, "measured_on": {"device": "a GPU"}, "plugin": ""}
    (tmp_path / "events_off.json").write_text(json.dumps({**facts, "events": made.recording("off")}))
    (tmp_path / "ev_on.json").write_text(json.dumps(made.recording("on")))
    out = tmp_path / "out"
    result = run(sys.executable, EXAMPLES / "profile_decode.py", "--from-events", tmp_path, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "| kernels between qkv_a and attention, per layer | 4.00 | 2.00 |" in result.stdout
    assert "| off: `vllm::concat_and_cache_mla_kernel` | 1.00 | 2.00 | 4.0 | 8.0 |" in result.stdout
    assert "| on: `mla_rope_cache_vector` | 1.00 | 2.25 | 4.0 | 9.0 |" in result.stdout
    assert (out / "profile_decode.md").read_text().strip() in result.stdout
    assert json.loads((out / "profile_decode.json").read_text())["on"]["layers"] == 4
    assert (out / "profile_decode.png").read_bytes().startswith(b"\x89PNG")


def test_profile_says_that_recording_needs_a_gpu() -> None:
    result = run(sys.executable, EXAMPLES / "profile_decode.py", "--model", "m", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1
    assert "needs a GPU" in result.stderr


def test_profile_of_an_empty_folder(tmp_path: Path) -> None:
    result = run(sys.executable, EXAMPLES / "profile_decode.py", "--from-events", tmp_path)
    assert result.returncode == 1
    assert "has no events_MODE.json" in result.stderr


# --- benchmark_serving ------------------------------------------------------------------------------------------------


def pairs(key: str, off: list[float], on: list[float]) -> list[dict[str, dict[str, float]]]:
    return [{"off": {key: a}, "on": {key: b}} for a, b in zip(off, on, strict=True)]


TPOT = benchmark_serving.Metric("mean_tpot_ms", "TPOT")
THROUGHPUT = benchmark_serving.Metric("output_throughput", "throughput", higher_is_better=True)


def test_one_percent_shows_when_pairs_agree() -> None:
    """Drift of 10 % between pairs does not hide 1 % within them."""
    off = [10.0, 10.2, 10.5, 10.7, 11.0]
    on = [a * factor for a, factor in zip(off, [0.99, 0.991, 0.989, 0.9895, 0.9905], strict=True)]
    change = benchmark_serving.compare(TPOT, pairs(TPOT.key, off, on))
    assert change.percent == pytest.approx(-1.0, abs=0.02)
    low, high = change.interval
    assert -1.2 < low < change.percent < high < -0.8
    assert change.verdict == "better"
    assert change.off == (10.5, 10.0, 11.0)


def test_noise_is_called_noise() -> None:
    change = benchmark_serving.compare(TPOT, pairs(TPOT.key, [10, 10, 10, 10], [9.5, 10.6, 9.9, 10.1]))
    assert change.verdict == "within noise"


def test_more_throughput_is_better_and_less_is_worse() -> None:
    up = pairs(THROUGHPUT.key, [100, 100, 100], [105, 105.2, 104.9])
    down = [{"off": pair["on"], "on": pair["off"]} for pair in up]
    assert benchmark_serving.compare(THROUGHPUT, up).verdict == "better"
    assert benchmark_serving.compare(THROUGHPUT, down).verdict == "worse"


def test_one_pair_has_no_interval() -> None:
    change = benchmark_serving.compare(TPOT, pairs(TPOT.key, [10], [9]))
    assert (change.interval, change.verdict) == (None, "one pair: no interval")
    assert change.percent == pytest.approx(-10)


def test_interval_is_students() -> None:
    assert benchmark_serving.t_quantile(4) == pytest.approx(2.776, abs=1e-3)


def test_a_metric_without_figures_is_left_out() -> None:
    """TPOT of one token per request is 0."""
    change = benchmark_serving.compare(TPOT, pairs(TPOT.key, [0, 0], [0, 0]))
    assert (change.percent, change.interval, change.verdict) == (None, None, "-")
    assert benchmark_serving.changes_table([change]).endswith(
        "| TPOT | 0.00 (0.00 to 0.00) | 0.00 (0.00 to 0.00) | - | - | - |"
    )


def serving_args(monkeypatch: pytest.MonkeyPatch, *words: object) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["benchmark_serving.py", "--model", "m", *map(str, words)])
    return benchmark_serving.parse_args()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes in which servers were started; none is real."""
    started = []

    @contextlib.contextmanager
    def pretend(model: str, mode: str, args: list[str], log: Path) -> Iterator[_common.Server]:
        started.append(mode)
        log.write_text("MLA fusion 0.1.0 (cpu): 6 of 6 MLA layers fused.\n" if mode == "strict" else "")
        yield _common.Server(f"http://{mode}", log, None)

    monkeypatch.setattr(benchmark_serving, "running_server", pretend)
    return started


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The result files of all runs of `vllm bench serve`; each run is 0.2 % more than the one before, TPOT is 0."""
    files: list[str] = []

    def pretend(command: list[str], env: dict[str, str], log: Path) -> None:
        option = dict(itertools.pairwise(command))
        files.append(option["--result-filename"])
        figures = {metric.key: 10 * 1.002 ** len(files) for metric in benchmark_serving.METRICS}
        data = {**figures, "mean_tpot_ms": 0, "completed": int(option["--num-prompts"])}
        (Path(option["--result-dir"]) / files[-1]).write_text(json.dumps(data))

    monkeypatch.setattr(benchmark_serving, "run_logged", pretend)
    return files


def test_drift_is_no_effect(
    servers: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = serving_args(monkeypatch, "--both-up", "--out", tmp_path)
    found = benchmark_serving.measure_pairs(args)
    assert (len(found), servers) == (6, ["off", "strict"])
    assert runs[2:6] == ["run_1_off.json", "run_1_on.json", "run_2_on.json", "run_2_off.json"]
    for metric in benchmark_serving.METRICS[1:]:
        change = benchmark_serving.compare(metric, found)
        assert (change.verdict, round(change.percent, 6)) == ("within noise", 0)


def test_serving_results_are_written(
    servers: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line on, each run on a server of its own."""
    serving_args(monkeypatch, "--repeats", 2, "--output-len", 1, "--out", tmp_path)
    benchmark_serving.main()
    assert servers == ["off", "strict", "strict", "off"]
    assert runs[:2] == ["run_0_off.json", "run_1_off.json"], "a warm-up run on each server"
    data = json.loads((tmp_path / "benchmark_serving.json").read_text())
    assert data["plugin"] == "MLA fusion 0.1.0 (cpu): 6 of 6 MLA layers fused."
    assert [change["percent"] is None for change in data["changes"]] == [True] + [False] * 6
    assert data["pairs"][1]["on"]["median_itl_ms"] == pytest.approx(10 * 1.002**6)
    markdown = (tmp_path / "benchmark_serving.md").read_text()
    assert "6 metrics at 95 % each: were they independent, 26% of such benchmarks" in markdown
    assert (
        "2 pairs of interleaved runs after a warm-up run, each on a fresh server; 64 requests of 128 + 1 t" in markdown
    )


def test_a_single_pair_has_no_interval(
    servers: list[str], runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_args(monkeypatch, "--repeats", 1, "--num-prompts", 1, "--out", tmp_path)
    benchmark_serving.main()
    markdown = (tmp_path / "benchmark_serving.md").read_text()
    assert "No interval: --repeats 2 or more" in markdown
    assert "95 % each" not in markdown
    assert "1 pair of interleaved runs after a warm-up run, each on a fresh server; 1 request of" in markdown


def test_incomplete_serving_run(servers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = serving_args(monkeypatch, "--out", tmp_path)
    (tmp_path / "run_1_on.json").write_text('{"completed": 63}')
    monkeypatch.setattr(benchmark_serving, "run_logged", lambda *arguments: None)
    with pytest.raises(_common.ChildError, match=r"63 of 64 requests completed; see .*server\.log"):
        benchmark_serving.measure(args, _common.Server("http://x", tmp_path / "server.log", None), "on", 1)


def test_bench_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = serving_args(
        monkeypatch, "--input-len", 7, "--tokenizer", "t", "--bench-args", "--burstiness 2 --ignore 'a b'"
    )
    words = benchmark_serving.bench_arguments(args, "http://x:1", 3, tmp_path / "run_3_on.json")
    option = dict(itertools.pairwise(words))
    assert (option["--base-url"], option["--model"], option["--tokenizer"]) == ("http://x:1", "bench", "t")
    assert (option["--random-input-len"], option["--random-output-len"], option["--num-prompts"]) == ("7", "128", "64")
    assert (option["--seed"], option["--temperature"], option["--num-warmups"]) == ("3", "0", "8")
    assert (option["--result-dir"], option["--result-filename"]) == (str(tmp_path), "run_3_on.json")
    assert "--ignore-eos" in words
    assert "--save-result" in words
    assert words[-4:] == ["--burstiness", "2", "--ignore", "a b"]


# --- same_text --------------------------------------------------------------------------------------------------------


def test_a_models_own_problems_are_asked(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many?", "answer": "2+2 = 4.\n#### 4"}) + "\n")
    assert same_text.prompts_of(str(tmp_path), 4) == [same_text.Prompt("Question: How many?\nAnswer:", "4")]
    assert [prompt.solution for prompt in same_text.prompts_of("org/name", 4)] == [None, None]


def test_whole_answers_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [same_text.Prompt("a?", "4"), same_text.Prompt("b?", "5")]
    texts = {"off": ["first\n#### 4", "x\n#### 5"], "on": ["first\n#### 4", "x\n#### 5"]}
    assert same_text.report(prompts, texts)
    said = capsys.readouterr().out
    assert "\na?\nfirst\n#### 4\n" in said
    assert said.endswith("same text off and on: 2 of 2 answers\nright: 2 of 2 off, 2 of 2 on\n")
    assert not same_text.report(prompts, {**texts, "on": ["first\n#### 4", "y\n#### 6"]})
    said = capsys.readouterr().out
    assert "\nb?\ny\n#### 6\n--- DIFFERENT with stock vLLM:\nx\n#### 5\n" in said
    assert "different text: 1 of 2 answers" in said
    assert said.endswith("right: 2 of 2 off, 1 of 2 on\n")


# --- offline_inference ------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_offline_inference() -> None:
    """As printed: both prompts with their continuations, fused."""
    result = run(*as_in_the_readme("offline_inference.py"), **engine_environment(MODEL))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 of 6 MLA layers fused" in result.stdout + result.stderr
    assert result.stdout.count("\nPrompt: ") == 2
    assert "#### 23" in result.stdout.split("\nOutput: ")[1]
    assert "#### 345" in result.stdout.split("\nOutput: ")[2]
