# SPDX-License-Identifier: Apache-2.0
"""vLLM platform plugin: a CUDA platform that states an H100 without asking a driver."""

from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class PretendedCudaPlatform(NonNvmlCudaPlatform):
    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(major=9, minor=0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 << 30

    @classmethod
    def device_count(cls) -> int:
        return 1

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132


def qualname() -> str:
    """Entry point of group vllm.platform_plugins."""
    return f"{__name__}.{PretendedCudaPlatform.__name__}"
