# SPDX-License-Identifier: Apache-2.0
"""Tries what this vLLM would fuse of a model: a few layers of its config, random weights, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 300.0
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers")
# What neither attention's graphs nor the form of the weights depends on is made small: a tensor-parallel rank's heads,
# few experts, narrow MLPs. All of them stay multiples of what quantised kernels ask for.
AT_MOST = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2048,
    "ffn_hidden_size": 2048,
    "moe_intermediate_size": 512,
    "expert_ffn_hidden_size": 512,
    "n_routed_experts": 16,
    "num_experts": 16,
    "vocab_size": 1024,
    # The first layers: one with an MLP, and two with experts, of which the second has experts before its attention.
    "first_k_dense_replace": 1,
}
# Another process's or the network's; the tokens' numbers may be outside of the smaller vocabulary.
DROPPED = ("auto_map", "bos_token_id", "eos_token_id", "pad_token_id")
FILES_BESIDE = ("hf_quant_config.json",)


@dataclass(frozen=True)
class Trial:
    """What the pass did.

    Args:
        layers, fused, with_norm: MLA layers of the cut model, how many the pass fused, how many with the latent's norm.
        where: In which vLLM, on what.
        reasons: Why the others were not fused.
        untried: Why nothing of this is known; empty if it is.
    """

    layers: int = 0
    fused: int = 0
    with_norm: int = 0
    where: str = ""
    reasons: tuple[str, ...] = ()
    untried: str = ""


def try_config(
    config: dict[str, Any], beside: Path, engine_arguments: dict[str, Any], seconds: float = SECONDS
) -> Trial:
    """Runs the trial.

    Args:
        config: config.json of the language model.
        beside: Folder of further files that say how the weights are quantised.
        engine_arguments: Of vLLM's ``EngineArgs``; what makes the trial small wins over them.
        seconds: Limit of the child process.
    """
    with tempfile.TemporaryDirectory(prefix="mla-fusion-trial-") as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(cut(config)))
        for file in (beside / each for each in FILES_BESIDE):
            if file.is_file():
                (model / file.name).write_bytes(file.read_bytes())
        return _in_a_child(folder, engine_arguments, seconds)


def _in_a_child(folder: Path, engine_arguments: dict[str, Any], seconds: float) -> Trial:
    result, log = folder / "result.json", folder / "log"
    files = [str(folder / "model"), str(result)]
    command = [sys.executable, "-m", "vllm_mla_fusion.host.trial", *files, json.dumps(engine_arguments)]
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command,
                env=_environment(folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return Trial(untried=f"it was not done after {seconds:.0f} s")
    if not result.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return Trial(untried=f"its process ended with code {code}: {''.join(last)}")
    outcome = json.loads(result.read_text())
    if outcome["ended"]:
        return Trial(untried=f"vLLM does not start with it: {_short(outcome['ended'])}")
    if not outcome["layers"]:
        return Trial(untried="the first layers have no MLA")
    figures = {name: outcome[name] for name in ("layers", "fused", "with_norm", "where")}
    return Trial(**figures, reasons=tuple(outcome["reasons"]))


def _short(message: str) -> str:
    """What an exception says first; torch adds its advice after an empty line."""
    return " ".join(message.split("\n\n")[0].split())[:500]


def _environment(folder: Path) -> dict[str, str]:
    """This process's, with the plugin on, everything in one process, no network, and all caches in `folder`."""
    plugins = os.environ.get("VLLM_PLUGINS")
    with_ours = {} if plugins is None else {"VLLM_PLUGINS": ",".join(filter(None, (plugins, "mla_fusion")))}
    return (
        os.environ
        | with_ours
        | {
            "MLA_FUSION": "1",
            "MLA_FUSION_CACHE_DIR": str(folder / "kernels"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(folder / "vllm"),
            "VLLM_DISABLE_COMPILE_CACHE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
    )


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a small model whose attention, and the form of whose weights, is that of `config`."""
    has_experts = any(config.get(name) for name in ("n_routed_experts", "num_experts"))
    # Where only the last layer of a group is MLA, a whole group.
    count = max(3 if has_experts else 2, config.get("layer_group_size") or 0)
    whole = next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), count)
    count = min(count, whole)
    result = {name: _per_layer(value, whole, count) for name, value in config.items() if name not in DROPPED}
    for name in LAYER_COUNTS:
        if isinstance(config.get(name), int):
            result[name] = count
    for name, most in AT_MOST.items():
        if isinstance(config.get(name), int):
            result[name] = min(config[name], most)
    if not config.get("architectures"):
        result["architectures"] = _architectures(config.get("model_type"))
    return result


def _architectures(model_type: Any) -> list[str]:
    """Of a language model inside another, whose own config need not name its class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return [found] if isinstance(found, str) else []


def _per_layer(value: Any, whole: int, count: int) -> Any:
    """The part of a list with an entry for each layer."""
    return value[:count] if isinstance(value, list) and len(value) == whole else value
