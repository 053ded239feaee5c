# SPDX-License-Identifier: Apache-2.0
"""Runs a release's own code for slot mappings, to see that it leaves -1 behind a step's tokens and in dummy runs.

What it writes with Triton is run as the Python function that it is, on a stand-in for Triton's language.
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

STALE = 7
NUM_TOKENS, PADDED, BUFFER = 3, 8, 12
BLOCK_SIZE = 4
BLOCKS = torch.tensor([[2, 5]], dtype=torch.int32)


def problems() -> Iterator[str]:
    for name, mapping, dummy in (("V1", _step_of_v1, None), ("V2", _step_of_v2, _dummy_of_v2)):
        slots = mapping()
        if (slots[NUM_TOKENS:PADDED] != -1).any():
            yield f"the {name} runner leaves {slots[NUM_TOKENS:PADDED].tolist()} behind a step's tokens"
        if (slots[:NUM_TOKENS] == -1).any():
            yield f"the {name} runner gives a step's tokens {slots[:NUM_TOKENS].tolist()}"
        if dummy is not None and ((found := dummy()) != -1).any():
            yield f"the {name} runner leaves {found.tolist()} in a dummy run"


def _step_of_v1() -> torch.Tensor:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    buffer = torch.full((BUFFER,), STALE)
    table = SimpleNamespace(slot_mapping=SimpleNamespace(gpu=buffer))
    group = SimpleNamespace(kv_cache_spec=object(), layer_names=["layer"])
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        input_batch=SimpleNamespace(block_table=[table]),
        device=torch.device("cpu"),
    )
    of_layers = GPUModelRunner._get_slot_mappings(
        runner, num_tokens_padded=PADDED, num_reqs_padded=1, num_tokens_unpadded=NUM_TOKENS
    )[1]
    assert of_layers["layer"].data_ptr() == buffer.data_ptr(), "captured graphs read a buffer that stays"
    return of_layers["layer"]


def _tables_of_v2() -> tuple[ModuleType, Any]:
    module = importlib.import_module("vllm.v1.worker.gpu.block_table")
    tables = module.BlockTables.__new__(module.BlockTables)
    vars(tables).update(
        num_kv_cache_groups=1,
        max_num_batched_tokens=BUFFER,
        block_table_ptrs=torch.tensor([BLOCKS.data_ptr()]),
        block_table_strides=torch.tensor([BLOCKS.stride(0)]),
        block_sizes_tensor=torch.tensor([BLOCK_SIZE]),
        kernel_block_sizes_tensor=torch.tensor([BLOCK_SIZE]),
        slot_mapping_enabled=torch.tensor([True]),
        dcp_sharded=torch.tensor([True]),
        slot_mappings=torch.full((1, BUFFER), STALE),
        cp_rank=0,
        cp_size=1,
        cp_interleave=1,
        device=torch.device("cpu"),
    )
    return module, tables


def _step_of_v2() -> torch.Tensor:
    module, tables = _tables_of_v2()
    kernel = module._compute_slot_mappings_kernel
    with (
        patch.object(module, "_compute_slot_mappings_kernel", _Interpreted(getattr(kernel, "fn", kernel))),
        patch.object(module, "tl", _Language),
        patch.object(module, "_load_ptr", lambda pointer, dtype: _Pointer(BLOCKS.flatten())),
    ):
        found = tables.compute_slot_mappings(
            torch.tensor([0]), torch.tensor([0, NUM_TOKENS]), torch.arange(BUFFER), PADDED
        )
    slots = found[0]
    assert slots[:NUM_TOKENS].tolist() == [8, 9, 10], "the stand-in for Triton does not do as Triton does"
    return slots


def _dummy_of_v2() -> torch.Tensor:
    return _tables_of_v2()[1].get_dummy_slot_mappings(PADDED)


class _Pointer:
    """An address in a flat tensor, of one or of many elements."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, step: Any) -> "_Pointer":
        return _Pointer(self.memory, self.offset + step)


class _Language:
    """The part of `triton.language` that these kernels use, for one program after the other."""

    constexpr = object
    int32, int64 = torch.int32, torch.int64
    program: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()

    @classmethod
    def program_id(cls, axis: int) -> int:
        return cls.program[axis]

    @classmethod
    def num_programs(cls, axis: int) -> int:
        return cls.grid[axis]

    @staticmethod
    def arange(start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end)

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        return torch.where(torch.as_tensor(condition), yes, no)

    @staticmethod
    def load(pointer: _Pointer, mask: Any = None, other: Any = None) -> Any:
        offset = torch.as_tensor(pointer.offset)
        valid = (
            torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand(offset.shape)
        )
        # Unmasked reads beyond the memory are the next bytes on a GPU, and are not used.
        index = torch.where(valid, offset, 0).clamp(max=pointer.memory.numel() - 1)
        read = pointer.memory[index]
        found = torch.where(valid, read, torch.as_tensor(other or 0, dtype=read.dtype))
        return found if found.dim() else found.item()

    @staticmethod
    def store(pointer: _Pointer, value: Any, mask: Any = None) -> None:
        offset = torch.as_tensor(pointer.offset)
        valid = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask
        pointer.memory[offset[valid]] = torch.as_tensor(value).expand(offset.shape)[valid]


class _Interpreted:
    """`kernel[grid](...)` runs the function for each program of the grid; tensors become pointers."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            pointers = [_Pointer(each.flatten()) if isinstance(each, torch.Tensor) else each for each in arguments]
            _Language.grid = grid
            for _Language.program in [(i, j) for i in range(grid[0]) for j in range(grid[1])]:
                self._function(*pointers, **named)

        return launch
