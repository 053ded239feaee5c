# SPDX-License-Identifier: Apache-2.0
"""Stands in for the package that ROCm's MLA prefill needs; nothing here runs attention."""


def flash_attn_varlen_func(*args: object, **kwargs: object) -> None:
    raise NotImplementedError
