# SPDX-License-Identifier: Apache-2.0
"""Prints what the plugin makes of vLLM's ROCm platform: its gate, and the fp8 format of each architecture."""

import json
from unittest.mock import patch

from vllm.platforms import current_platform, rocm

from vllm_mla_fusion.host import cache_writer, support

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")


def main() -> None:
    platform = {
        "is_rocm": current_platform.is_rocm(),
        "is_cuda_alike": current_platform.is_cuda_alike(),
        "problem": support.platform_problem(),
        "probe": support.failed_probe(),
    }
    print(json.dumps(platform))
    for arch in ARCHS:
        with patch.object(rocm, "_GCN_ARCH", arch):
            names = {name: cache_writer.kernel_cache_dtype(name) for name in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2")}
            print(json.dumps({"arch": arch, "vllm": str(current_platform.fp8_dtype()), **names}))


if __name__ == "__main__":
    main()
