# SPDX-License-Identifier: Apache-2.0
"""What people read when a build fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tiny_build import CPU, SOURCE, answer

from vllm_mla_fusion.jit import build, explain
from vllm_mla_fusion.jit.build import BuildError

pytestmark = pytest.mark.usefixtures("csrc")

NVCC = Path("/usr/local/cuda/bin/nvcc")
CRUMBS = (
    "Traceback",
    'File "',
    "cpp_extension",
    "subprocess",
    "CalledProcessError",
    "-isystem",
    "raise ",
    "FAILED",
    "^^^^",
)


@pytest.mark.parametrize(
    "source",
    [
        "#error broken on purpose\n",
        'extern "C" int answer() { return 42 }\n',
        "int missing();\nint answer() { return missing(); }\n",
        '#include "nowhere.h"\n',
        "int main(; // fatal error in an argument list\n",
    ],
)
def test_a_failure_shows_the_compilers_words_and_no_crumbs(source, csrc, root):
    (csrc / "answer.cpp").write_text(source)
    with pytest.raises(BuildError) as failure:
        build.build(CPU)
    said = failure.value.problem
    assert [crumb for crumb in CRUMBS if crumb in said] == []
    assert max(map(len, said.splitlines()[1:-1])) <= explain.LINE_LENGTH + 5
    assert "answer.cpp" in said or "undefined symbol" in said
    (log,) = root.glob("*.failed.log")
    assert "Traceback" in log.read_text(), "the log is for reports and has all of it"


@pytest.mark.skipif(not NVCC.exists(), reason=f"no {NVCC}")
def test_an_architecture_that_nvcc_does_not_know(tmp_path):
    """In nvcc's own words."""
    (tmp_path / "a.cu").write_text("")
    done = subprocess.run([NVCC, "-arch=sm_199", "-c", "a.cu"], cwd=tmp_path, capture_output=True, text=True)
    error = explain.compile_error(done.stderr, Path("log"))
    assert "install a newer one and set CUDA_HOME" in error.remedy
    assert "MLA_FUSION_ARCH" in error.remedy
    assert "sm_199" in error.problem or "compute_199" in error.problem


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        (
            "crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not "
            "supported!",
            "set CXX to it",
        ),
        ("#error -- unsupported clang version! clang version must be less than 21", "set CXX to it"),
        ('error: exception specification is incompatible with that of previous function "cospi"', "newer toolkit"),
        ("c++: error: unrecognized command-line option '-std=c++20'; did you mean '-std=c++2a'?", "g++ 11"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("sh: 1: cicc: not found", "install it whole"),
        ("c++: fatal error: cannot execute 'as': execvp: No such file or directory", "build-essential"),
        ("collect2: fatal error: cannot find 'ld'", "build-essential"),
        ("/usr/bin/ld: cannot find crt1.o: No such file or directory", "build-essential"),
        ("fatal error: cstdint: No such file or directory", "build-essential"),
        ("fatal error: error writing to /tmp/x.s: No space left on device", "disk space"),
        ("error: x.so: failed to map segment from shared object", "without noexec"),
        ("error: something that nobody has seen", "doctor"),
    ],
)
def test_known_failures_have_their_remedy(output, remedy):
    assert remedy in explain.compile_error(output, Path("log")).remedy


@pytest.mark.parametrize(("cxx", "is_blamed"), [(" ", False), ("ccache g++", True)])
def test_cxx_is_blamed_only_where_it_is_set(cxx, is_blamed, monkeypatch):
    """What breaks every compiler, such as GCC_EXEC_PREFIX, is no choice of CXX."""
    monkeypatch.setenv("CXX", cxx)
    said = "c++: fatal error: cannot execute 'cc1plus': execvp: No such file or directory"
    remedy = explain.compile_error(said, Path("log"), "`c++` does not compile an empty file").remedy
    assert ("set by CXX" in remedy, "build-essential" in remedy) == (is_blamed, not is_blamed)


def test_ninjas_own_reason_is_shown():
    said = "Building extension module mla_fusion...\nninja: error: build.ninja:33: expected newline, got ':'\n"
    assert "build.ninja:33" in explain.compile_error(said, Path("log")).problem
    assert "build stopped" not in explain.compile_error("ninja: build stopped: subcommand failed.", Path("x")).problem


FAIL = """
import sys
from vllm_mla_fusion.jit import build, compiling
for module in (build, compiling):
    module.csrc_dir = lambda: __import__("pathlib").Path(sys.argv[1])
try:
    build.build(build.Target("cpu"), failure_lasts=600)
except build.BuildError as error:
    print(error.problem.count("error:"))
"""


def test_a_failure_ends_with_the_process_that_had_it(csrc, root, tmp_path, monkeypatch):
    """The next start tries again: what was missing, such as a header of the system, may be there by now."""
    import sys

    header = tmp_path / "system/now_installed.h"
    (csrc / "answer.cpp").write_text(f'#include "{header}"\n{SOURCE}')
    first_start = subprocess.run([sys.executable, "-c", FAIL, str(csrc)], capture_output=True, text=True)
    assert first_start.stdout.strip() == "1", first_start.stderr
    assert list(root.glob("*.failed.log"))
    header.parent.mkdir()
    header.touch()
    assert answer(build.build(CPU, failure_lasts=600)) == 42


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"pid": "x"}\n', "as 0.1.0 wrote it: error: broken\n"])
def test_a_log_of_another_form_is_no_failure(text, csrc, root):
    root.mkdir(mode=0o700)
    (root / f"cpu-{build.fingerprint(CPU)}.failed.log").write_text(text)
    assert answer(build.build(CPU, failure_lasts=600)) == 42


def test_the_record_is_of_this_process_and_its_log_is_whole(csrc, root):
    (csrc / "answer.cpp").write_text("#error broken on purpose\n")
    with pytest.raises(BuildError):
        build.build(CPU)
    (log,) = root.glob("*.failed.log")
    head, _, rest = log.read_text().partition("\n")
    assert json.loads(head)["pid"] > 0
    assert "broken on purpose" in rest
