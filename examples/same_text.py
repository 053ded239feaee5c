# SPDX-License-Identifier: Apache-2.0
"""The same prompts with stock vLLM and with the fused kernel, each in a process of its own: are the texts the same?

python examples/same_text.py --model deepseek-ai/DeepSeek-V2-Lite-Chat

A model's folder with a test.jsonl (fields question and answer, as GSM8K's) is asked its own problems.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from _common import ChildError, add_out, add_timeout, counted, environment, fusion_line, positive_int, run_logged
from offline_inference import PROMPTS

MODES = {"off": "stock vLLM", "on": "MLA_FUSION=1"}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its answer must end with if that is known."""

    text: str
    solution: str | None = None


def prompts_of(model: str, count: int) -> list[Prompt]:
    """The first problems of the model's own test set; without one, those of offline_inference.py."""
    problems = Path(model) / "test.jsonl"
    if not problems.is_file():
        return [Prompt(text) for text in PROMPTS[:count]]
    found = []
    for line in problems.read_text().splitlines()[:count]:
        problem = json.loads(line)
        solution = problem["answer"].rpartition("####")[2].strip()
        found.append(Prompt(f"Question: {problem['question']}\nAnswer:", solution))
    return found


def generate(args: argparse.Namespace) -> None:
    """Answers the prompts in this process, greedily, and writes the texts to `args.run_to`."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=args.model, max_model_len=args.max_model_len)
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens, stop=["\n\n", "Question:"])
    outputs = llm.generate([prompt.text for prompt in prompts_of(args.model, args.prompts)], sampling)
    args.run_to.write_text(json.dumps([output.outputs[0].text.strip() for output in outputs]))


def run_modes(args: argparse.Namespace) -> dict[str, list[str]]:
    """The texts of both modes.

    Raises:
        ChildError: an engine failed.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {}
    for mode, name in MODES.items():
        stem = args.out / f"same_text_{mode}"
        log = stem.with_suffix(".log")
        print(
            f"{mode}: {name}; the engine starts, compiles and answers, in {args.timeout} s at most; log: {log}",
            flush=True,
        )
        began = time.monotonic()
        command = [sys.executable, __file__, *sys.argv[1:], "--run-to", f"{stem}.json"]
        run_logged(command, environment(mode), log, args.timeout)
        texts[mode] = json.loads(stem.with_suffix(".json").read_text())
        print(f"{mode}: {time.monotonic() - began:.0f} s. {fusion_line(log)}", flush=True)
    return texts


def report(prompts: list[Prompt], texts: dict[str, list[str]]) -> bool:
    """Prints every answer whole, and whether both modes gave it; returns whether all texts are the same."""
    right: dict[str, int] = dict.fromkeys(MODES, 0)
    for prompt, off, on in zip(prompts, texts["off"], texts["on"], strict=True):
        print(f"\n{prompt.text}\n{on}")
        if on != off:
            print(f"--- DIFFERENT with stock vLLM:\n{off}")
        for mode, text in {"off": off, "on": on}.items():
            right[mode] += prompt.solution is not None and text.endswith(f"#### {prompt.solution}")
    same = sum(off == on for off, on in zip(*texts.values(), strict=True))
    if same == len(prompts):
        print(f"\nsame text off and on: {same} of {counted(len(prompts), 'answer')}")
    else:
        print(f"\ndifferent text: {len(prompts) - same} of {counted(len(prompts), 'answer')}; {_explanation()}")
    if prompts[0].solution is not None:
        print(f"right: {right['off']} of {len(prompts)} off, {right['on']} of {len(prompts)} on")
    return same == len(prompts)


def _explanation() -> str:
    return (
        "two tokens that are nearly as likely may change places with any rounding; gsm8k_accuracy.py --control says "
        "how often that happens between two runs of stock vLLM, and whether the answers suffer"
    )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or directory")
    parser.add_argument("--prompts", type=positive_int, default=4, help="at most so many (%(default)s)")
    parser.add_argument("--max-tokens", type=positive_int, default=256, help="tokens per answer (%(default)s)")
    parser.add_argument("--max-model-len", type=positive_int, default=2048, help="longest sequence (%(default)s)")
    add_timeout(parser, 1800)
    add_out(parser)
    parser.add_argument("--run-to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Compares both modes; as its own child, runs one of them. 0 if all texts are the same."""
    args = parse_args()
    if args.run_to:
        generate(args)
        return 0
    try:
        texts = run_modes(args)
    except ChildError as error:
        sys.exit(str(error))
    return 0 if report(prompts_of(args.model, args.prompts), texts) else 1


if __name__ == "__main__":  # vLLM may start its engine with spawn, which imports this file again
    sys.exit(main())
