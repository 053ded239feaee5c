# SPDX-License-Identifier: Apache-2.0
"""Inductor's code for a CUDA device, generated where there is none, and what must hold for it."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._dynamo import device_interface
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch.utils._triton import has_triton
from triton import runtime
from triton.backends.compiler import GPUTarget
from vllm.platforms import current_platform

from .stock_model import NUM_LAYERS
from .variants import GEOMETRIES, Variant

KEY_IS_COPIED = "the rotated key is copied"
# What each op is to read where a projection left it, and which of its results is the key, if it writes a cache.
READ_WHERE_THEY_LIE: dict[str, tuple[tuple[str, ...], int | None]] = {
    "mla_fusion.fused_concat_and_cache_mla_rope": (("q_pe", "k_pe"), 0),
    "mla_fusion.fused_norm_concat_and_cache_mla_rope": (("q_pe", "k_pe"), 0),
    "mla_fusion.fused_norms_rope_concat_and_cache_mla": (("q_c", "k_pe", "kv_c"), 2),
    "mla_fusion.fused_rope_query_in_place": (("q_pe",), None),
    "mla_fusion_tests.in_place_fused_concat_and_cache_mla_rope": (("q_pe", "k_pe"), 0),
}

COMMON = {
    "max_threads_per_block": 1024,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "warp_size": 32,
    "minor": 0,
}
GPUS = {
    9: SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        **COMMON,
    ),
    10: SimpleNamespace(
        name="NVIDIA B200",
        major=10,
        multi_processor_count=148,
        total_memory=180 << 30,
        L2_cache_size=126 << 20,
        **COMMON,
    ),
}


def _gpu() -> SimpleNamespace:
    """What the pretended platform says that it is."""
    major, _ = getattr(type(current_platform), "capability", (9, 0))
    return GPUS[major]


class _TritonDriver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * _gpu().major, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inductor sees the GPU that the platform pretends; nothing that it generates is compiled or timed."""
    interface = device_interface.CudaInterface
    gpu = _gpu()
    stand_ins = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_properties": lambda device=None: gpu,
        "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
    }
    runtime.driver.set_active(_TritonDriver())
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **stand_ins))
        stack.enter_context(patch.object(interface, "get_device_properties", lambda device=None: gpu))
        stack.enter_context(patch.dict(device_interface.caching_worker_device_properties, cuda=[gpu]))
        stack.enter_context(patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", lambda wrapper: None))
        has_triton.cache_clear()
        stack.callback(has_triton.cache_clear)
        yield


def problems_of(variant: Variant, code: list[str]) -> Iterator[str]:
    """What shows that the query or the key is copied for the fused call, or more runs beside it than must."""
    yield from copies(code)
    launches = sum(".run(" in line for line in "\n".join(code).splitlines())
    # The op that does both norms has no pairing of GPT-NeoX's by default.
    norms = 2 if GEOMETRIES[variant.geometry]["q_lora_rank"] and variant.is_neox else 0
    allowed = NUM_LAYERS * (norms + variant.llama_4_scaling) + variant.llama_4_scaling
    if launches > allowed:
        yield f"{launches} Triton kernels are launched, at most {allowed} expected"


def copies(code: list[str], num_layers: int = NUM_LAYERS) -> Iterator[str]:
    """Fused calls that do not read the query and the key where a projection left them, and copies of their keys."""
    num_calls = 0
    for text in code:
        outputs = _outputs_of_kernels(text)
        lines = text.splitlines()
        for number, call in enumerate(lines):
            for op, (names, key) in READ_WHERE_THEY_LIE.items():
                if f"{op}.default(" in call:
                    num_calls += key is not None
                    given = _arguments_of(op, call)
                    yield from _copies_for(names, given, lines[:number], outputs)
                    yield from _copies_of_key(call, given, key, lines[number + 1 :]) if key is not None else ()
    if num_calls != num_layers:
        yield f"{num_calls} fused calls in the generated code, expected {num_layers}"


def _outputs_of_kernels(code: str) -> dict[str, list[bool]]:
    """Which arguments each Triton kernel writes."""
    kernels = re.findall(r"^def (triton_\w+)\((.*?)\):", code, re.MULTILINE)
    return {name: ["out_ptr" in argument for argument in arguments.split(", ")] for name, arguments in kernels}


def _arguments_of(op: str, call: str) -> dict[str, str]:
    """What the op is called with in a line of Inductor's code, by name."""
    namespace, name = op.split(".")
    names = [each.name for each in getattr(getattr(torch.ops, namespace), name).default._schema.arguments]
    given = [""]
    depth = 0
    for letter in call.partition(f"{op}.default(")[2]:
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            given.append("")
        else:
            given[-1] += letter
    by_name = (re.match(r"(?:(\w+)=)?(.*)", text.strip()) for text in given)
    return {found[1] or name: found[2] for name, found in zip(names, by_name, strict=False) if found}


def _copies_for(
    names: tuple[str, ...], given: dict[str, str], before: list[str], outputs: dict[str, list[bool]]
) -> Iterator[str]:
    for name in names:
        found = _buffer_of(given.get(name, ""))
        if found is None or _writer(found, before, outputs) is not None:
            yield f"{name} is not a view of a projection's output: {given}"


def _copies_of_key(call: str, given: dict[str, str], number: int, after: list[str]) -> Iterator[str]:
    """Triton kernels that take what the fused call read the key from or wrote it to; attention is none of them."""
    key = {_buffer_of(given.get("k_pe", ""))}
    if result := re.match(r"\s*(\w+) = ", call):
        key.add(result[1])
    for line in after:
        alias = re.match(rf"\s*(\w+) = (\w+)(\[{number}\])?$", line)
        if alias and alias[2] in key:
            key.add(alias[1])
        elif ".run(" in line and not key.isdisjoint(re.findall(r"\w+", line)):
            yield f"{KEY_IS_COPIED}: {line.strip()}"


def _buffer_of(value: str) -> str | None:
    found = re.match(r"(?:reinterpret_tensor\()?(\w+)(?:,|$)", value)
    return found and found[1]


def _writer(buffer: str, lines: list[str], outputs: dict[str, list[bool]]) -> str | None:
    """The line in which a Triton kernel writes what `buffer` holds; None if an op made it and no kernel touched it."""
    for line in reversed(lines):
        if launch := re.search(r"(triton_\w+)\.run\((.*?)\)", line):
            given = [argument.strip() for argument in launch[2].split(",")]
            if any(
                written and argument == buffer for written, argument in zip(outputs[launch[1]], given, strict=False)
            ):
                return line
        if made := re.match(rf"\s*{buffer} = (.+)", line):
            alias = re.match(r"(?:reinterpret_tensor\()?(buf\d+)\b", made[1])
            return _writer(alias[1], lines[: lines.index(line)], outputs) if alias else None
    return None
