# SPDX-License-Identifier: Apache-2.0
"""The cache directory: where it is, that only its owner writes there, its lock and its clean-up."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.explain import EXEC_REMEDY, SPACE_REMEDY

OTHER_DIR = "Set MLA_FUSION_CACHE_DIR to a directory that you own and others cannot write."
WORK_DIRS = ".mla-fusion-build-"
FAILURE_LOG = ".failed.log"
# The cache directory may be one in which others keep things too: ours is what has a name of one of these two forms.
BUILD_NAME = re.compile(r"(?P<target>(?:cpu|cuda|rocm)(?:-[\w.]+)*)-(?P<sources>[0-9a-f]{16})-[0-9a-f]{8}")
WORK_NAME = re.compile(re.escape(WORK_DIRS) + r"(?P<label>[^_]+)_(?P<host>.+)-(?P<pid>\d+)-[^-]+")
WAIT_NOTICE_SECONDS = 30.0
POLL_SECONDS = 0.05
# Twice what a build may take, and room for clocks that differ.
OLDEST_BUILD_SECONDS = 3600.0
BUILD_MEGABYTES = 20


def cache_dir() -> Path:
    """``MLA_FUSION_CACHE_DIR``, else ``vllm-mla-fusion`` in the user's cache directory. Creates nothing.

    Raises:
        BuildError: There is no home directory to put it in.
    """
    chosen = os.environ.get("MLA_FUSION_CACHE_DIR")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise _no_home(chosen or "") from None
    return Path(user_cache).absolute() / "vllm-mla-fusion"


def _no_home(chosen: str) -> BuildError:
    user = chosen.partition("/")[0].removeprefix("~")
    if user:
        return BuildError(
            f"MLA_FUSION_CACHE_DIR={chosen} cannot be used: there is no user {user}, whose home ~{user} would be.",
            "Give a path that begins with /, or ~/ for the home of this user.",
        )
    return BuildError(
        "No home directory for the kernel cache: HOME is not set and the user has no passwd entry.",
        "Set MLA_FUSION_CACHE_DIR to a directory that this user can write, by a path that begins with /.",
    )


def check_private(path: Path) -> None:
    """Refuses a directory in which somebody else could put the code that we load.

    Raises:
        BuildError: Others can write it, another user than root owns it, or it is no directory.
    """
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise BuildError(f"The kernel cache {path} is not a directory.", OTHER_DIR)
    if status.st_uid not in (os.geteuid(), 0):
        raise BuildError(
            f"The kernel cache {path} belongs to user id {status.st_uid}, this process runs as {os.geteuid()}.",
            _own_directory_in(path),
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = _own_directory_in(path)
        if status.st_uid == os.geteuid():
            remedy = f"chmod go-w {path}, after a look at what is in it. Or: {remedy}"
        raise BuildError(
            f"The kernel cache {path} can be written by other users (mode {stat.S_IMODE(status.st_mode):04o}).", remedy
        )


def _own_directory_in(path: Path) -> str:
    """The remedy for a directory of others, such as a volume: one of our own in it, if it lets us."""
    if not os.access(path, os.W_OK | os.X_OK):
        return OTHER_DIR
    own = path / f"vllm-mla-fusion-{os.geteuid()}"
    return f"Set MLA_FUSION_CACHE_DIR={own}: a directory of its own, which is made with mode 0700."


def check_executable(path: Path) -> None:
    """Refuses a file system from which no code can be loaded.

    Raises:
        BuildError: It is mounted with noexec.
    """
    with explain_os_errors(path):
        if os.statvfs(path).f_flag & os.ST_NOEXEC:
            raise BuildError(
                f"The kernel cache {path} lies on a file system that is mounted with noexec: no library loads from it.",
                EXEC_REMEDY,
            )


def make_private(path: Path) -> Path:
    """Creates ``path`` and its missing parents with mode 0700 and checks it.

    Raises:
        BuildError: It cannot be created or is refused by `check_private`.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with explain_os_errors(path):
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        check_private(path)
    return path


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turns an OSError below ``path`` into a BuildError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = SPACE_REMEDY
        else:
            remedy = "Set MLA_FUSION_CACHE_DIR to a directory that this user can write."
        raise BuildError(f"The kernel cache {path} cannot be used: {error}.", remedy) from error


@contextlib.contextmanager
def build_lock(root: Path, say: Callable[[str], None]) -> Iterator[float | None]:
    """Holds the cache's OS lock, which the kernel frees when its holder dies.

    Args:
        root: The cache directory.
        say: Told once at first, then every half minute, what is waited for.

    Yields:
        When the wait began (``time.time()``), None if there was none.
    """
    lock = root / "lock"
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        began = told = None
        while not _try_lock(file, root):
            now = time.time()
            began = began or now
            if told is None or now - told >= WAIT_NOTICE_SECONDS:
                told = now
                say(f"waiting for {_builder(root)}, {now - began:.0f} s so far (lock: {lock})")
            time.sleep(POLL_SECONDS)
        yield began
    finally:
        os.close(file)


def _try_lock(file: int, root: Path) -> bool:
    """Whether the lock is ours now; it is freed with the last descriptor of its file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # ENOLCK, ENOSYS, EOPNOTSUPP and others: network and FUSE file systems, each in its own words.
        raise BuildError(
            f"The file system of the kernel cache {root} has no file locks that work: {error}.",
            "Set MLA_FUSION_CACHE_DIR to a local disk.",
        ) from None
    return True


def host_name() -> str:
    """This host and its space of process numbers: containers of one host name may have their own."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def work_dir_prefix(label: str) -> str:
    """Name of a build's temporary directory up to its random part; tells waiting processes who builds what."""
    return f"{WORK_DIRS}{label}_{host_name()}-{os.getpid()}-"


def _builder(root: Path) -> str:
    for name in _names(root, WORK_NAME):
        host = re.sub(r"-\d+$", "", name["host"])
        return f"process {name['pid']} on {host} to build the {name['label']} kernel"
    return "another process that uses the kernel cache"


def builds(root: Path) -> dict[Path, re.Match[str]]:
    """The directories of finished builds, sound or damaged, and their names in parts; none if there is no ``root``."""
    return {folder: name for name in _names(root, BUILD_NAME) if (folder := root / name.string).is_dir()}


def _names(root: Path, form: re.Pattern[str]) -> list[re.Match[str]]:
    names = sorted(path.name for path in root.glob("*"))
    return [match for name in names if (match := form.fullmatch(name))]


def sweep(root: Path) -> None:
    """Removes what killed builders left. Only for the holder of the lock.

    On a file system whose locks are each host's own, other hosts may be building: theirs must be older than any build.
    """
    for name in _names(root, WORK_NAME):
        folder = root / name.string
        with contextlib.suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > OLDEST_BUILD_SECONDS
            is_dead = name["host"] == host_name() and not Path(f"/proc/{name['pid']}").exists()
            if is_old or is_dead:
                shutil.rmtree(folder, ignore_errors=True)


def clean(root: Path, say: Callable[[str], None]) -> int:
    """Removes every built kernel and what killed builders left; returns how many kernels.

    Raises:
        BuildError: The directory is refused by `check_private` or cannot be written.
    """
    if not root.exists():
        return 0
    with explain_os_errors(root):
        check_private(root)
        with build_lock(root, say):
            sweep(root)
            kernels = builds(root)
            for folder in kernels:
                shutil.rmtree(folder)
            for log in root.glob(f"*{FAILURE_LOG}"):
                if BUILD_NAME.fullmatch(log.name.removesuffix(FAILURE_LOG)):
                    log.unlink()
    return len(kernels)
