# SPDX-License-Identifier: Apache-2.0
"""`doctor --model`: it finds and reads the config wherever it is, and claims only what was tried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import problems, run

from vllm_mla_fusion.tools import model_config, trial
from vllm_mla_fusion.tools.model_check import judge
from vllm_mla_fusion.tools.model_config import ConfigNotFoundError

pytestmark = pytest.mark.usefixtures("healthy")

MLA = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": 61}


@pytest.mark.parametrize(
    ("change", "fuses", "detail"),
    [
        ({}, "yes", "kv_lora_rank 512, qk_rope_head_dim 64, 61 MLA layers"),
        ({"model_type": "longcat_flash", "num_layers": 28, "num_hidden_layers": None}, "yes", "56 MLA layers"),
        ({"model_type": "bailing_hybrid"}, "yes", "some of 61 layers"),
        ({"index_topk": 2048}, "unknown", "use_inductor_graph_partition"),
        ({"model_type": "glm_moe_dsa"}, "unknown", "DSA"),
        ({"model_type": "kimi_linear"}, "no", "no RoPE"),
        ({"qk_rope_head_dim": 0}, "no", "no RoPE"),
        ({"model_type": "deepseek_v4", "kv_lora_rank": None}, "no", "kernels of its own"),
        ({"model_type": "minicpm3"}, "no", "ordinary attention"),
        ({"model_type": "sarvam_mla"}, "no", "does not list its model type as MLA"),
        ({"kv_lora_rank": None}, "no", "no MLA layers"),
        ({"model_type": "brand_new"}, "unknown", "read its report"),
    ],
)
def test_judgement(change, fuses, detail):
    found = judge({**MLA, **change})
    assert found.fuses == fuses
    assert detail in found.detail


def write(folder: Path, config: dict, name: str = "config.json") -> str:
    (folder / name).write_text(json.dumps(config))
    return str(folder)


def model_check(*arguments: str) -> dict:
    """The doctor's line on the model, and that its verdict says no more than it."""
    result = run("doctor", "--json", "--model", *arguments)
    report = json.loads(result.stdout)
    (found,) = (check for check in report["checks"] if check["name"] == "model")
    assert report["untried"] == (["model"] if found["status"] == "untried" else [])
    last = run("doctor", "--model", *arguments).stdout.splitlines()[-1]
    claims = {
        "ok": "No problem found.",
        "untried": "No problem found in what was tried; not tried: model.",
        "problem": "1 problem.",
    }
    assert last == claims[found["status"]]
    return found


def told(monkeypatch: pytest.MonkeyPatch, **outcome: object) -> None:
    monkeypatch.setattr(trial, "try_config", lambda config, beside, engine_arguments: trial.Trial(**outcome))


# ---- what the trial showed ------------------------------------------------------------------------------------------


def test_a_model_whose_layers_fused(tmp_path, monkeypatch):
    write(tmp_path, MLA)
    told(monkeypatch, layers=3, fused=3, with_norm=2, where="vLLM 0.26.0 on cuda")
    found = model_check(str(tmp_path))
    assert found["status"] == "ok"
    assert "deepseek_v3: 3 of 3 MLA layers fuse, 2 with the latent's RMSNorm" in found["detail"]
    assert "in vLLM 0.26.0 on cuda" in found["detail"]
    assert found["detail"].endswith("kv_lora_rank 512, qk_rope_head_dim 64, 61 MLA layers")


def test_a_model_of_a_known_type_that_does_not_fuse_as_it_is_quantised(tmp_path, monkeypatch):
    """0.1.0 said `No problem found` of DeepSeek-V3 with FP8 block weights, where 1 of 16 layers fused."""
    write(tmp_path, MLA)
    told(monkeypatch, layers=3, fused=1, where="vLLM 0.26.0 on cuda", reasons=("the pass failed: KeyError()",))
    found = model_check(str(tmp_path))
    assert found["status"] == "problem"
    assert "1 of 3 MLA layers fuse" in found["detail"]
    assert found["detail"].endswith("the pass failed: KeyError()")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "brand_new"])
def test_what_could_not_be_tried_is_not_claimed(model_type, tmp_path, monkeypatch):
    write(tmp_path, {**MLA, "model_type": model_type})
    told(monkeypatch, untried="vLLM does not start with it: NotImplementedError: no FP8 on this CPU")
    found = model_check(str(tmp_path))
    assert found["status"] == "untried"
    assert "was not tried: vLLM does not start with it: NotImplementedError: no FP8 on this CPU" in found["detail"]
    assert found["remedy"]


def test_without_a_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "try_config", None)
    found = model_check(write(tmp_path, MLA), "--no-trial")
    assert (found["status"], "not tried: --no-trial" in found["detail"]) == ("untried", True)


