# SPDX-License-Identifier: Apache-2.0
"""Which library is loaded: the wheel's where it serves, else one of this machine; and what the wheel's needs."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_build import CPU, FORK, answer

from vllm_mla_fusion import activation, identity, kernel
from vllm_mla_fusion.jit import build, compiling, library, manifest, prebuilt, toolchain
from vllm_mla_fusion.jit import target as targets
from vllm_mla_fusion.jit.build import BuildError, Target

HOPPER = Target("cuda", ("9.0",))


@pytest.fixture
def folder(csrc, library, tmp_path, monkeypatch) -> Path:
    """The wheel's folder with a sound library of the tiny csrc/, and a torch and driver that fit it."""
    folder = tmp_path / "site/prebuilt"
    folder.mkdir(parents=True)
    shutil.copy(library, folder)
    shutil.rmtree(build.cache_dir())
    facts = {"csrc": compiling.csrc_digest(), "archs": ["8.0", "9.0", "12.0"], "ptx": "12.0", "cuda": "13.1"}
    facts |= {"torch": ["2.11", "2.14"], **manifest.library_facts(folder / build.LIBRARY)}
    (folder / "manifest.json").write_text(json.dumps(facts))
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(prebuilt, "driver_cuda", lambda: (13, 2))
    monkeypatch.delenv("MLA_FUSION_JIT", raising=False)
    return folder


def change(folder: Path, **facts: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


# ---- what serves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("archs", "driver", "serves"),
    [
        (["9.0"], (13, 0), True),
        (["9.0", "8.0"], (13, 0), True),
        (["8.6"], (13, 0), True),  # machine code of 8.0 runs on later minors
        (["12.1"], (13, 0), True),
        (["7.5"], (13, 2), False),
        (["10.0"], (13, 2), False),
        (["9.0", "7.5"], (13, 2), False),
        (["13.0"], (13, 2), True),  # by PTX
        (["13.0"], (13, 1), True),
        (["13.0"], (13, 0), False),  # a driver older than the PTX
        (["13.0"], None, False),
        (["9.0"], None, True),
        (["9.0"], (12, 9), False),
        ([], None, True),  # the CPU kernel
    ],
)
def test_gpus_and_drivers(archs, driver, serves, folder, monkeypatch):
    monkeypatch.setattr(prebuilt, "driver_cuda", lambda: driver)
    path, why_not = prebuilt.find(Target("cuda", tuple(archs)) if archs else CPU)
    assert path == (folder / build.LIBRARY if serves else None), why_not
    assert bool(why_not) != serves


@pytest.mark.parametrize(
    ("version", "cuda", "hip", "reason"),
    [
        ("2.10.1", "13.0", None, r"tested with torch 2\.11 to 2\.14, here is 2\.10\.1"),
        ("2.15.0", "13.0", None, r"tested with torch 2\.11 to 2\.14, here is 2\.15\.0"),
        ("2.14.1+cu132", "13.2", None, ""),
        ("2.11.0a0+git", "13.0", None, ""),
        ("2.13.0+cu129", "12.9", None, r"needs a torch for CUDA 13, this one is for CUDA 12\.9"),
        ("2.13.0+cpu", None, None, "needs a torch for CUDA 13, this one is for the CPU"),
        ("2.13.0+rocm", None, "7.0", "needs a torch for CUDA 13, this one is for ROCm"),
    ],
)
def test_torch(version, cuda, hip, reason, folder, monkeypatch):
    monkeypatch.setattr("torch.__version__", version)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.version.hip", hip)
    _, why_not = prebuilt.find(HOPPER)
    assert re.fullmatch(f".*{reason}" if reason else "", why_not)


@pytest.mark.parametrize(("value", "is_forced"), [("1", True), (" 1 ", True), ("0", False), ("", False)])
def test_jit_can_be_forced(value, is_forced, folder, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_JIT", value)
    assert (prebuilt.find(CPU)[0] is None) == is_forced
    if is_forced:
        loaded = library.load(ctypes.CDLL, print, 0)
        assert (loaded.origin, loaded.path) == ("JIT", build.library_path(CPU))
    monkeypatch.setenv("MLA_FUSION_JIT", "yes")
    with pytest.raises(BuildError, match=r"MLA_FUSION_JIT must be 1 .* got 'yes'"):
        prebuilt.find(CPU)


def test_the_driver_says_which_cuda_it_runs(tmp_path, monkeypatch):
    code = "int nvmlInit_v2(void) { return 0; } int nvmlShutdown(void) { return 0; }"
    code += "int nvmlSystemGetCudaDriverVersion_v2(int *v) { *v = 13010; return 0; }"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "libnvidia-ml.so.1")]
    subprocess.run(command, input=code, text=True, check=True)
    script = "from vllm_mla_fusion.jit.target import driver_cuda; print(driver_cuda())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(13, 1)\n"
    assert targets.driver_cuda() is None or targets.driver_cuda() >= (12, 0)


