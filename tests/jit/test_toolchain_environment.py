# SPDX-License-Identifier: Apache-2.0
"""Compilers as build hosts and images set them: behind wrappers, with arguments, with flags of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_build import CPU, answer, fake_compiler

from vllm_mla_fusion.jit import build, compiling, host_compiler, toolchain
from vllm_mla_fusion.jit.build import BuildError, Target
from vllm_mla_fusion.jit.toolchain import Toolchain, Toolkit

NVCC = Path("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC.exists(), reason=f"no {NVCC}")
DIVISION = "__global__ void divide(float* a, float b) { a[threadIdx.x] /= b; }\n"


@pytest.fixture(autouse=True)
def plain_environment(csrc, monkeypatch) -> None:
    for name in ("CXX", "CC", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "NVCC_CCBIN", "PYTORCH_NVCC", "CPATH"):
        monkeypatch.delenv(name, raising=False)


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def recording_wrapper(path: Path) -> Path:
    """A ccache that works, and writes down what it was called for."""
    return program(path, f'echo "$@" >> "{path}.calls"\nexec "$@"')


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ccache", "sccache"])
def test_a_wrapper_on_path_that_nobody_asked_for_is_not_used(name, tmp_path, monkeypatch):
    """torch 2.13 puts it before the compilers; without a HOME that can be written, or its server, it fails."""
    wrapper = program(tmp_path / "bin" / name, f"echo '{name}: error: failed to create directory' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    assert answer(build.build(CPU)) == 42


@pytest.mark.parametrize("form", ["{wrapper} g++", "g++ -DUNUSED", "'{folder}/two words' g++", 'g++ -DSAID="a b"'])
def test_cxx_of_several_words(form, tmp_path, monkeypatch):
    wrapper = recording_wrapper(tmp_path / "bin" / "ccache")
    recording_wrapper(tmp_path / "bin" / "two words")
    monkeypatch.setenv("CXX", form.format(wrapper=wrapper, folder=wrapper.parent))
    assert answer(build.build(CPU)) == 42
    if "{" in form:
        (calls,) = wrapper.parent.glob("*.calls")
        assert "-c" in calls.read_text(), "the wrapper compiled"
        assert "answer.cpp" in calls.read_text()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("CXX", 'ccache "g++', r'CXX=\'ccache "g\+\+\' is no command: No closing quotation'),
        ("CXX", "/no/such/g++ -m64", r"CXX='/no/such/g\+\+ -m64' names /no/such/g\+\+, which is not there"),
        ("CXX", "nosuchcache g++", "CXX='nosuchcache g[+][+]' names nosuchcache"),
        ("CXX", "env nosuchcompiler", "env nosuchcompiler --version failed"),
    ],
)
def test_a_command_that_cannot_run_is_named_with_its_variable(variable, value, words, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(BuildError, match=words) as failure:
        build.build(CPU)
    assert failure.value.remedy
    assert not build.is_built(CPU)


@pytest.mark.parametrize("value", ["", " ", "\t\n"])
def test_a_blank_cxx_is_no_choice(value, monkeypatch):
    monkeypatch.setenv("CXX", value)
    assert toolchain.find_cxx() in [shutil.which(name) for name in ("c++", "g++", "clang++")]
    toolchain.signature("cuda")
    build.fingerprint(CPU)


def test_a_wrapper_that_fails_is_named(tmp_path, monkeypatch):
    """It answers --version, as ccache does, but cannot write its cache."""
    says = '[ "$2" = --version ] && exec "$@"; echo "cannot create /root/.ccache: Permission denied" >&2; exit 1'
    wrapper = program(tmp_path / "bin" / "ccache", says)
    monkeypatch.setenv("CXX", f"{wrapper} g++")
    fault = host_compiler.compiler_fault(os.environ["CXX"])
    assert fault == f"`{wrapper}` in front of the compiler fails, `g++` alone works: " + (
        "cannot create /root/.ccache: Permission denied"
    )
    with pytest.raises(BuildError, match=r"cannot create /root/\.ccache") as failure:
        build.build(CPU)
    assert f"`{wrapper}` in front of the compiler fails" in failure.value.remedy
    assert host_compiler.compiler_fault("g++") is None
    assert "does not compile an empty file" in host_compiler.compiler_fault(f"{wrapper} {wrapper}")


# ---- nvcc's host compiler -------------------------------------------------------------------------------------------


def cuda_tools() -> Toolchain:
    cxx = toolchain.find_cxx()
    return Toolchain(cxx, Path("ninja"), Toolkit(NVCC.parents[1], NVCC, "default"), toolchain.find_host_compiler(cxx))


def nvcc(work: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """nvcc as a build's child process would run it."""
    work.mkdir()
    (work / "tmp").mkdir()
    (work / "division.cu").write_text(DIVISION)
    tools = cuda_tools()
    compiling._write_wrappers(work, tools)
    command = [NVCC, "-arch=sm_90", *flags, *compiling._toolkit_flags(work, tools), "division.cu", "-o", "out"]
    environment = compiling._child_environment(work, Target("cuda", ("9.0",)), tools)
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)


