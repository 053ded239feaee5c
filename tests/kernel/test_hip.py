# SPDX-License-Identifier: Apache-2.0
"""csrc/ as AMD GPUs get it: hipified, compiled by a real HIP compiler, and what the generated code looks like.

Needs the compilers of .ci/install_hip_toolchain.sh; no GPU and no ROCm.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hip_build import Kernel, assembly, device_libraries, hipify, kernels_of, pretended_rocm

pytestmark = pytest.mark.hip

# MI200, MI300 (fnuz fp8), MI350 (OCP fp8).
ARCHS = ["gfx90a", "gfx942", "gfx950"]
WAVE32_ARCH = "gfx1100"
LOADS_8_BYTES = re.compile(r"global_load_(dwordx2|b64)\b")
LOADS_16_BYTES = re.compile(r"global_load_(dwordx4|b128)\b")
NARROW_STORES = re.compile(r"global_store_(byte|short|b8|b16)\w*")
STORES_8_BYTES = re.compile(r"global_store_(dwordx2|b64)\b")
STORES_16_BYTES = re.compile(r"global_store_(dwordx4|b128)\b")
VECTOR = re.compile(
    r"mla_rope_cache_vectorI\w+?Lb(?P<neox>[01])ELi(?P<heads>\d)ELNS\w*?RowE(?P<row>[0-5])ELb(?P<norm>[01])E"
    r"Li(?P<share>\d)E"
)

COPY, FP8, FP8_DS_MLA, NO_ROW, COPY_OR_FP8, ANY_ROW = "012345"
# The whole op, with GPT-NeoX pairs last; the query's norm; RoPE of the query alone.
NUM_VECTOR_KERNELS = (8 + 8 + 3 + 2) + (2 * 5 + 1) + 4


@pytest.fixture(scope="module")
def hipified(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hipify(tmp_path_factory.mktemp("hipified") / "csrc")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_libraries(tmp_path_factory.mktemp("bitcode") / "amdgcn")


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest, hipified: list[Path], libraries: Path) -> list[Kernel]:
    return [kernel for source in hipified for kernel in kernels_of(assembly(source, request.param, libraries))]


def vector_kernels(kernels: list[Kernel]) -> list[tuple[Kernel, re.Match[str]]]:
    """The vector kernels and their template arguments."""
    return [(kernel, match) for kernel in kernels if (match := VECTOR.search(kernel.name))]


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    """A vector kernel per activation type, heads per lane, kind of row and norm, of rarer forms fewer; a general one.

    fp8_ds_mla and a scale of the query's row have vector kernels for bf16 only, GPT-NeoX pairs one for all rows.
    """
    general = [kernel for kernel in kernels if "mla_rope_cache_general" in kernel.name]
    assert (len(vector_kernels(kernels)), len(general), len(kernels)) == (NUM_VECTOR_KERNELS, 1, NUM_VECTOR_KERNELS + 1)
    for kernel in kernels:
        assert len(kernel.instructions) > 100, kernel.name


def test_vector_kernels_access_whole_vectors(kernels: list[Kernel]) -> None:
    check_wide_accesses(kernels)


def check_wide_accesses(kernels: list[Kernel]) -> None:
    """16 bytes of the rows, the norms' weights, cos and sin; of a head 16 (GPT-J) or 8 of each half (GPT-NeoX)."""
    for kernel, arguments in vector_kernels(kernels):
        code = "\n".join(kernel.instructions)
        norm, row, is_neox = int(arguments["norm"]), arguments["row"], arguments["neox"] == "1"
        has_row, has_heads, share = row != NO_ROW, arguments["heads"] != "0", int(arguments["share"])
        # Query and key; in the cache fp8 is half as wide.
        heads = has_heads + has_row
        head_stores = heads + (has_row and row != FP8)
        latent_stores = has_row * (norm + (row in (COPY, COPY_OR_FP8, ANY_ROW)))
        # Angles, heads, the latent and its weight; the query's row and, of what is shared out, the weight. With a scale
        # of the whole row it is read once more, in a loop.
        loads = (heads if is_neox else 2 * heads) + has_row * (1 + norm)
        loads += 0 if not share else 8 + share if share < 8 else 8 + 2
        if is_neox:
            assert len(LOADS_8_BYTES.findall(code)) >= 2 * heads, kernel.name
            assert len(STORES_8_BYTES.findall(code)) >= 2 * head_stores, kernel.name
        assert len(LOADS_16_BYTES.findall(code)) >= loads, kernel.name
        # With a scale of the whole row it is fp8 only.
        query_stores = share if share < 8 else 0
        assert len(STORES_16_BYTES.findall(code)) >= latent_stores + query_stores + (0 if is_neox else head_stores), (
            kernel.name
        )
        assert not NARROW_STORES.findall(code), kernel.name