def test_with_the_engine_s_arguments(tmp_path, monkeypatch):
    def try_config(config, beside, engine_arguments):
        return trial.Trial(layers=3, fused=3, where="vLLM 9") if engine_arguments == {"seed": 7} else trial.Trial()

    monkeypatch.setattr(trial, "try_config", try_config)
    found = model_check(write(tmp_path, MLA), "--engine-args", '{"seed": 7}')
    assert 'in vLLM 9 with {"seed": 7})' in found["detail"]
    refused = run("doctor", "--model", str(tmp_path), "--engine-args", "seed=7")
    assert (refused.exit_code, "expected a JSON object" in refused.stderr) == (2, True)


def test_a_trial_overrules_what_a_model_type_is_known_for(tmp_path, monkeypatch):
    write(tmp_path, {**MLA, "model_type": "sarvam_mla"})
    assert model_check(str(tmp_path))["status"] == "ok"
    told(monkeypatch, untried="it was not done after 300 s")
    found = model_check(str(tmp_path))
    assert found["status"] == "problem"
    assert "does not list its model type as MLA" in found["detail"]


def test_mla_switched_off_in_vllm_is_a_problem(tmp_path, monkeypatch):
    write(tmp_path, MLA)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert problems("--model", str(tmp_path))["model"]["remedy"] == "unset VLLM_MLA_DISABLE"
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    assert problems("--model", str(tmp_path)) == {}


def test_a_model_without_mla_needs_no_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "try_config", None)
    write(tmp_path, {"model_type": "llama"})
    assert "does not fuse: no MLA layers" in problems("--model", str(tmp_path))["model"]["detail"]


# ---- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        lambda text: {"text_config": text},
        lambda text: {"language_config": {"text_config": text}},
        lambda text: {"thinker_config": {"text_config": text}, "vision_config": {"kv_lora_rank": 7}},
        lambda text: {"text_config": {"model_type": "encoder"}, "llm_config": {"language_config": text}},
    ],
)
def test_the_text_config_is_found_however_deep_it_is(around, tmp_path):
    quantisation = {"quant_method": "fp8"}
    write(tmp_path, {"model_type": "kimi_k25", "quantization_config": quantisation, **around(MLA)})
    found = model_config.read(str(tmp_path)).config
    assert found == {**MLA, "quantization_config": quantisation}
    assert judge(found).fuses == "yes"


def test_a_config_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MLA), encoding="utf-8-sig")
    assert model_config.read(str(path)).config == MLA


@pytest.mark.parametrize(
    "model",
    [
        *("{folder}/model.gguf", "{folder}/Q4_K_M/part.GGUF", "{folder}", "{folder}/Q4_K_M", "{folder}/.."),
        *("unsloth/DeepSeek-V3-GGUF", "org/name:Q4_K_M", "org/name:IQ2_XXS"),
    ],
)
def test_gguf_is_called_by_its_name(model, tmp_path):
    tmp_path = tmp_path / "models"
    (tmp_path / "Q4_K_M").mkdir(parents=True)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\xff")
    (tmp_path / "Q4_K_M/part.GGUF").write_bytes(b"GGUF\x03\x00\xff")
    found = model_check(model.format(folder=tmp_path))
    assert found["status"] == "untried"
    assert "GGUF" in found["detail"]
    assert "config.json" in found["remedy"]


@pytest.mark.parametrize(("key", "fuses"), [("qk_nope_head_dim", "yes"), ("head_dim", "no")])
def test_mistrals_params(key, fuses, tmp_path, monkeypatch):
    geometry = {"kv_lora_rank": 512, "qk_rope_head_dim": 64} if fuses == "yes" else {}
    write(tmp_path, {"dim": 7168, "n_layers": 61, key: 128, **geometry}, "params.json")
    found = judge(model_config.read(str(tmp_path)).config)
    assert found.fuses == fuses
    assert found.detail.endswith("61 MLA layers") == (fuses == "yes")
    monkeypatch.setattr(trial, "try_config", None)
    assert model_check(str(tmp_path))["status"] == ("untried" if fuses == "yes" else "problem")


def test_model_in_the_local_hub_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(snapshot, MLA)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_config.read("org/name") == model_config.LanguageConfig(MLA, snapshot)


@pytest.mark.parametrize(
    "model", ["org/absent-model-of-nobody", "not a/valid/name", "/no/such/directory", "~nosuch/model", "a" * 5000]
)
def test_model_that_is_not_here(model):
    with pytest.raises(ConfigNotFoundError):
        model_config.read(model)


@pytest.mark.parametrize("text", ["{", '{"text_config":' * 20000 + "0" + "}" * 20000])
def test_broken_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert "config.json cannot be read" in problems("--model", str(tmp_path))["model"]["detail"]
