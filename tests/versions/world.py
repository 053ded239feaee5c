# SPDX-License-Identifier: Apache-2.0
"""vLLM's groups of processes, of which only this one exists."""

from pathlib import Path

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel


def enter(config: VllmConfig, rendezvous: Path) -> None:
    """The groups that a worker with this config would be in."""
    if not torch.distributed.is_initialized():
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
            initialize_model_parallel(1, 1)
