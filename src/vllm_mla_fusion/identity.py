# SPDX-License-Identifier: Apache-2.0
"""What tells one build of this plugin from another, for vLLM's compile caches."""

import functools
import hashlib
from pathlib import Path

import vllm_mla_fusion


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(vllm_mla_fusion.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_cache_key() -> str:
    """Differs between plugin versions and between fused and unfused graphs: never reuse one for the other."""
    from vllm_mla_fusion import activation, kernel

    state = "unavailable" if kernel.failure() else f"norm-{activation.norm().value}"
    return f"{state}:{vllm_mla_fusion.__version__}:{_sources()}"
