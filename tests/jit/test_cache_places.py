# SPDX-License-Identifier: Apache-2.0
"""The cache on file systems and volumes as they are met: shared, without locks or exec, of odd names and modes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_build import CPU, answer, leftovers

from vllm_mla_fusion import kernel
from vllm_mla_fusion.jit import build, cache
from vllm_mla_fusion.jit.build import BuildError

pytestmark = pytest.mark.usefixtures("csrc")


# ---- locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, errno.EINVAL])
def test_a_file_system_without_locks_is_named_and_nobody_waits(number, root, monkeypatch):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    outcome: list[BuildError] = []

    def try_to_build() -> None:
        with pytest.raises(BuildError) as failure:
            build.build(CPU)
        outcome.append(failure.value)

    builder = threading.Thread(target=try_to_build, daemon=True)
    builder.start()
    builder.join(30)
    assert outcome, "the build waits for a lock that nobody holds"
    assert "file locks" in outcome[0].problem
    assert os.strerror(number) in outcome[0].problem
    assert outcome[0].remedy == "Set MLA_FUSION_CACHE_DIR to a local disk."


def test_the_lock_is_free_after_an_error_and_held_by_one(root):
    root.mkdir(mode=0o700)
    with pytest.raises(KeyError), cache.build_lock(root, print):
        raise KeyError
    said: list[str] = []
    with cache.build_lock(root, said.append) as waited:
        assert waited is None
        with (root / "lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert said == []


# ---- other hosts ----------------------------------------------------------------------------------------------------


def work_dir(root: Path, host: str, pid: int, age: float = 0) -> Path:
    folder = root / f"{cache.WORK_DIRS}cpu_{host}-{pid}-ab12cd"
    folder.mkdir(parents=True)
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def test_only_what_dead_or_long_gone_builders_left_is_swept(root):
    here = cache.host_name()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        pass
    running = [
        work_dir(root, "other-node", 1),
        work_dir(root, "other-node", os.getpid()),
        work_dir(root, "other-node", 2, age=cache.OLDEST_BUILD_SECONDS - 60),
        work_dir(root, here, os.getpid()),
        # A container of this host's name with process numbers of its own.
        work_dir(root, re.sub(r"\d+$", "1", here), ended.pid),
    ]
    gone = [
        work_dir(root, here, ended.pid),
        work_dir(root, "other-node", 3, age=cache.OLDEST_BUILD_SECONDS + 60),
        work_dir(root, here, os.getppid(), age=cache.OLDEST_BUILD_SECONDS + 60),
    ]
    cache.sweep(root)
    assert [folder.exists() for folder in running] == [True] * len(running)
    assert [folder.exists() for folder in gone] == [False] * len(gone)


def test_no_build_takes_as_long_as_a_directory_is_kept():
    from vllm_mla_fusion.jit import compiling

    assert cache.OLDEST_BUILD_SECONDS >= 2 * compiling.COMPILE_TIMEOUT_SECONDS


def test_another_host_was_faster(root, monkeypatch):
    """Its library stays: processes may have loaded it, and ours is the same."""
    stock = build.compile_sources

    def compile_while_the_other_finishes(work, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(build, "compile_sources", stock)
            patch.setattr(build, "_put_in_place", put_in_place)
            if not theirs:
                theirs.append(root)
                tools = build.find_toolchain("cpu")
                final = root / f"cpu-{build.fingerprint(CPU)}"
                build._build_locked(final, CPU, tools, tools.versions(), print, None)
                theirs.append((final / build.LIBRARY).stat().st_ino)
        return stock(work, *rest)

    theirs: list[object] = []
    put_in_place = build._put_in_place
    monkeypatch.setattr(build, "compile_sources", compile_while_the_other_finishes)
    said: list[str] = []
    library = build.build(CPU, said.append)
    assert library.stat().st_ino == theirs[1]
    assert answer(library) == 42
    assert not any("replacing" in line for line in said)
    assert leftovers(root) == []


# ---- places ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def noexec_directory(tmp_path):
    """A real file system without exec, or a skip."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "noexec,mode=700", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_mount_without_exec_is_named_before_anything_is_compiled(noexec_directory, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(noexec_directory / "cache"))
    monkeypatch.setattr(build, "compile_sources", lambda *each: pytest.fail("compiled in vain"))
    with pytest.raises(BuildError, match="cache lies on a file system that is mounted with noexec") as failure:
        build.build(CPU)
    assert "MLA_FUSION_CACHE_DIR" in failure.value.remedy
    assert "without noexec" in failure.value.remedy


def test_a_finished_build_on_a_mount_without_exec_says_the_same(noexec_directory, library, monkeypatch):
    """Copied there, as an image's prebuilt cache may be."""
    copy = noexec_directory / "cache"
    subprocess.run(["cp", "-rp", str(build.cache_dir()), str(copy)], check=True)
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(copy))
    monkeypatch.setenv("MLA_FUSION_ARCH", "cpu")
    with pytest.raises(BuildError, match="failed to map segment") as failure:
        kernel.library.__wrapped__()
    assert "without noexec" in failure.value.remedy


@pytest.mark.parametrize("name", ["a:b", "a$b", "two words", "a:b $c,d'e\"f#g&h;i(j)%k\\l*m?[n]{o}~ä\n"])
def test_any_path_will_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", str(tmp_path / name / "cache"))
    library = build.build(CPU)
    assert name in str(library)
    assert json.loads((library.parent / "manifest.json").read_text())["target"] == "cpu"


@pytest.mark.parametrize("owner", ["mine", "another's"])
@pytest.mark.parametrize("mode", [0o777, 0o2775, 0o1777])
def test_a_shared_volume_has_a_remedy_that_works_as_it_is_written(owner, mode, root, monkeypatch):
    root.mkdir()
    root.chmod(mode)
    if owner == "another's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(root, 12345, 12345)
    with pytest.raises(BuildError) as failure:
        build.build(CPU)
    assert ("chmod" in failure.value.remedy) == (owner == "mine"), "only its owner may change its mode"
    chosen = re.search(r"MLA_FUSION_CACHE_DIR=(\S+?):? ", failure.value.remedy)
    assert chosen, failure.value.remedy
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", chosen[1])
    assert cache.make_private(build.cache_dir()).stat().st_mode & 0o777 == 0o700
    assert build.cache_dir().parent == root


@pytest.mark.parametrize("chosen", ["~nosuch/x", "~nosuch"])
def test_the_home_of_a_user_who_is_not_there(chosen, monkeypatch):
    monkeypatch.setenv("MLA_FUSION_CACHE_DIR", chosen)
    with pytest.raises(BuildError, match=rf"MLA_FUSION_CACHE_DIR={chosen} .* no user nosuch") as failure:
        build.build(CPU)
    assert "HOME is not set" not in str(failure.value)
    assert "begins with /" in failure.value.remedy
