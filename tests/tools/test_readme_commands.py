# SPDX-License-Identifier: Apache-2.0
"""Each command of a README's block behind `<!-- ci -->` runs as it stands there, in a checkout without a GPU.

Those of `.ci/test` are left to `.ci/run`, which runs the one; that one runs the other.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from engine_run import MODEL
from engines import run_to_its_end

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
OF_CI = ["bash .ci/test", "bash .ci/test -m light"]


def blocks(readme: Path) -> list[str]:
    return re.findall(r"^<!-- ci -->\n```bash\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)


def commands(readme: Path) -> list[str]:
    lines = [line for block in blocks(readme) for line in block.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if line and not line.startswith("#")]


COMMANDS = [command for readme in READMES for command in dict.fromkeys(commands(readme))]


def test_no_mark_is_lost_and_ci_s_own_commands_are_among_the_marked() -> None:
    assert all(readme.read_text().count("<!-- ci -->") == len(blocks(readme)) for readme in READMES)
    assert set(OF_CI) < set(COMMANDS)


# What a user's shell does not have; MLA_TEST_CXX stays, of which the g++ in PATH is told what it stands for.
OF_TESTS = ("MLA_FUSION", "MLA_TEST_LEAVE", "MLA_TEST_M", "MLA_TEST_DIST", "MLA_TEST_WORKERS", "VLLM_", "PYTEST_")


@pytest.mark.engine
@pytest.mark.parametrize("command", dict.fromkeys(command for command in COMMANDS if command not in OF_CI))
def test_command(command: str, tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OF_TESTS)}
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = inherited | {"MODEL": str(MODEL.resolve()), "PATH": programs}
    log = tmp_path / "log.txt"
    # An engine of vLLM's that cannot start may wait for its worker for ever.
    assert run_to_its_end(["bash", "-euo", "pipefail", "-c", command], environment, log, ROOT) == 0, log.read_text()
