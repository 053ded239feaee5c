# SPDX-License-Identifier: Apache-2.0
"""Finds and reads the config of a language model on this machine, wherever it is in the model's config."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Hugging Face's and Mistral's.
HUGGING_FACE, MISTRAL = "config.json", "params.json"
TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")

# vLLM's name of one quantisation among a repository's GGUF files.
GGUF_OF_A_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+:I?Q\d\w*", re.IGNORECASE)


class ConfigNotFoundError(FileNotFoundError):
    """There is no config for the model on this machine."""


class GgufError(ValueError):
    """The model is a GGUF file, which has no config to read."""


@dataclass(frozen=True)
class LanguageConfig:
    """What is known of the language model.

    Args:
        config: Its part of the model's config, with the ``quantization_config`` that holds for it.
        folder: Where the config lies, and what else says how the weights are quantised.
        is_mistral: It is made of a params.json, from which vLLM builds a config of its own.
    """

    config: dict[str, Any]
    folder: Path
    is_mistral: bool = False


def find_config(model: str) -> Path:
    """The config of a directory, a file, or a model in the local Hugging Face cache. Never asks the network.

    Raises:
        ConfigNotFoundError: There is neither a config.json nor a params.json of it on this machine.
        GgufError: It is a GGUF file, or a directory with nothing else.
    """
    try:
        path = Path(model).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:
        # A name that is too long; the home of a user who is not there.
        raise ConfigNotFoundError(f"{model[:100]} cannot be looked for: {error}.") from None
    if path.suffix.lower() == ".gguf":
        raise GgufError(f"{model} is a GGUF file, of which the doctor reads nothing.")
    if is_file:
        return path
    if path.is_dir():
        found = next((path / name for name in (HUGGING_FACE, MISTRAL) if (path / name).is_file()), None)
        # One folder for each quantisation is usual.
        files = (file for pattern in ("*", "*/*") for file in path.glob(pattern))
        if found is None and any(file.suffix.lower() == ".gguf" for file in files):
            raise GgufError(f"{path} has GGUF files and no {HUGGING_FACE}: the doctor reads nothing of them.")
        if found is None:
            raise ConfigNotFoundError(f"{path} has no {HUGGING_FACE} and no {MISTRAL}.")
        return found
    return _cached(model)


def _cached(model: str) -> Path:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ConfigNotFoundError(f"No directory {model}, and huggingface_hub is not installed.") from None
    try:
        cached = [try_to_load_from_cache(model, name) for name in (HUGGING_FACE, MISTRAL)]
    except HFValidationError:
        cached = []
    for local in cached:
        if isinstance(local, str):
            return Path(local)
    if "gguf" in model.lower() or GGUF_OF_A_REPOSITORY.fullmatch(model):
        raise GgufError(f"{model} is by its name a model of GGUF files, of which the doctor reads nothing.")
    raise ConfigNotFoundError(f"{model} is neither a directory here nor in the local Hugging Face cache.")


def read(model: str) -> LanguageConfig:
    """Reads the model's config.

    Raises:
        ConfigNotFoundError, GgufError: See `find_config`.
        ValueError: The file cannot be read or is no JSON object.
    """
    path = find_config(model)
    try:
        # With or without the byte order mark that editors on Windows write.
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} cannot be read: not a JSON object")
    if path.name == MISTRAL:
        return LanguageConfig(_from_mistral(config), path.parent, is_mistral=True)
    return LanguageConfig(language_part(config), path.parent)


def language_part(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model: the first with MLA's rank of it and its text configs, however deep they are;
    without one, the innermost."""
    parts = _parts(config)
    return next((part for part in parts if part.get("kv_lora_rank")), parts[-1])


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and its text configs, each with the quantisation that holds for it."""
    quantisation = {name: config[name] for name in ("quantization_config",) if config.get(name)}
    inner = [{**quantisation, **config[name]} for name in TEXT_CONFIGS if isinstance(config.get(name), dict)]
    return [config, *(part for each in inner for part in _parts(each))]


def _from_mistral(config: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of a params.json: a deepseek_v3 if it has MLA's dimensions."""
    model_type = "deepseek_v3" if config.get("qk_nope_head_dim") else "transformer"
    return {**config, "model_type": model_type, "num_hidden_layers": config.get("n_layers")}