@needs_nvcc
@pytest.mark.parametrize(
    ("variable", "form"),
    [
        ("CC", "{} gcc"),
        ("CC", "{} g++ -m64"),
        ("CXX", "{} g++"),
        ("NVCC_CCBIN", "{folder}/host"),
        ("NVCC_PREPEND_FLAGS", "-ccbin {folder}/host --use_fast_math"),
        ("NVCC_APPEND_FLAGS", "--compiler-bindir={folder}/host"),
    ],
)
def test_nvcc_calls_the_host_compiler_that_was_chosen(variable, form, tmp_path, monkeypatch):
    wrapper = recording_wrapper(tmp_path / "bin" / "wrapper")
    program(tmp_path / "bin/host", f'exec {wrapper} g++ "$@"')
    monkeypatch.setenv(variable, form.format(wrapper, folder=wrapper.parent))
    done = nvcc(tmp_path / "work", "-c")
    assert done.returncode == 0, done.stderr
    assert "division" in Path(f"{wrapper}.calls").read_text()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("CC", "/no/such/gcc"), ("NVCC_CCBIN", "/no/such/gcc"), ("NVCC_PREPEND_FLAGS", "-ccbin /no/such/gcc")],
)
def test_a_host_compiler_that_is_not_there_is_named(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(toolchain, "find_toolkit", lambda backend: Toolkit(NVCC.parents[1], NVCC, "default"))
    with pytest.raises(BuildError, match=rf"{variable}='{value}' names /no/such/gcc") as failure:
        toolchain.find_toolchain("cuda")
    assert f"unset it: nvcc then calls {toolchain.find_cxx()}" in failure.value.remedy
    toolchain.find_toolchain("cpu")
    toolchain.signature("cuda")


# ---- flags that would change the machine code -----------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("name", ["NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"])
@pytest.mark.parametrize("flag", ["--use_fast_math", "-G", "-DMLA_FUSION_GPU=2 -prec-div=false"])
def test_flags_of_the_environment_do_not_reach_the_kernel(name, flag, tmp_path, monkeypatch):
    plain = nvcc(tmp_path / "plain", "-ptx")
    monkeypatch.setenv(name, f"{flag} -allow-unsupported-compiler")
    flagged = nvcc(tmp_path / "flagged", "-ptx")
    assert (plain.returncode, flagged.returncode) == (0, 0), flagged.stderr
    ptx = [re.sub(r"^//.*$", "", (tmp_path / work / "out").read_text(), flags=re.M) for work in ("plain", "flagged")]
    assert "div.rn.f32" in ptx[0]
    assert ptx[0] == ptx[1]


@needs_nvcc
def test_no_variable_of_nvccs_profile_reaches_it(monkeypatch):
    profile = (NVCC.parent / "nvcc.profile").read_text()
    names = set(re.findall(r"^(\w+)\s*\+?=", profile, re.M)) - {
        "TOP",
        "LD_LIBRARY_PATH",
        "PATH",
        "CICC_PATH",
        "NVVMIR_LIBRARY_DIR",
    }
    assert {"INCLUDES", "PTXAS_FLAGS"} <= names
    for name in names:
        monkeypatch.setenv(name, "-changed")
    environment = compiling._child_environment(Path("/work"), CPU, toolchain.find_toolchain("cpu"))
    assert names.isdisjoint(environment)


@pytest.mark.parametrize(
    ("name", "value"),
    [("CXX", "g++ -O0"), ("CPATH", "/opt/other/include"), ("LIBRARY_PATH", "/opt/lib"), ("NIX_CFLAGS_COMPILE", "-O0")],
)
def test_what_the_host_compiler_is_told_is_part_of_the_address(name, value, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    before = toolchain.find_toolchain("cpu").versions(), toolchain.signature("cpu")
    monkeypatch.setenv(name, value)
    after = toolchain.find_toolchain("cpu").versions(), toolchain.signature("cpu")
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_the_compiler_behind_a_wrapper_is_part_of_the_address(tmp_path, monkeypatch):
    real = fake_compiler(tmp_path / "real", "1.0")
    monkeypatch.setenv("CXX", f"env {real}")
    before = toolchain.find_toolchain("cpu").versions(), toolchain.signature("cpu")
    fake_compiler(tmp_path / "real", "2.0.0")
    assert toolchain.find_toolchain("cpu").versions() != before[0]
    assert toolchain.signature("cpu") != before[1]