def test_no_spills(kernels: list[Kernel]) -> None:
    """Nothing to memory. A few scalars of the general kernel may wait in a vector register's lanes."""
    for kernel in kernels:
        assert kernel.resources["private_segment_fixed_size"] == kernel.resources["vgpr_spill_count"] == "0", (
            kernel.name
        )
        scalars = 4 if "mla_rope_cache_general" in kernel.name else 0
        assert int(kernel.resources["sgpr_spill_count"]) <= scalars, kernel.name
        assert not [line for line in kernel.instructions if line.startswith("scratch_")], kernel.name


def test_pointers_are_known_to_be_global(kernels: list[Kernel]) -> None:
    """A flat access asks the hardware which memory is meant, and cannot be 16 bytes wide on every GPU."""
    for kernel in kernels:
        assert not [line for line in kernel.instructions if line.startswith("flat_")], kernel.name


def test_the_scales_reciprocal_is_correctly_rounded(kernels: list[Kernel]) -> None:
    """What the quotients are corrected from; the compiler could have taken the hardware's approximation."""
    for kernel, arguments in vector_kernels(kernels):
        divisions = [line for line in kernel.instructions if line.startswith("v_div_fixup_f32")]
        is_quantised = arguments["row"] not in (COPY, NO_ROW) or arguments["share"] != "0"
        assert bool(divisions) is is_quantised, kernel.name


def test_waves_of_32(hipified: list[Path], libraries: Path) -> None:
    kernels = [kernel for source in hipified for kernel in kernels_of(assembly(source, WAVE32_ARCH, libraries))]
    assert len(vector_kernels(kernels)) == NUM_VECTOR_KERNELS
    assert {kernel.resources["wavefront_size"] for kernel in kernels} == {"32"}
    check_wide_accesses(kernels)
    test_no_spills(kernels)


def test_a_compile_error_fails(hipified: list[Path], libraries: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.hip"
    broken.write_text(f'#include "{hipified[0]}"\n__global__ void broken() {{ no_such_function(); }}\n')
    with pytest.raises(AssertionError, match="no_such_function"):
        assembly(broken, "gfx90a", libraries)


def test_an_unsupported_instruction_fails(libraries: Path, tmp_path: Path) -> None:
    """The check knows what each GPU has: gfx90a has no fp8 conversions."""
    source = tmp_path / "unsupported.hip"
    source.write_text(
        "#include <hip/hip_runtime.h>\n__global__ void k(int* out, float x) "
        "{ *out = __builtin_amdgcn_cvt_pk_fp8_f32(x, x, 0, false); }\n"
    )
    assembly(source, "gfx942", libraries)
    with pytest.raises(AssertionError, match="fp8-conversion-insts"):
        assembly(source, "gfx90a", libraries)


BUILD_AND_RUN = """
import torch
from reference import Case, assert_within_one_rounding, make_inputs, rotate
from vllm_mla_fusion import kernel
from vllm_mla_fusion.jit import build
target = kernel.load()
print(target, build.build(target))
inputs = make_inputs(Case("rocm", num_tokens=5, num_heads=4))
result = inputs.clone()
kernel.op()(*result.args())
assert_within_one_rounding(result.q_pe, rotate(inputs.q_pe, inputs))
"""


def run_build(environment: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    cache = {"MLA_FUSION_CACHE_DIR": str(tmp_path / "cache"), "MLA_FUSION_ARCH": "gfx942"}
    paths = [environment["PYTHONPATH"], str(Path(__file__).parents[1])]
    variables = os.environ | environment | cache | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", BUILD_AND_RUN], env=variables, capture_output=True, text=True)


def test_the_whole_build(libraries: Path, tmp_path: Path) -> None:
    """hipify, HIP compiler, link with HIP's runtime, and load: the library then serves tensors on the CPU."""
    done = run_build(pretended_rocm(tmp_path / "rocm", libraries), tmp_path)
    assert done.returncode == 0, done.stderr
    target, library = done.stdout.split()
    assert target == "rocm-gfx942"
    # PYTORCH_ROCM_ARCH was limited to the one architecture; torch's default is a dozen.
    assert set(re.findall(rb"amdgcn-amd-amdhsa--(gfx\w+)", Path(library).read_bytes())) == {b"gfx942"}


def test_without_hipcc(libraries: Path, tmp_path: Path) -> None:
    """The error says where hipcc was looked for and what to do, as on CUDA; the plugin then leaves vLLM stock."""
    environment = pretended_rocm(tmp_path / "rocm", libraries)
    (tmp_path / "rocm/bin/hipcc").unlink()
    done = run_build(environment, tmp_path)
    assert done.returncode != 0
    assert f"No ROCm with bin/hipcc found. Looked at: ROCM_HOME ({tmp_path}/rocm)" in done.stderr
    assert "Install ROCm, or set ROCM_HOME to it." in done.stderr
