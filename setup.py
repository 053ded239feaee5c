# SPDX-License-Identifier: Apache-2.0
"""Ships the top-level csrc/ inside the package; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CSRC = Path(__file__).parent / "csrc"


class BuildPyWithSources(build_py):
    """Copies csrc/ to vllm_mla_fusion/csrc in the build; an editable install reads the checkout's csrc/ instead."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "vllm_mla_fusion" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(CSRC, target)


setup(cmdclass={"build_py": BuildPyWithSources})
