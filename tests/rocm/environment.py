# SPDX-License-Identifier: Apache-2.0
"""Processes in which a stock vLLM believes that it runs on an AMD GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.plugin_metadata import write_plugin_metadata
from tests.versions import environments

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLATFORM = "pretended_rocm"


def install_platform(site: Path) -> None:
    """Puts vLLM's ROCm platform, as a platform plugin, and stand-ins for what it imports into a folder for Python."""
    shutil.copytree(HERE / "site/platform", site, dirs_exist_ok=True)
    metadata = write_plugin_metadata(site, "vllm.platform_plugins", PLATFORM, "qualname")
    # transformers asks which distribution a module called flash_attn belongs to.
    (metadata / "top_level.txt").write_text("\n".join(path.stem for path in (HERE / "site/platform").iterdir()))


def run_here(arch: str, site: Path, module: str) -> list[dict]:
    """Runs a module with the vLLM of this interpreter on a pretended GPU; returns the JSON lines that it prints."""
    install_platform(site)
    paths = [str(ROOT / "src"), str(site), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | _platform_variables(arch) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return _run(sys.executable, module, environ)


def run_release(release: str, arch: str, with_aiter: bool, folder: Path, module: str) -> list[dict]:
    """The same with a released vLLM, in the environments of the release matrix and with the plugin installed."""
    site = folder / "site"
    environments.install_plugins(site)
    install_platform(site)
    environ = environments.environ_of(release, site, folder) | _platform_variables(arch)
    if with_aiter:
        shutil.copytree(HERE / "site/aiter", site / "aiter")
        environ |= {"VLLM_ROCM_USE_AITER": "1", "VLLM_ROCM_USE_AITER_TRITON_ROPE": "1"}
    return _run(str(environments.python_of(release)), module, environ)


def _platform_variables(arch: str) -> dict[str, str]:
    return {"PRETENDED_GFX": arch, "VLLM_PLUGINS": f"{PLATFORM},mla_fusion", "VLLM_LOGGING_LEVEL": "ERROR"}


def _run(python: str, module: str, environ: dict[str, str]) -> list[dict]:
    command = [python, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
