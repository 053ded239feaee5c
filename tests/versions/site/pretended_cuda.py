# SPDX-License-Identifier: Apache-2.0
"""vLLM platform plugin: a CUDA platform that states an H100, or what it is told, without asking a driver."""

from triton.backends.nvidia.driver import CudaDriver
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability

# vLLM does without Triton where no driver is active.
CudaDriver.is_active = staticmethod(lambda: True)


class PretendedCudaPlatform(NonNvmlCudaPlatform):
    capability = (9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(*cls.capability)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return {9: "NVIDIA H100 80GB HBM3", 10: "NVIDIA B200"}[cls.capability[0]]

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return {9: 80, 10: 180}[cls.capability[0]] << 30

    @classmethod
    def device_count(cls) -> int:
        return 8

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return {9: 132, 10: 148}[cls.capability[0]]

    @classmethod
    def is_integrated_gpu(cls, device_id: int = 0) -> bool:
        return False

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"


def qualname() -> str:
    """Entry point of group vllm.platform_plugins."""
    return f"{__name__}.{PretendedCudaPlatform.__name__}"
