# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of a model: what a trial showed, else what its config tells and that it was not tried."""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from vllm_mla_fusion.tools import model_config, trial
from vllm_mla_fusion.tools.check import Check
from vllm_mla_fusion.tools.model_check import ModelCheck, judge

READ_THE_REPORT = "Start it with MLA_FUSION=1 and read at the start how many layers are fused."
STAYS_STOCK = "Serve it without the plugin; with MLA_FUSION=1 it runs as stock vLLM."


def model(name: str, engine_arguments: dict[str, Any] | None) -> Iterator[Check]:
    """Judges a directory, a config.json, or a model in the local Hugging Face cache.

    Args:
        name: Which.
        engine_arguments: With which it is tried; None for no trial.
    """
    try:
        found = model_config.read(name)
    except model_config.GgufError as error:
        remedy = "Give the model that they were made of: a directory with its config.json, or its name."
        yield Check("model", "untried", str(error), remedy)
        return
    except (model_config.ConfigNotFoundError, ValueError) as error:
        remedy = "Give a directory with a sound config, or download the model's config once where there is a network."
        yield Check("model", "problem", str(error), remedy)
        return
    judgement = judge(found.config)
    if not judgement.has_mla:
        yield Check("model", "problem", f"{judgement.model_type}: does not fuse: {judgement.detail}", STAYS_STOCK)
        return
    if os.environ.get("VLLM_MLA_DISABLE", "0") not in ("", "0"):
        detail = "does not fuse: VLLM_MLA_DISABLE makes vLLM run it with ordinary attention instead of MLA"
        yield Check("model", "problem", f"{judgement.model_type}: {detail}", "unset VLLM_MLA_DISABLE")
        return
    yield _by_trial(judgement, _try(found, engine_arguments), engine_arguments)


def _try(found: model_config.LanguageConfig, engine_arguments: dict[str, Any] | None) -> trial.Trial:
    if engine_arguments is None:
        return trial.Trial(untried="--no-trial")
    if found.is_mistral:
        return trial.Trial(untried="vLLM reads a params.json only together with Mistral's tokenizer")
    print("trying the first layers of the model in this vLLM: a minute or two ...", file=sys.stderr, flush=True)
    return trial.try_config(found.config, found.folder, engine_arguments)


def _by_trial(judgement: ModelCheck, result: trial.Trial, engine_arguments: dict[str, Any] | None) -> Check:
    label = judgement.model_type
    if result.untried:
        return _by_config(judgement, result.untried)
    norm = f", {result.with_norm} with the latent's RMSNorm" if result.with_norm else ""
    detail = f"{label}: {result.fused} of {result.layers} MLA layers fuse{norm}"
    told = json.dumps(engine_arguments) if engine_arguments else "vLLM's default arguments"
    how = f"tried: its first layers, small, quantised as it is, random weights, in {result.where} with {told}"
    if result.fused == result.layers:
        return Check("model", "ok", f"{detail} ({how}). {judgement.detail}")
    reasons = "; ".join(result.reasons) or "no reason is known"
    return Check("model", "problem", f"{detail} ({how}): {reasons}", STAYS_STOCK)


def _by_config(judgement: ModelCheck, untried: str) -> Check:
    label = judgement.model_type
    if judgement.fuses == "no":
        detail = f"{label}: has MLA layers, but they do not fuse: {judgement.detail}"
        return Check("model", "problem", detail, STAYS_STOCK)
    known = {
        "yes": "its model type is known to fuse unquantised, but whether this config does",
        "unknown": "whether it fuses",
    }
    detail = f"{label}: {known[judgement.fuses]} was not tried: {untried}. {judgement.detail}"
    return Check("model", "untried", detail, READ_THE_REPORT)
