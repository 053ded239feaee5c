# SPDX-License-Identifier: Apache-2.0
"""Which library this process loads: the wheel's if it serves here, else one that is built on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_mla_fusion.jit import build, prebuilt
from vllm_mla_fusion.jit.errors import BuildError
from vllm_mla_fusion.jit.explain import load_remedy
from vllm_mla_fusion.jit.target import Target, detect_target


@dataclass(frozen=True)
class Library:
    """A library that is loaded.

    Args:
        path: The file.
        target: What this process wanted it for.
        origin: ``"prebuilt"``: it came with the wheel; ``"JIT"``: it was built on this machine, now or earlier.
    """

    path: Path
    target: Target
    origin: Literal["prebuilt", "JIT"]


def load(open_library: Callable[[Path], object], say: Callable[[str], None], failure_lasts: float) -> Library:
    """Loads the wheel's library, or one from the cache, or one that is built now.

    Nothing is written, and no cache directory is looked for, unless the wheel's does not serve.

    Args:
        open_library: Loads it into this process; an OSError says that it cannot be loaded.
        say: Gets a line when something takes time or is not as it should be.
        failure_lasts: As for `build.build`.

    Raises:
        BuildError: None can be had; says why the wheel's was passed over.
    """
    target = detect_target()
    path, why_not = prebuilt.find(target)
    if path:
        try:
            open_library(path)
            return Library(path, target, "prebuilt")
        except OSError as error:
            why_not = f"it does not load: {error.__cause__ or error}"
    if prebuilt.FOLDER.exists():
        say(f"the wheel's kernel is passed over: {why_not}")
    try:
        built = build.build(target, say=say, failure_lasts=failure_lasts)
    except BuildError as error:
        if not prebuilt.FOLDER.exists():
            raise
        problem = f"{error.problem}\nThe wheel's own kernel is passed over: {why_not}."
        remedy = prebuilt.remedy()
        raise BuildError(problem, f"{remedy} Or: {error.remedy}" if remedy else error.remedy) from None
    try:
        open_library(built)
    except OSError as error:
        said = str(error.__cause__ or error)
        raise BuildError(f"The built kernel {built} does not load: {said}", load_remedy(said)) from error
    return Library(built, target, "JIT")
