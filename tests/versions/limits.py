# SPDX-License-Identifier: Apache-2.0
"""What is known not to be fused, and why; the matrix fails where one of these no longer shows."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from . import environments


@dataclass(frozen=True)
class Limit:
    """`checks`: which, as a regular expression for their names; `shows`: text of one of the problems that are found;
    `oldest` and `newest`: the releases that it is true of, all if None."""

    checks: str
    shows: str
    reason: str
    oldest: str | None = None
    newest: str | None = None

    def holds_for(self, release: str, check: str) -> bool:
        order = list(environments.TORCH_OF_RELEASE)
        first = order.index(self.oldest or order[0])
        last = order.index(self.newest or order[-1])
        return first <= order.index(release) <= last and re.search(self.checks, check) is not None


NOT_COMPILED = "vLLM compiles no part of this model class"

LIMITS: tuple[Limit, ...] = (
    Limit(
        "cache fp8_e5m2$",
        "No valid attention backend found",
        "`--kv-cache-dtype fp8_e5m2`: no MLA backend of vLLM takes it on an NVIDIA GPU",
    ),
    Limit(
        "sequence parallel$|async TP$",
        "enable_sp",
        "sequence parallelism and async TP: vLLM 0.32 took these passes away",
        oldest="0.32.0",
    ),
    Limit(
        "^(LongCatFlashMTPModel|Glm4MoeLiteMTPModel),",
        NOT_COMPILED,
        "LongCat-Flash's and GLM-4-MoE-Lite's MTP drafts: vLLM does not compile these classes",
    ),
    Limit("^SarvamMLAForCausalLM,", NOT_COMPILED, "Sarvam: vLLM does not compile this class", newest="0.26.0"),
    Limit(
        "^OpenPanguMTPModel,",
        "'OpenPanguDecoderLayer' object has no attribute 'use_sequence_parallel_moe'",
        "openPangu's MTP draft: stock vLLM ends with an AttributeError",
    ),
    Limit(
        "^SarvamMLAForCausalLM,",
        "0 cache updates in the graphs of 2 MLA layers",
        "Sarvam: vLLM 0.33 does not count it as MLA (`use_mla`), and the plugin asks that",
        oldest="0.33.0",
    ),
)


def limit_of(release: str, check: str) -> Limit | None:
    """What is known of this check of this release."""
    return next((limit for limit in LIMITS if limit.holds_for(release, check)), None)


def letter_of(limit: Limit) -> str:
    """How the table calls a limit; those with one reason share a letter."""
    reasons = list(dict.fromkeys(each.reason for each in LIMITS))
    return string.ascii_lowercase[reasons.index(limit.reason)]
