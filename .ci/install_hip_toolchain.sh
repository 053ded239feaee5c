#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Compilers for AMD GPUs on a Debian or Ubuntu machine without one: what tests/kernel/test_hip.py needs. Run as root (otherwise
# exit code 3 if they are missing); may be run again. clang 19 compiles up to gfx942, the clang 22 in the ziglang wheel
# gfx950; headers and device libraries are HIP's.
set -euo pipefail

packages=(clang-19 lld-19 llvm-19 clang-tools-19 rocm-device-libs libamdhip64-dev)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
  if [ "$(id -u)" != 0 ]; then
    echo "The compilers for AMD GPUs are missing and installing them takes root: tests marked hip cannot run." >&2
    exit 3
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"
fi

python=${PYTHON:-python3}
zig=0.17.1
if [ "$("$python" -c 'import importlib.metadata as m; print(m.version("ziglang"))' 2>/dev/null)" != "$zig" ]; then
  "$python" -m pip install --quiet --no-deps "ziglang==$zig"
fi
