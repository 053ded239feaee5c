# SPDX-License-Identifier: Apache-2.0
"""Each problem is told once for each host, by the first of its ranks, and not at all where rank 0 has told it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from vllm_mla_fusion.host import ranks

NO_COMPILER = "layers.0 and 26 more: there is no compiler"


def conversation(monkeypatch: pytest.MonkeyPatch, hosts: list[str], words: list[str], silent: tuple[int, ...] = ()):
    """What each rank is to speak for, by rank; `silent`: ranks that never come."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks, "_engine_numbers", itertools.repeat(0))
    monkeypatch.setattr(ranks, "WAIT_SECONDS", 0.5 if silent else 30.0)
    monkeypatch.setattr("socket.gethostname", lambda: hosts[int(threading.current_thread().name)])
    config = SimpleNamespace(world_size=len(hosts), data_parallel_rank=0)
    found: dict[int, str | None] = {}

    def ask(rank: int) -> None:
        found[rank] = ranks.who_speaks(config, rank, words[rank])

    threads = [threading.Thread(target=ask, args=(r,), name=str(r)) for r in range(len(hosts)) if r not in silent]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    return {rank: speaks for rank, speaks in found.items() if speaks is not None}


def test_second_node_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [""] * 8 + [NO_COMPILER] * 8
    spoken = conversation(monkeypatch, ["a"] * 8 + ["b"] * 8, words)
    assert spoken == {8: "b, ranks 8 9 10 11 12 13 14 15"}


def test_what_rank_0_tells_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conversation(monkeypatch, ["a", "a", "b", "b"], [NO_COMPILER] * 4) == {}


def test_each_host_and_each_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pipeline stage's layers have other names; one rank's GPU is of another kind."""
    words = ["stage 1", "stage 1", "stage 2", "stage 2 of another GPU", "stage 2", "stage 2"]
    spoken = conversation(monkeypatch, ["a", "a", "a", "a", "b", "b"], words)
    assert spoken == {2: "a, rank 2", 3: "a, rank 3", 4: "b, ranks 4 5"}


def test_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["", NO_COMPILER, NO_COMPILER]
    assert conversation(monkeypatch, ["a"] * 3, words, silent=(0,)) == {1: "a, ranks 1 2"}


def test_without_a_store_every_rank_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    assert [ranks.who_speaks(SimpleNamespace(), rank, NO_COMPILER) for rank in (0, 3)] == [None, "a, rank 3"]
    assert ranks.who_speaks(SimpleNamespace(), 3, "") is None


SCRIPT = """
import json, sys
from types import SimpleNamespace
import torch
from vllm_mla_fusion.host import ranks

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
config = SimpleNamespace(world_size=2, data_parallel_rank=0)
print(json.dumps([ranks.who_speaks(config, rank, "the problem" if rank else words) for words in ("", "the problem")]))
"""


def test_through_the_store_of_a_process_group(tmp_path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    spoken = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert spoken[0] == [None, None]
    assert spoken[1][0].endswith(", rank 1")
    assert spoken[1][1] is None
