# SPDX-License-Identifier: Apache-2.0
"""vLLM's groups of processes, of which only the first exists: whatever they would do together does nothing here."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from vllm import distributed
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators import shm_broadcast


def enter(config: VllmConfig) -> None:
    """Puts this process into the groups that the first worker of this config is in."""
    size = config.parallel_config.world_size
    if torch.distributed.is_initialized():
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()
    # Not only here: passes ask for it later.
    parallel_state.in_the_same_node_as = _on_one_node
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.distributed, "new_group", _fake_group(torch.distributed.new_group)))
        stack.enter_context(
            patch.object(shm_broadcast.MessageQueue, "create_from_process_group", lambda *_, **__: None)
        )
        stack.enter_context(set_current_vllm_config(config))
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        distributed.init_distributed_environment(size, 0, "env://", 0, "fake")
        distributed.initialize_model_parallel(
            config.parallel_config.tensor_parallel_size,
            decode_context_model_parallel_size=config.parallel_config.decode_context_parallel_size,
        )


def _on_one_node(group: Any, source_rank: int = 0) -> list[bool]:
    return [True] * torch.distributed.get_world_size(group)


def _fake_group(stock: Any) -> Any:
    def new_group(ranks: Any = None, **kwargs: Any) -> Any:
        return stock(ranks, **kwargs | {"backend": "fake"})

    return new_group
