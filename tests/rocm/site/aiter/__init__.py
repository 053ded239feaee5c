# SPDX-License-Identifier: Apache-2.0
"""Stands in for AMD's AITER: whatever vLLM imports from it is there and must not be called."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def not_here(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"aiter.{name}")

    return not_here
