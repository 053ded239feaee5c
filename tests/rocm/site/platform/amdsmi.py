# SPDX-License-Identifier: Apache-2.0
"""Stands in for AMD's management library, which vLLM's platform asks: one GPU, its architecture in PRETENDED_GFX."""

import os
from enum import Enum


class AmdSmiException(Exception):
    pass


class AmdSmiMemoryType(Enum):
    VRAM = 0


def amdsmi_init() -> None:
    pass


amdsmi_shut_down = amdsmi_init


def amdsmi_get_processor_handles() -> list[int]:
    return [0]


def amdsmi_get_gpu_asic_info(handle: int) -> dict[str, str]:
    return {"target_graphics_version": os.environ["PRETENDED_GFX"], "device_id": "0x74a1", "market_name": "pretended"}


def amdsmi_get_gpu_device_uuid(handle: int) -> str:
    return "00000000-0000-0000-0000-000000000000"


def amdsmi_get_gpu_memory_total(handle: int, kind: AmdSmiMemoryType) -> int:
    return 192 << 30


def amdsmi_topo_get_link_type(first: int, second: int) -> dict[str, int]:
    return {"hops": 1, "type": 2}


def amdsmi_topo_get_numa_node_number(handle: int) -> int:
    return 0
