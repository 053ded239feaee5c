# SPDX-License-Identifier: Apache-2.0
"""Looks like DeepGEMM to vLLM, which asks it to lay out the scales of weights before any kernel runs."""

import torch


def transform_sf_into_required_layout(sf: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return sf


def fp8_gemm_nt(*_: object, **__: object) -> None:
    raise NotImplementedError
