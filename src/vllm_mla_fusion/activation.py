# SPDX-License-Identifier: Apache-2.0
"""What the environment variable MLA_FUSION asks for."""

import contextlib
import enum
import hashlib
import logging
import os
from collections.abc import Iterator
from typing import TypeVar

Choice = TypeVar("Choice", bound=enum.Enum)

VARIABLE = "MLA_FUSION"
NORM_VARIABLE = "MLA_FUSION_NORM"

# Digests of the problems that a process and those it comes from have told; its children get it with the environment.
TOLD_VARIABLE = "_MLA_FUSION_TOLD"

# Loggers outside the vllm namespace lose their INFO lines at vLLM's default level.
logger = logging.getLogger("vllm.mla_fusion")


class Mode(enum.Enum):
    """OFF changes nothing; ON fuses where it is safe and warns otherwise; STRICT raises where ON warns."""

    OFF = "0"
    ON = "1"
    STRICT = "strict"


class Norm(enum.Enum):
    """Whether RMSNorms join the kernel: where that was measured to win, wherever possible, or never."""

    AUTO = "auto"
    ALWAYS = "1"
    NEVER = "0"


ACCEPTED_MODES = "0 or unset (off), 1 (fuse where it is safe) or strict (raise where it is not)"
ACCEPTED_NORMS = "auto or unset (fuse norms where that wins), 1 (wherever possible) or 0 (never)"


def mode() -> Mode:
    """The mode of this process; a ValueError if MLA_FUSION has none of ACCEPTED_MODES."""
    return _read(VARIABLE, Mode.OFF, ACCEPTED_MODES)


def norm() -> Norm:
    """What MLA_FUSION_NORM asks for; a ValueError if it has none of ACCEPTED_NORMS."""
    return _read(NORM_VARIABLE, Norm.AUTO, ACCEPTED_NORMS)


@contextlib.contextmanager
def warn_unless_strict(problem: str) -> Iterator[None]:
    """For the body of a hook: only strict mode lets an exception into vLLM, otherwise a WARNING names the problem."""
    try:
        yield
    except Exception:
        if mode() is Mode.STRICT:
            raise
        logger.warning("MLA fusion: %s.", problem, exc_info=True)


def tell(problem: str) -> bool:
    """Whether this problem still has to be told: False if a process from which this one comes has done so."""
    mine = f"{_digest(problem)}:{os.getpid()}"
    told = os.environ.get(TOLD_VARIABLE, "").split()
    os.environ[TOLD_VARIABLE] = " ".join(dict.fromkeys([*told, mine]))
    return all(each == mine or not each.startswith(_digest(problem)) for each in told)


def is_told(problem: str) -> bool:
    """Whether this process, or one from which it comes, has told the problem by `tell`."""
    return any(each.startswith(_digest(problem)) for each in os.environ.get(TOLD_VARIABLE, "").split())


def _digest(problem: str) -> str:
    """Of the first line: what follows may say where and how often it was tried."""
    first = problem.partition("\n")[0].removesuffix(" The compiler says:")
    return hashlib.sha256(first.encode()).hexdigest()[:16]


def _read(variable: str, default: Choice, accepted: str) -> Choice:
    value = os.environ.get(variable, "").strip()
    try:
        return type(default)(value) if value else default
    except ValueError:
        raise ValueError(f"{variable} must be {accepted}, got {value!r}; set one of these or unset it") from None