# ---- damage: a kill or a full disk while it was installed, another file's digest -----------------------------------


def truncate(folder: Path) -> None:
    os.truncate(folder / build.LIBRARY, 100)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / build.LIBRARY).read_bytes())
    content[-1] ^= 1
    (folder / build.LIBRARY).write_bytes(content)


def half_a_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 20)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_library(folder: Path) -> None:
    (folder / build.LIBRARY).unlink()


def wrong_digest(folder: Path) -> None:
    change(folder, sha256="0" * 64)


def other_machine(folder: Path) -> None:
    change(folder, machine="riscv64")


def other_sources(folder: Path) -> None:
    change(folder, csrc="0" * 64)


def a_list_for_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


DAMAGES = [truncate, flip_a_byte, half_a_manifest, no_manifest, no_library, wrong_digest, other_machine, other_sources]
DAMAGES += [a_list_for_a_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_or_of_other_sources_is_not_loaded(damage: Callable[[Path], None], folder):
    damage(folder)
    opened: list[Path] = []
    loaded = library.load(opened.append, print, 0)
    assert loaded.origin == "JIT"
    assert opened == [loaded.path] == [build.library_path(CPU)]
    assert prebuilt.find(CPU)[1]


def test_an_edited_checkout_does_not_use_it(folder, csrc):
    assert prebuilt.find(CPU)[0]
    (csrc / "answer.h").write_text("#define ANSWER 43\n")
    assert "other kernel sources" in prebuilt.find(CPU)[1]
    assert answer(library.load(lambda path: None, print, 0).path) == 43


def test_a_library_that_does_not_load_gives_way(folder):
    """Such as one that asks for a newer C library."""
    said: list[str] = []

    def open_library(path: Path) -> None:
        if path.parent == folder:
            raise OSError("version `GLIBC_2.99' not found")

    loaded = library.load(open_library, said.append, 0)
    assert loaded.origin == "JIT"
    assert "GLIBC_2.99" in said[0]


def test_without_a_compiler_it_is_told_why_the_wheels_does_not_serve(folder, tmp_path, monkeypatch):
    change(folder, archs=["9.0"], ptx="9.0")
    monkeypatch.setattr(library, "detect_target", lambda: Target("cuda", ("8.0",)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"No C\+\+ compiler found(?s:.*)is for 9\.0, wanted is 8\.0") as failure:
        library.load(lambda path: None, print, 0)
    assert failure.value.remedy.startswith("Install a C++ compiler")


def shorten(folder: Path) -> None:
    os.truncate(folder / build.LIBRARY, 100)


def empty_manifest(folder: Path) -> None:
    change(folder, archs=None)


@pytest.mark.parametrize(
    ("variable", "damage", "remedy"),
    [
        ({"MLA_FUSION_JIT": "1"}, None, "Unset MLA_FUSION_JIT: "),
        ({"MLA_FUSION_ARCH": "7.5"}, None, "Unset MLA_FUSION_ARCH, or set it to what the wheel has"),
        ({}, shorten, "Install the wheel again "),
        ({}, empty_manifest, "Install the wheel again "),
    ],
)
def test_the_remedy_is_for_the_cause(variable, damage, remedy, folder, tmp_path, monkeypatch):
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    if damage:
        damage(folder)
    monkeypatch.setattr(library, "detect_target", lambda: Target("cuda", ("7.5",)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError) as failure:
        library.load(lambda path: None, print, 0)
    assert failure.value.remedy.startswith(remedy)
    assert "apt-get install g++" in failure.value.remedy


@pytest.mark.parametrize(
    "facts",
    [
        *({name: None} for name in ("torch", "cuda", "archs", "ptx")),
        {"archs": [9]},
        {"archs": "9.0"},
        {"torch": "2.11"},
        {"cuda": 13},
    ],
    ids=str,
)
def test_a_manifest_that_somebody_edited_leads_to_a_build(facts, folder, monkeypatch):
    change(folder, **facts)
    path, why_not = prebuilt.find(HOPPER)
    assert path is None
    assert "damaged" in why_not or "it is for" in why_not, why_not
    if "torch" in facts:
        assert library.load(ctypes.CDLL, print, 0).origin == "JIT"


# ---- what it needs --------------------------------------------------------------------------------------------------


def bare(folder: Path) -> tuple[str, int]:
    """Loads it with no home, no PATH and no cache; says where it is from and what it answers."""
    for name in ("HOME", "MLA_FUSION_CACHE_DIR", "XDG_CACHE_HOME", "PATH", "TMPDIR"):
        os.environ.pop(name, None)
    libraries = []
    loaded = library.load(lambda path: libraries.append(ctypes.CDLL(str(path))), print, 0)
    return loaded.origin, libraries[0].answer()


def test_nothing_is_run_and_nothing_looked_for(folder, monkeypatch):
    for name in ("cache_dir", "find_toolchain", "make_private", "build_lock"):
        monkeypatch.setattr(build, name, lambda *each, name=name: pytest.fail(f"{name} was called"))
    for name in ("subprocess.run", "subprocess.Popen", "os.mkdir", "os.replace", "tempfile.mkdtemp"):
        monkeypatch.setattr(name, lambda *each, name=name, **more: pytest.fail(f"{name} was called"))
    loaded = library.load(ctypes.CDLL, pytest.fail, 0)
    assert (loaded.origin, loaded.path, loaded.target) == ("prebuilt", folder / build.LIBRARY, CPU)


def load_as(user: int, folder: Path, gate: Any, outcomes: Any) -> None:
    gate.wait(60)
    if os.geteuid() == 0:
        os.setgid(user)
        os.setuid(user)
    outcomes.put(bare(folder))


def test_two_users_at_once_from_a_folder_that_neither_can_write(folder, monkeypatch):
    """Root's site-packages: other users read it, without a home."""
    with tempfile.TemporaryDirectory() as shared:
        place = Path(shared) / "prebuilt"
        shutil.copytree(folder, place)
        for path in (Path(shared), place, *place.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        monkeypatch.setattr(prebuilt, "FOLDER", place)
        # The sources' digest is of files that other users cannot read here.
        digest = compiling.csrc_digest()
        monkeypatch.setattr(prebuilt, "csrc_digest", lambda: digest)
        before = sorted((path.name, path.stat().st_mtime_ns) for path in (place, *place.iterdir()))
        gate, outcomes = FORK.Event(), FORK.Queue()
        processes = [FORK.Process(target=load_as, args=(user, place, gate, outcomes)) for user in (12345, 12346)]
        for process in processes:
            process.start()
        gate.set()
        assert [outcomes.get(timeout=120) for _ in processes] == [("prebuilt", 42)] * 2
        for process in processes:
            process.join(60)
        assert sorted((path.name, path.stat().st_mtime_ns) for path in (place, *place.iterdir())) == before
        place.parent.chmod(stat.S_IRWXU)
        place.chmod(stat.S_IRWXU)


# ---- the key of vLLM's compile cache --------------------------------------------------------------------------------


def test_a_prebuilt_and_a_jit_library_of_the_same_sources_share_compiled_graphs(folder, csrc, monkeypatch):
    monkeypatch.setattr(activation, "norm", lambda: activation.Norm.AUTO)
    monkeypatch.setattr(kernel, "failure", lambda: None)
    identity.expect_kernel()

    def key() -> str:
        identity._sources.cache_clear()
        return identity.compile_cache_key()

    try:
        with_prebuilt = key()
        shutil.rmtree(folder)
        monkeypatch.setenv("MLA_FUSION_JIT", "1")
        assert key() == with_prebuilt
        (csrc / "answer.h").write_text("#define ANSWER 43\n")
        assert key() != with_prebuilt
    finally:
        identity._sources.cache_clear()
        identity._kernel_expected.clear()


# ---- what MLA_FUSION_PREBUILT names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "archs"),
    [
        ("all", ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")),
        ("10.0,9.0", ("9.0", "10.0")),
        (" 9.0 ; 12.0 ", ("9.0", "12.0")),
        ("ALL", prebuilt.ARCHS),
    ],
)
def test_archs_of_a_wheel(value, archs, monkeypatch):
    monkeypatch.setattr(targets, "torch_backend", lambda: "cuda")
    assert prebuilt.wanted_archs(value) == archs


@pytest.mark.parametrize("value", ["hopper", "9.0a", "09.0", "none", "gfx942", "cpu"])
def test_what_a_wheel_cannot_hold(value, monkeypatch):
    monkeypatch.setattr(targets, "torch_backend", lambda: "cuda")
    with pytest.raises(BuildError) as failure:
        prebuilt.wanted_archs(value)
    assert "9.0" in failure.value.remedy


def test_a_portable_library_is_for_the_oldest_torch_and_has_ptx_of_the_newest_architecture():
    target = Target("cuda", ("9.0", "10.0"))
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in compiling.cxx_flags(target, is_portable=True)
    assert "-Os" in compiling.cxx_flags(target, is_portable=True)
    assert "--compress-mode=size" in compiling.device_flags(target, is_portable=True)
    assert [flag for flag in compiling.device_flags(target, is_portable=True) if "arch" in flag] == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert tuple(map(int, prebuilt.TESTED_TORCH[0].split("."))) == toolchain.OLDEST_TORCH


def test_a_portable_librarys_device_code_is_one_unit(tmp_path):
    names = ["binding.cpp", "mla_rope_cache.cu", "mla_rope_cache_fp16.cu"]
    sources = compiling._device_code_as_one([tmp_path / name for name in names])
    assert [path.name for path in sources] == ["binding.cpp", "device_code.cu"]
    assert sources[1].read_text() == '#include "mla_rope_cache.cu"\n#include "mla_rope_cache_fp16.cu"\n'
    assert compiling._device_code_as_one([tmp_path / "binding.cpp"]) == [tmp_path / "binding.cpp"]
