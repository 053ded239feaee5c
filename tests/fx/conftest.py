# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's rotary op is registered by vLLM everywhere; its kernel is stood in for by vLLM's own."""

import sys
from types import SimpleNamespace

import pytest
import torch


def _rotate_in_place(positions, query, key, head_size, cos_sin_cache, is_neox):
    torch.ops._C.rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


@pytest.fixture(autouse=True)
def _flashinfer_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(apply_rope_with_cos_sin_cache_inplace=_rotate_in_place)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(rope=module))
    monkeypatch.setitem(sys.modules, "flashinfer.rope", module)
