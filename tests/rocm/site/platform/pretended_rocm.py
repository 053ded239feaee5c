# SPDX-License-Identifier: Apache-2.0
"""vLLM platform plugin: vLLM's own ROCm platform, without asking a driver about the GPU."""

from vllm.platforms.rocm import RocmPlatform


class PretendedRocmPlatform(RocmPlatform):
    capability = (9, 0)  # of the GPU that Inductor's code is generated for

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "AMD Instinct"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 192 << 30

    @classmethod
    def device_count(cls) -> int:
        return 1

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 304


def qualname() -> str:
    """Entry point of group vllm.platform_plugins."""
    return f"{__name__}.{PretendedRocmPlatform.__name__}"
