# SPDX-License-Identifier: Apache-2.0
"""Offline inference with the fused kernel: the one line that matters is MLA_FUSION=1, set before vLLM is imported.

python examples/offline_inference.py --model deepseek-ai/DeepSeek-V2-Lite-Chat
"""

from __future__ import annotations

import argparse
import os

PROMPTS = [
    "Question: Omar has 57 shells. Omar shares them equally among 3 friends and keeps one share. Uma has 4 shells and "
    "hands all of them to Omar. How many shells does Omar have now?\nAnswer:",
    "Question: Kira has 56 apples. Kira buys another 23. The next day Kira has 4 times as many. Then Kira finds 29 "
    "more. How many apples does Kira have now?\nAnswer:",
]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-ai/DeepSeek-V2-Lite-Chat", help="name or directory (%(default)s)")
    parser.add_argument("--prompt", action="append", help="may be given several times; default: two short ones")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens to generate per prompt (%(default)s)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="longest sequence (%(default)s)")
    parser.add_argument("--mode", choices=["0", "1", "strict"], default="1", help="value of MLA_FUSION (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Generates greedily and prints each prompt with its continuation."""
    args = parse_args()
    os.environ["MLA_FUSION"] = args.mode
    from vllm import LLM, SamplingParams

    llm = LLM(model=args.model, max_model_len=args.max_model_len)
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens, stop=["\n\n"])
    for output in llm.generate(args.prompt or PROMPTS, sampling):
        print(f"\nPrompt: {output.prompt}\nOutput: {output.outputs[0].text.strip()}")


if __name__ == "__main__":  # vLLM may start its engine with spawn, which imports this file again
    main()
