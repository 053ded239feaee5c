# SPDX-License-Identifier: Apache-2.0
"""The build and its cache under faults: real compilers on a tiny csrc/, processes really killed."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_build import CPU, FORK, SOURCE, answer, fake_compiler, leftovers, soon, tool_folder

from vllm_mla_fusion import kernel
from vllm_mla_fusion.jit import build, cache, compiling, host_compiler, manifest, toolchain
from vllm_mla_fusion.jit.build import BuildError, Target

REAL_CSRC = build.csrc_dir()
pytestmark = pytest.mark.usefixtures("csrc")


def prebuild(root: Path, target: Target, sources: str | None = None) -> Path:
    """A sound build of other compilers, as one that was copied here; never loaded."""
    entry = root / f"{target}-{sources or build._sources_digest(target)}-01234567"
    entry.mkdir(parents=True, mode=0o700)
    library = entry / build.LIBRARY
    library.write_bytes(str(target).encode())
    facts = {**manifest.library_facts(library), "target": str(target), "compilers": {}, "signature": {}}
    (entry / "manifest.json").write_text(json.dumps(facts))
    return library


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is below ``folder``: compilers of a build."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in os.readlink(process / "cwd"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """A file that is not there yet; until it is, the compiler waits, and says so by `gate.reached`."""
    path = tmp_path / "gate"
    script = fake_compiler(tmp_path / "held", "1.0")
    wait = f": > {path}.reached; while [ ! -e {path} ]; do sleep 0.05; done; exec "
    script.write_text(script.read_text().replace("exec ", wait))
    monkeypatch.setenv("CXX", str(script))
    return path


def nothing_may_run(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError(f"a finished build ran or locked something: {args}")

    monkeypatch.setattr("subprocess.run", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)


# ---- build, find again ----------------------------------------------------------------------------------------------


def test_builds_once_and_then_runs_nothing(root, monkeypatch):
    said, steps = [], []
    library = build.build(CPU, said.append, lambda done, total: steps.append((done, total)))
    assert answer(library) == 42
    assert library == build.library_path(CPU)
    assert library.parent.name == f"cpu-{build.fingerprint(CPU)}"
    assert "building the cpu kernel" in said[0]
    assert steps[-1] == (2, 2)
    assert "answer.cpp" in (library.parent / "build.log").read_text()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert leftovers(root) == []
    nothing_may_run(monkeypatch)
    assert build.build(CPU, said.append) == library
    assert len(said) == 2


def test_environment_and_sources_stay_as_they_were(csrc, tmp_path):
    for path in csrc.iterdir():
        path.chmod(0o444)
    csrc.chmod(0o555)
    before = dict(os.environ), {path.name: path.stat().st_mtime_ns for path in csrc.iterdir()}
    copied = compiling._copy_sources(tmp_path / "copy", CPU)
    assert os.stat(copied[0]).st_mode & stat.S_IWUSR, "hipify has to write beside the copies of a read-only package"
    assert os.stat(copied[0].parent).st_mode & stat.S_IWUSR
    build.build(CPU)
    assert before == (dict(os.environ), {path.name: path.stat().st_mtime_ns for path in csrc.iterdir()})
    csrc.chmod(0o755)


@pytest.mark.parametrize("change", ["source", "header", "new file", "flags", "link flags", "torch", "cuda", "package"])
def test_address_changes_with(change, csrc, monkeypatch):
    before = build.fingerprint(CPU)
    if change == "source":
        (csrc / "answer.cpp").write_text(SOURCE + "\n")
    elif change == "header":
        (csrc / "answer.h").write_text("#define ANSWER 43\n")
    elif change == "new file":
        (csrc / "other.cuh").write_text("")
    elif change == "flags":
        monkeypatch.setattr(compiling, "CXX_FLAGS", ("-O1",))
    elif change == "link flags":
        monkeypatch.setattr(build, "LINK_FLAGS", ())
    elif change == "package":
        monkeypatch.setattr(build, "__version__", "9.9.9")
    else:
        monkeypatch.setattr({"torch": "torch.__version__", "cuda": "torch.version.cuda"}[change], "99.9")
    assert build.fingerprint(CPU) != before


def test_address_changes_with_target():
    targets = [CPU, Target("cuda", ("9.0",)), Target("cuda", ("10.0",)), Target("rocm", ("gfx942",))]
    assert len({build._sources_digest(target) for target in targets}) == 4


def test_an_updated_compiler_builds_again_and_a_touched_one_does_not(tmp_path, monkeypatch):
    compiler = fake_compiler(tmp_path / "bin", "1.0")
    monkeypatch.setenv("CXX", str(compiler))
    first = build.build(CPU)
    os.utime(compiler, (1, 1))
    assert build.build(CPU) == first
    fake_compiler(tmp_path / "bin", "2.0.0")
    second = build.build(CPU)
    assert second != first
    fake_compiler(tmp_path / "bin", "1.0")
    assert build.build(CPU) == first


def test_an_edited_source_is_built(library, csrc):
    assert build.build(CPU) == library
    (csrc / "answer.h").write_text("#define ANSWER 7\n")
    assert answer(build.build(CPU)) == 7


def test_a_build_for_more_architectures_serves(root, monkeypatch):
    root.mkdir(mode=0o700)
    hopper, both = Target("cuda", ("9.0",)), Target("cuda", ("10.0", "9.0"))
    library = prebuild(root, both)
    assert build.build(hopper) == build.library_path(hopper) == library
    assert f"{both}-{build.fingerprint(hopper)}" == library.parent.name
    exact = prebuild(root, hopper)
    assert build.build(hopper) == exact
    assert build.build(both) == library
    monkeypatch.setattr(toolchain, "signature", lambda backend: {})
    assert build.build(hopper) == exact


def test_a_build_that_lacks_an_architecture_or_is_of_other_sources_does_not_serve(root):
    root.mkdir(mode=0o700)
    hopper, both = Target("cuda", ("9.0",)), Target("cuda", ("10.0", "9.0"))
    prebuild(root, hopper)
    assert not build.is_built(both)
    assert not build.is_built(Target("cuda", ("10.0",)))
    assert not build.is_built(Target("rocm", ("9.0",)))
    shutil.rmtree(root)
    # The address of the wanted target instead of the build's own.
    prebuild(root, both, build._sources_digest(hopper))
    prebuild(root, both, "0" * 16)
    assert not build.is_built(hopper)
    with pytest.raises(BuildError, match=r"`vllm-mla-fusion build --arch 10\.0,9\.0` where all is there"):
        build.build(both)


def test_built_targets_are_told_by_the_names_of_our_own_directories(root):
    assert build.built_targets() == []
    both = Target("cuda", ("10.0", "9.0"))
    half_a_manifest(prebuild(root, both))
    (prebuild(root, CPU).parent / "manifest.json").unlink()
    foreign = prebuild(root, Target("rocm", ("gfx942",))).parent
    foreign.rename(root / "my-project")
    assert build.built_targets() == [CPU, both]


def test_a_library_that_does_not_load_says_why(library, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_ARCH", "cpu")
    library.write_text("no machine code, but just as it was built\n" * 9)
    path = library.parent / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **manifest.library_facts(library)}))
    with pytest.raises(
        BuildError, match=rf"^The built kernel {library} does not load: .*invalid ELF header"
    ) as failure:
        kernel.library.__wrapped__()
    assert "`vllm-mla-fusion clean`, then `vllm-mla-fusion build`" in failure.value.remedy


# ---- cache directory ------------------------------------------------------------------------------------------------


def test_parents_are_private_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(tmp_path / "a" / "b" / "c"))
    before = os.umask(0)
    try:
        cache.make_private(build.cache_dir())
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_cache_that_others_can_write_is_refused(library, root, mode):
    root.chmod(mode)
    with pytest.raises(BuildError, match=r"can be written by other users \(mode \d+\)\.\nWhat to do: chmod go-w"):
        build.build(CPU)
    root.chmod(0o755)
    assert build.build(CPU) == library


def test_a_cache_of_another_user_is_refused(root, monkeypatch):
    root.mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(root, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BuildError, match="belongs to user id") as refused:
        build.build(CPU)
    assert "MLA_FUSION_CACHE_DIR" in refused.value.remedy


def test_a_file_in_place_of_the_cache(root):
    root.write_text("")
    with pytest.raises(BuildError, match="is not a directory"):
        build.build(CPU)


def test_read_only_home(monkeypatch):
    monkeypatch.delenv("MLA_FUSION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/self")  # nobody, root included, can create a directory there
    with pytest.raises(BuildError, match=r"/proc/self/\.cache.*cannot be used(?s:.*)MLA_FUSION_CACHE_DIR"):
        build.build(CPU)


def test_no_home(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("MLA_FUSION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(BuildError, match=r"HOME is not set(?s:.*)MLA_FUSION_CACHE_DIR"):
        build.build(CPU)


def test_default_cache_follows_xdg_and_is_not_created(tmp_path, monkeypatch):
    monkeypatch.delenv("MLA_FUSION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_dir() == tmp_path / "xdg" / "vllm-mla-fusion"
    assert not (tmp_path / "xdg").exists()


def test_a_finished_build_in_a_read_only_cache_is_used(library, root, monkeypatch):
    for folder in (root, library.parent):
        folder.chmod(0o555)
    nothing_may_run(monkeypatch)
    assert build.build(CPU) == library


def test_full_disk(root):
    """No file may grow beyond 8 kB, as on a disk with 8 kB left; afterwards the same build succeeds."""

    def with_full_disk(connection) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            build.build(CPU)
        except BuildError as error:
            connection.send(str(error))

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=with_full_disk, args=(theirs,))
    process.start()
    theirs.close()
    message = ours.recv()
    process.join()
    assert "File size limit exceeded" in message or "File too large" in message
    assert "MLA_FUSION_CACHE_DIR to another disk" in message
    assert leftovers(root) == []
    assert answer(build.build(CPU)) == 42


# ---- compilers ------------------------------------------------------------------------------------------------------


def test_without_compiler_a_finished_build_works_and_none_is_explained(library, csrc, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tool_folder(tmp_path / "bin", "ninja")))
    monkeypatch.delenv("CXX", raising=False)
    nothing_may_run(monkeypatch)
    assert build.build(CPU) == library
    (csrc / "answer.h").write_text("#define ANSWER 1\n")
    with pytest.raises(BuildError, match=r"No C\+\+ compiler found(?s:.*)apt-get install g\+\+(?s:.*)build --arch cpu"):
        build.build(CPU)


def test_cxx_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/g++ -m64")
    with pytest.raises(BuildError, match="CXX='/no/such/g"):
        build.build(CPU)


def test_ninja_off_path_is_found_in_its_wheel(tmp_path, monkeypatch):
    tools = tool_folder(tmp_path / "bin", "c++", "g++", "gcc", "as", "ld", "sh")
    monkeypatch.setenv("PATH", str(tools))
    assert shutil.which("ninja") is None
    assert answer(build.build(CPU)) == 42


def test_too_old_a_torch_is_not_to_be_used_for_a_prebuild(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.10.1")
    with pytest.raises(BuildError, match=r"torch 2\.11 or newer is needed") as failure:
        build.build(CPU)
    assert failure.value.remedy == toolchain.TORCH_REMEDY


def test_no_ninja(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "find_ninja", lambda: None)
    with pytest.raises(BuildError, match="pip install ninja"):
        build.build(CPU)


def test_a_compile_error_shows_the_compilers_own_words(csrc, root):
    (csrc / "answer.cpp").write_text('extern "C" int answer() { return 42 }\n')
    with pytest.raises(BuildError, match=r"error: expected .;. before") as failure:
        build.build(CPU)
    message = str(failure.value)
    assert "answer.cpp:1" in message
    assert "return 42 }" in message
    assert "Traceback" not in message
    (log,) = root.glob("*.failed.log")
    assert str(log) in message
    assert leftovers(root) == []
    (csrc / "answer.cpp").write_text(SOURCE)
    assert answer(build.build(CPU)) == 42


def test_a_failure_lasts_until_it_is_old_or_something_changes(csrc, root, tmp_path, monkeypatch):
    """The processes of an engine ask one after the other; the command line always tries."""
    compiled = []
    stock = build.compile_sources
    monkeypatch.setattr(build, "compile_sources", lambda *each: compiled.append(1) or stock(*each))

    def fails(failure_lasts: float) -> tuple[int, str]:
        with pytest.raises(BuildError, match="broken on purpose") as failure:
            build.build(CPU, failure_lasts=failure_lasts)
        return len(compiled), str(failure.value)

    (csrc / "answer.cpp").write_text("#error broken on purpose\n")
    assert fails(600)[0] == 1
    count, message = fails(600)
    assert count == 1
    assert "`vllm-mla-fusion build` tries again at once" in message
    assert fails(0)[0] == 2
    (log,) = root.glob("*.failed.log")
    os.utime(log, (time.time() - 700,) * 2)
    assert fails(600)[0] == 3
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "bin", "2.0")))
    assert fails(600)[0] == 4
    (csrc / "answer.cpp").write_text(SOURCE)
    assert answer(build.build(CPU, failure_lasts=600)) == 42


def test_a_library_that_does_not_load_is_a_failed_build(csrc, root):
    (csrc / "answer.cpp").write_text("int missing();\nint answer() { return missing(); }\n")
    with pytest.raises(BuildError, match=r"undefined symbol: .*missing"):
        build.build(CPU)
    assert not list(root.glob("cpu-*/manifest.json"))


def test_a_compiler_that_hangs_is_ended(monkeypatch, tmp_path, root):
    script = fake_compiler(tmp_path / "bin", "1.0")
    script.write_text(script.read_text().replace("exec ", "sleep 600; exec "))
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(compiling, "COMPILE_TIMEOUT_SECONDS", 6.0)
    monkeypatch.setattr(host_compiler, "TRIAL_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(BuildError, match="gave up after 6 s"):
        build.build(CPU)
    assert time.monotonic() - began < 300
    assert processes_in(root) == []


def test_a_compiler_that_ignores_sigterm_is_killed(monkeypatch, tmp_path, root):
    script = fake_compiler(tmp_path / "bin", "1.0")
    script.write_text(script.read_text().replace("exec ", "trap '' TERM; sleep 600; exec "))
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(compiling, "COMPILE_TIMEOUT_SECONDS", 6.0)
    monkeypatch.setattr(host_compiler, "TRIAL_SECONDS", 1.0)
    monkeypatch.setattr(compiling, "GRACE_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(BuildError, match="gave up after 6 s"):
        build.build(CPU)
    assert time.monotonic() - began < 300
    assert soon(lambda: processes_in(root) == [])


def test_compilers_that_outlive_ninja_are_ended(monkeypatch, tmp_path, root):
    """As the OOM killer leaves them: they hold the output open, and nobody waits for them."""
    script = fake_compiler(tmp_path / "bin", "1.0")
    script.write_text(script.read_text().replace("exec ", 'case "$*" in *" -c "*) sleep 600;; esac; exec '))
    monkeypatch.setenv("CXX", str(script))
    outcomes = FORK.Queue()
    process = FORK.Process(target=report_build, args=(FORK.Queue(), outcomes))
    process.start()

    def named(name: str) -> list[int]:
        found = []
        for pid in processes_in(root):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += [pid] if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n" else []
        return found

    assert soon(lambda: named("sleep"))
    os.kill(named("ninja")[0], signal.SIGKILL)
    assert "The kernel does not compile" in outcomes.get(timeout=300)
    process.join(timeout=300)
    assert processes_in(root) == []


# ---- damaged builds -------------------------------------------------------------------------------------------------


def truncate(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def flip_a_byte(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def other_machine(library: Path) -> None:
    path = library.parent / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "riscv64"}))


def half_a_manifest(library: Path) -> None:
    truncate(library.parent / "manifest.json")


def no_library(library: Path) -> None:
    library.unlink()


DAMAGES = [truncate, flip_a_byte, other_machine, half_a_manifest, no_library]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_build_is_replaced(library, damage):
    said: list[str] = []
    damage(library)
    assert not build.is_built(CPU)
    assert build.build(CPU, said.append) == library
    assert any(line.startswith(f"replacing {library.parent}: ") for line in said)
    assert answer(library) == 42


def test_a_damaged_build_without_compiler_is_explained(library, tmp_path, monkeypatch):
    truncate(library)
    monkeypatch.setenv("PATH", str(tool_folder(tmp_path / "bin", "ninja")))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"No C\+\+ compiler(?s:.*)cannot be used: .*changed or cut short"):
        build.build(CPU)


# ---- several processes ----------------------------------------------------------------------------------------------


def report_build(said, results) -> None:
    try:
        results.put(str(build.build(CPU, lambda line: said.put((os.getpid(), line)))))
    except BuildError as error:
        results.put(str(error))


def build_in_processes(count: int, gate: Path) -> tuple[list[str], list[str]]:
    """Outcomes and lines of builders of which one compiles, once all others have said that they wait for it."""
    said, results = FORK.Queue(), FORK.Queue()
    processes = [FORK.Process(target=report_build, args=(said, results)) for _ in range(count)]
    for process in processes:
        process.start()
    lines, waiting = [], set()
    while len(waiting) < count - 1:
        pid, line = said.get(timeout=300)
        lines.append(line)
        waiting |= {pid} if line.startswith("waiting for ") else set()
    gate.touch()
    outcomes = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    while not said.empty():
        lines.append(said.get()[1])
    return outcomes, lines


def test_eight_processes_compile_once(root, gate):
    outcomes, lines = build_in_processes(8, gate)
    assert outcomes == [str(build.library_path(CPU))] * 8
    assert sum("building the cpu kernel" in line for line in lines) == 1
    assert any(re.match(r"waiting for .*process .*\(lock: ", line) for line in lines)
    assert answer(build.library_path(CPU)) == 42
    assert leftovers(root) == []


def test_waiting_processes_share_a_failure(csrc, gate):
    (csrc / "answer.cpp").write_text("#error broken on purpose\n")
    outcomes, lines = build_in_processes(4, gate)
    assert all("broken on purpose" in outcome for outcome in outcomes)
    assert sum("building the cpu kernel" in line for line in lines) == 1


@pytest.mark.slow
def test_twenty_killed_builds(root):
    """SIGKILL at random moments: never a half build, no hang, no compiler that goes on, the next build is right."""
    moments = random.Random(6)
    began = time.monotonic()
    build.build(CPU)
    duration = time.monotonic() - began
    killed = under_way = 0
    for _ in range(200):
        shutil.rmtree(root, ignore_errors=True)
        process = FORK.Process(target=build.build, args=(CPU,))
        process.start()
        process.join(timeout=moments.uniform(0.0, duration))
        if process.exitcode is not None:
            assert process.exitcode == 0
            duration *= 0.9  # the machine has become faster than it was
            continue
        process.kill()
        process.join()
        killed += 1
        if not root.exists() or not list(root.glob("*cpu*")):
            duration *= 1.1  # it has become slower: the build had hardly begun
        else:
            assert build.is_built(CPU) or not list(root.glob("cpu-*"))
            under_way += bool(leftovers(root))
        if killed >= 20 and under_way >= 10:
            break
    assert (killed >= 20, under_way >= 10) == (True, True), f"{killed} builds killed, {under_way} while they compiled"
    assert soon(lambda: processes_in(root) == [])
    assert answer(build.build(CPU)) == 42
    assert leftovers(root) == []


def test_a_killed_builders_directory_is_removed_and_its_lock_is_free(root, gate):
    process = FORK.Process(target=build.build, args=(CPU,))
    process.start()
    # Not earlier: a child that is just being started still has the builder's open lock.
    assert soon(gate.with_suffix(".reached").exists)
    process.kill()
    process.join()
    assert len(leftovers(root)) == 1
    gate.touch()
    said: list[str] = []
    build.build(CPU, said.append)
    assert not any("waiting" in line for line in said)
    assert leftovers(root) == []


def left_by_a_dead_builder(root: Path) -> Path:
    """A process number beyond the kernel's largest."""
    folder = root / f"{cache.work_dir_prefix('cuda-9.0')}x_1".replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    folder.mkdir()
    return folder


