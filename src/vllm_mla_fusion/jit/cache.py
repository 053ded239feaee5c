# SPDX-License-Identifier: Apache-2.0
"""The cache directory: where it is, that only its owner writes there, its lock and its clean-up."""

import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_mla_fusion.jit.errors import BuildError

OTHER_DIR = "Set MLA_FUSION_CACHE_DIR to a directory that you own and others cannot write."
WORK_DIRS = ".mla-fusion-build-"
FAILURE_LOG = ".failed.log"
# The cache directory may be one in which others keep things too: ours is what has a name of one of these two forms.
BUILD_NAME = re.compile(r"(?P<target>(?:cpu|cuda|rocm)(?:-[\w.]+)*)-(?P<sources>[0-9a-f]{16})-[0-9a-f]{8}")
WORK_NAME = re.compile(re.escape(WORK_DIRS) + r"(?P<label>[^_]+)_(?P<host>.+)-(?P<pid>\d+)-[^-]+")
WAIT_NOTICE_SECONDS = 30.0
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
        raise BuildError(
            "No home directory for the kernel cache: HOME is not set and the user has no passwd entry.",
            "Set MLA_FUSION_CACHE_DIR to a directory that this user can write.",
        ) from None
    return Path(user_cache).absolute() / "vllm-mla-fusion"


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
            OTHER_DIR,
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"The kernel cache {path} can be written by other users (mode {stat.S_IMODE(status.st_mode):04o}).",
            f"chmod go-w {path}, after a look at what is in it. Or: {OTHER_DIR}",
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
            remedy = "Free some disk space, or set MLA_FUSION_CACHE_DIR to another disk."
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
    from filelock import FileLock, Timeout

    lock = FileLock(root / "lock", mode=0o600)
    began = None
    while True:
        try:
            lock.acquire(timeout=WAIT_NOTICE_SECONDS if began else 0)
            break
        except Timeout:
            began = began or time.time()
            say(f"waiting for {_builder(root)}, {time.time() - began:.0f} s so far (lock: {root / 'lock'})")
        except NotImplementedError as error:
            raise BuildError(
                f"The file system of the kernel cache {root} has no file locks: {error}",
                "Set MLA_FUSION_CACHE_DIR to a local disk.",
            ) from None
    try:
        yield began
    finally:
        lock.release()


def work_dir_prefix(label: str) -> str:
    """Name of a build's temporary directory up to its random part; tells waiting processes who builds what."""
    return f"{WORK_DIRS}{label}_{socket.gethostname()}-{os.getpid()}-"


def _builder(root: Path) -> str:
    for name in _names(root, WORK_NAME):
        return f"process {name['pid']} on {name['host']} to build the {name['label']} kernel"
    return "another process that uses the kernel cache"


def builds(root: Path) -> dict[Path, re.Match[str]]:
    """The directories of finished builds, sound or damaged, and their names in parts; none if there is no ``root``."""
    return {folder: name for name in _names(root, BUILD_NAME) if (folder := root / name.string).is_dir()}


def _names(root: Path, form: re.Pattern[str]) -> list[re.Match[str]]:
    names = sorted(path.name for path in root.glob("*"))
    return [match for name in names if (match := form.fullmatch(name))]


def sweep(root: Path) -> None:
    """Removes what killed builders left. Only for the holder of the lock: nobody else builds then."""
    for name in _names(root, WORK_NAME):
        shutil.rmtree(root / name.string, ignore_errors=True)


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
