# SPDX-License-Identifier: Apache-2.0
"""What tells one build of this plugin from another, for vLLM's compile caches."""

import contextlib
import functools
import hashlib
import threading
from pathlib import Path

import vllm_mla_fusion
from vllm_mla_fusion.jit.compiling import csrc_digest
from vllm_mla_fusion.jit.errors import BuildError

_kernel_expected = threading.Event()


@functools.cache
def _sources() -> str:
    """Of this package's code and the kernel's, wherever the library that is loaded was built."""
    digest = hashlib.sha256()
    # Without its sources there is no kernel, which is a problem that `kernel.failure` tells.
    with contextlib.suppress(BuildError):
        digest.update(csrc_digest().encode())
    for path in sorted(Path(vllm_mla_fusion.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def expect_kernel() -> None:
    """This process has a model whose graphs may be fused. Without one, nobody waits for a build to have a key."""
    _kernel_expected.set()


def compile_cache_key() -> str:
    """Differs between plugin versions and between fused and unfused graphs: never reuse one for the other."""
    from vllm_mla_fusion import activation, kernel

    if not _kernel_expected.is_set():
        state = "no-kernel-expected"
    else:
        state = "unavailable" if kernel.failure() else f"norm-{activation.norm().value}"
    return f"{state}:{vllm_mla_fusion.__version__}:{_sources()}"