def test_clean_removes_kernels_and_leftovers_but_nothing_else(library, root):
    strangers = foreign_things(root)
    left_by_a_dead_builder(root)
    (root / f"{library.parent.name}{cache.FAILURE_LOG}").write_text("")
    assert cache.clean(root, print) == 1
    assert sorted(path.name for path in root.iterdir()) == sorted(["lock", *strangers])
    assert cache.clean(root / "absent", print) == 0


def foreign_things(root: Path) -> list[str]:
    """What other programs may keep in a directory that MLA_FUSION_CACHE_DIR names."""
    folders = [".build-docs", ".mla-fusion-build-my_notes", "web-app", "cpu-kernels", "cuda-9.0-0123456789abcdef-none"]
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "manifest.json").write_text("{}")
    (root / "nightly.failed.log").write_text("theirs")
    return [*folders, "nightly.failed.log"]


def test_a_build_leaves_foreign_things_alone(root):
    strangers = foreign_things(root)
    root.chmod(0o700)
    own = left_by_a_dead_builder(root)
    build.build(CPU)
    assert all((root / name).exists() for name in strangers)
    assert not own.exists()


def test_a_waiting_process_names_the_builder_and_tolerates_other_names(root):
    foreign_things(root)
    assert cache._builder(root) == "another process that uses the kernel cache"
    (root / f"{cache.work_dir_prefix('cuda-9.0')}x_1").mkdir()
    assert cache._builder(root) == f"process {os.getpid()} on {socket.gethostname()} to build the cuda-9.0 kernel"


