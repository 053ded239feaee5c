# SPDX-License-Identifier: Apache-2.0
"""What users are told to type fits the way in which the package came to them; no index has it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from vllm_mla_fusion import installation

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata of an installation, found before that of the tests' own."""
    info = tmp_path / "vllm_mla_fusion-0.1.0.dist-info"
    info.mkdir()
    requirements = 'torch\nmatplotlib>=3.8; extra == "bench"\nlm-eval<0.5,>=0.4.13; extra == "eval"\n'
    lines = "".join(f"Requires-Dist: {line}\n" for line in requirements.splitlines())
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-mla-fusion\nVersion: 0.1.0\n{lines}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return info


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file:///home/a%20b/checkout", "dir_info": {"editable": True}}, "--editable '/home/a b/checkout'"),
        ({"url": "file:///home/checkout", "dir_info": {}}, "/home/checkout"),
        ({"url": "file:///x/vllm_mla_fusion-0.1.0.whl", "archive_info": {}}, "/x/vllm_mla_fusion-0.1.0.whl"),
        ({"url": "https://x.org/m.whl", "archive_info": {}}, "https://x.org/m.whl"),
        ({"url": "https://x.org/m", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}, "git+https://x.org/m@ab12"),
        (None, "vllm-mla-fusion"),
    ],
)
def test_installing_again(origin: dict | None, source: str, installed: Path) -> None:
    """Never with dependencies: pip would replace the torch that vLLM needs."""
    if origin is not None:
        (installed / "direct_url.json").write_text(json.dumps(origin))
    assert installation.install_again() == f"pip install --no-deps --force-reinstall {source}"


def test_an_extra_is_named_by_what_it_asks_for(installed: Path) -> None:
    assert installation.install_extra("eval") == "pip install 'lm-eval<0.5,>=0.4.13'"
    assert installation.install_extra("bench") == "pip install 'matplotlib>=3.8'"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    for question in ("distribution", "requires"):
        monkeypatch.setattr(importlib.metadata, question, absent)
    assert installation.install_again() == f"pip install {ROOT}"
    assert installation.install_extra("eval") == f"pip install '{ROOT}[eval]'"


def test_no_hint_asks_an_index_for_this_package() -> None:
    for folder in ("src", "examples", "csrc", ".ci"):
        for path in (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"):
            hint = "install vllm-mla-fusion", "install 'vllm-mla-fusion", "force-reinstall vllm-mla-fusion"
            assert not any(each in path.read_text() for each in hint), path
    assert "install vllm-mla-fusion" not in (ROOT / "README.md").read_text()
