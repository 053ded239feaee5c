# SPDX-License-Identifier: Apache-2.0
"""Runs the commands in this process."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner

from vllm_mla_fusion.tools.cli import main

_entry_points = importlib.metadata.entry_points


def plugins(names: list[str]) -> Callable[..., Any]:
    """`importlib.metadata.entry_points` where these are vLLM's plugins; torch and others ask for groups of theirs."""

    def entry_points(**selection: str) -> Any:
        return names if selection.get("group") == "vllm.general_plugins" else _entry_points(**selection)

    return entry_points


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def problems(*arguments: str) -> dict[str, dict]:
    """The problems that ``doctor --json`` reports, by name; each must have a remedy."""
    result = run("doctor", "--json", *arguments)
    report = json.loads(result.stdout)
    found = {check["name"]: check for check in report["checks"] if check["status"] == "problem"}
    assert all(check["remedy"] for check in found.values())
    assert report["ok"] == (not found)
    assert result.exit_code == (1 if found else 0)
    return found
