# SPDX-License-Identifier: Apache-2.0
"""csrc/ as AMD GPUs get it: hipified, compiled by a real HIP compiler, and what the generated code looks like.

Needs the compilers of .ci/install_hip_toolchain.sh; no GPU and no ROCm.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hip_build import Kernel, assembly, device_libraries, hipify, kernels_of

pytestmark = pytest.mark.hip

# MI200, MI300 (fnuz fp8), MI350 (OCP fp8), and RDNA3 for its waves of 32.
ARCHS = ["gfx90a", "gfx942", "gfx950", "gfx1100"]
LOADS_16_BYTES = re.compile(r"global_load_(dwordx4|b128)\b")
STORES_16_BYTES = re.compile(r"global_store_(dwordx4|b128)\b")


@pytest.fixture(scope="module")
def hipified(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hipify(tmp_path_factory.mktemp("hipified") / "csrc")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_libraries(tmp_path_factory.mktemp("bitcode") / "amdgcn")


@pytest.fixture(scope="module", params=ARCHS)
def kernels(request: pytest.FixtureRequest, hipified: list[Path], libraries: Path) -> list[Kernel]:
    return [kernel for source in hipified for kernel in kernels_of(assembly(source, request.param, libraries))]


def test_every_kernel_is_there(kernels: list[Kernel]) -> None:
    """Three activation types: a vector kernel per pairing and number of heads, and the general one."""
    vector = [kernel for kernel in kernels if "mla_rope_cache_vector" in kernel.name]
    general = [kernel for kernel in kernels if "mla_rope_cache_general" in kernel.name]
    assert (len(vector), len(general), len(kernels)) == (12, 3, 15)
    for kernel in kernels:
        assert len(kernel.instructions) > 100, kernel.name


def test_vector_kernels_move_16_bytes_at_a_time(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        if "mla_rope_cache_vector" in kernel.name:
            code = "\n".join(kernel.instructions)
            # The query, the key, the latent and cos and sin are read; the query, the key and the cache written.
            assert len(LOADS_16_BYTES.findall(code)) >= 5, kernel.name
            assert len(STORES_16_BYTES.findall(code)) >= 4, kernel.name


def test_no_spills(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.resources["private_segment_fixed_size"] == "0", kernel.name
        assert kernel.resources["sgpr_spill_count"] == kernel.resources["vgpr_spill_count"] == "0", kernel.name
        assert not [line for line in kernel.instructions if line.startswith("scratch_")], kernel.name


def test_pointers_are_known_to_be_global(kernels: list[Kernel]) -> None:
    """A flat access asks the hardware which memory is meant, and cannot be 16 bytes wide on every GPU."""
    for kernel in kernels:
        assert not [line for line in kernel.instructions if line.startswith("flat_")], kernel.name


def test_division_is_correctly_rounded(kernels: list[Kernel]) -> None:
    """The scaled values must be the quotients that vLLM's writer rounds, not products with a reciprocal."""
    for kernel in kernels:
        assert [line for line in kernel.instructions if line.startswith("v_div_fixup_f32")], kernel.name


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
