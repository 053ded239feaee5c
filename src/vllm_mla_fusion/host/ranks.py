# SPDX-License-Identifier: Apache-2.0
"""Which of an engine's ranks tells a problem: operators of many ranks read each problem once for each host."""

from __future__ import annotations

import itertools
import json
import socket
import time
from typing import Any

import torch

# Ranks end their warm-up together; one that died never answers.
WAIT_SECONDS = 10.0
_engine_numbers = itertools.count()


def who_speaks(parallel_config: Any, rank: int, words: str) -> str | None:
    """Tells the engine's other ranks what this one has to say; each rank calls it once for each warm-up.

    Rank 0 speaks for itself. Of the others, those speak that have other words than rank 0, the first of each host for
    all of its host. What cannot be asked in time is taken for silent: better twice than never.

    Args:
        words: empty if all is well.

    Returns:
        `host, rank 8` or `host, ranks 8 9 10` if this rank is to speak for these, else None.
    """
    host = socket.gethostname()
    store = _store()
    if store is None:
        return f"{host}, rank {rank}" if words and rank > 0 else None
    # Replicas of a data-parallel engine share the store, and each has a rank 0.
    replica = getattr(parallel_config, "data_parallel_rank", 0)
    prefix = f"mla_fusion/{replica}/{next(_engine_numbers)}"
    store.set(f"{prefix}/{rank}", json.dumps([host, words]))
    if not words or rank == 0:
        return None
    world_size = getattr(parallel_config, "world_size", rank + 1)
    told = _collect(store, {each: f"{prefix}/{each}" for each in range(world_size)})
    same = [each for each, (its_host, its_words) in told.items() if its_host == host and its_words == words]
    if told.get(0, ("", ""))[1] == words or same[:1] != [rank]:
        return None
    return f"{host}, {'rank' if len(same) == 1 else 'ranks'} {' '.join(map(str, same))}"


def _store() -> Any:
    """The key-value store through which torch.distributed brought the ranks together; None if there is none."""
    try:
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return None
        return distributed.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None


def _collect(store: Any, keys: dict[int, str]) -> dict[int, tuple[str, str]]:
    """What the ranks have said, of those that do within the time. Asks and does not wait in the store, which others of
    this process use."""
    until = time.monotonic() + WAIT_SECONDS
    told: dict[int, tuple[str, str]] = {}
    while True:
        for rank in [each for each in keys if each not in told and store.check([keys[each]])]:
            host, words = json.loads(store.get(keys[rank]))
            told[rank] = (host, words)
        if len(told) == len(keys) or time.monotonic() > until:
            return dict(sorted(told.items()))
        time.sleep(0.05)