def test_child_finds_what_this_process_finds(tmp_path):
    environment = compiling._child_environment(tmp_path, CPU, toolchain.find_toolchain("cpu"))
    assert environment["PYTHONPATH"].split(os.pathsep) == [os.path.abspath(path) for path in sys.path if path]
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


# ---- ROCm without ROCm ----------------------------------------------------------------------------------------------

PRETEND_ROCM = """
import os
if "ROCM_HOME" in os.environ:
    import torch
    torch.version.hip = "6.4.0"
    torch.cuda._is_compiled = lambda: True
"""
# Checks that it gets the hipified kernel for both architectures, then compiles a stand-in of its two functions.
PRETEND_HIPCC = r"""#!/bin/bash -e
[ "$1" = --version ] && echo "HIP version: 6.4.0" && exit
[[ "$*" == *--offload-arch=gfx942*--offload-arch=gfx950* ]]
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; [ "$1" = -c ] && in=$2; shift; done
grep -rq '#include <hip/hip_runtime.h>' $(dirname $in)
! grep -q '[^a-z]cuda[A-Z]' $in
g++ -x c++ -fPIC -I$(dirname $in) -c - -o $out <<'END'
#include "mla_rope_cache.h"
namespace mla_fusion {
__attribute__((weak)) int launch_gpu(const Params&, void*) { return 1; }
__attribute__((weak)) const char* gpu_error_name(int) { return "none"; }
}
END
"""


