# SPDX-License-Identifier: Apache-2.0
"""Ships the top-level csrc/ inside the package and, with MLA_FUSION_PREBUILT, a compiled library; the rest is in
pyproject.toml.

``MLA_FUSION_PREBUILT=9.0,10.0`` (or ``all``) makes ``pip wheel .`` a platform wheel with one library for these NVIDIA
architectures. It needs what a build on the machine needs (g++, a CUDA toolkit of torch's major version), and gets torch
and auditwheel into the isolated build environment; without build isolation they must be there.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PREBUILT = os.environ.get("MLA_FUSION_PREBUILT", "").strip()
if PREBUILT == "0":
    PREBUILT = ""
NEEDED = ["torch>=2.11", "ninja>=1.11", "auditwheel>=6.2,<7"]


class BuildPyWithSources(build_py):
    """Copies csrc/ to vllm_mla_fusion/csrc in the build; an editable install reads the checkout's csrc/ instead."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        package = Path(self.build_lib) / "vllm_mla_fusion"
        # What an earlier build left there would get into the wheel.
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        shutil.copytree(ROOT / "csrc", package / "csrc", ignore=shutil.ignore_patterns("*.md"))
        if PREBUILT:
            sys.path.insert(0, str(ROOT / "src"))
            from vllm_mla_fusion.jit import prebuilt

            prebuilt.make(package / "prebuilt", prebuilt.wanted_archs(PREBUILT))


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of one platform: the library has no Python in it."""

    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build_py").build_lib)
        made = list(built.glob("vllm_mla_fusion/prebuilt/*.so"))
        # An editable install has none.
        return ("py3", "none", manylinux_tag(made[0])) if made else super().get_tag()


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


def manylinux_tag(library: Path) -> str:
    """The oldest platform whose C and C++ libraries have every versioned symbol that ``library`` asks for."""
    from auditwheel.architecture import Architecture
    from auditwheel.elfutils import elf_find_versioned_symbols
    from auditwheel.libc import Libc
    from auditwheel.policy import WheelPolicies
    from elftools.elf.elffile import ELFFile

    wanted: dict[str, set[str]] = {}
    with library.open("rb") as file:
        for name, symbol in elf_find_versioned_symbols(ELFFile(file)):
            wanted.setdefault(name, set()).add(symbol)
    policies = WheelPolicies(libc=Libc.GLIBC, arch=Architecture.detect())
    return policies.versioned_symbols_policy(wanted).name


if PREBUILT:
    setup(
        cmdclass={"build_py": BuildPyWithSources, "bdist_wheel": PlatformWheel},
        distclass=PlatformDistribution,
        setup_requires=NEEDED,
    )
else:
    setup(cmdclass={"build_py": BuildPyWithSources})