def test_rocm_build_hipifies_a_copy(tmp_path, monkeypatch):
    """The real csrc/ through torch's hipify and ROCm rules; hipcc and the ROCm libraries are stand-ins."""
    rocm = tmp_path / "rocm"
    for folder in ("bin", "lib", "site"):
        (rocm / folder).mkdir(parents=True)
    (rocm / "site/sitecustomize.py").write_text(PRETEND_ROCM)
    (rocm / "bin/hipcc").write_text(PRETEND_HIPCC)
    (rocm / "bin/hipcc").chmod(0o755)
    for name in ("amdhip64", "c10_hip", "torch_hip"):
        library = [
            "g++",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-",
            "-o",
            f"{rocm}/lib/lib{name}.so",
            f"-Wl,-soname,lib{name}.so",
        ]
        code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }'
        subprocess.run(library, input=code if name == "torch_hip" else "", text=True, check=True)
    monkeypatch.syspath_prepend(str(rocm / "site"))
    monkeypatch.setenv("ROCM_HOME", str(rocm))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(rocm / "lib"))
    for module in (build, compiling):
        monkeypatch.setattr(module, "csrc_dir", lambda: REAL_CSRC)
    before = sorted(REAL_CSRC.rglob("*"))
    library = build.build(Target("rocm", ("gfx942", "gfx950")))
    assert sorted(REAL_CSRC.rglob("*")) == before
    assert "Total number of unsupported CUDA function calls: 0" in (library.parent / "build.log").read_text()
