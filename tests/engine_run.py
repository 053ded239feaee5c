# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine on the shared tiny-mla model, for test_engine.py: `python engine_run.py SPEC.json RESULT.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

MODEL = Path(os.environ.get("MLA_FUSION_TEST_MODEL", Path(__file__).parents[2] / "shared" / "models" / "tiny-mla"))


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (MODEL / f"{name}.jsonl").read_text().splitlines()]


def mixed_prompts(count: int) -> list[str]:
    """Zero to four solved problems before each question: several lengths, shared prefixes, prompts beyond one chunk."""
    shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows("train")[:4]]
    return [
        "".join(shots[: index % 5]) + f"Question: {row['question']}\nAnswer:"
        for index, row in enumerate(rows("test")[:count])
    ]


def solved(outputs: list, problems: list[dict[str, str]]) -> int:
    def last(text: str) -> str:
        return text.split("####")[-1].strip()

    return sum(last(out.outputs[0].text) == last(row["answer"]) for out, row in zip(outputs, problems, strict=True))


def give_layers_their_own_writer() -> None:
    """Makes every layer one whose cache our kernel may not write."""
    from vllm.v1.attention.backends.mla import cpu_mla

    class OwnWriter(cpu_mla.CPUMLAImpl):
        def do_kv_cache_update(self, *args, **kwargs) -> None:
            super().do_kv_cache_update(*args, **kwargs)

    cpu_mla.CPUMLABackend.get_impl_cls = staticmethod(lambda: OwnWriter)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    if spec.get("own_writer"):
        give_layers_their_own_writer()
    llm = LLM(
        str(MODEL),
        max_model_len=1536,
        max_num_batched_tokens=384,
        max_num_seqs=32,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        **spec.get("engine", {}),
    )
    greedy = SamplingParams(temperature=0, max_tokens=256, stop=["\n\n"])
    mixed = llm.generate(mixed_prompts(spec.get("prompts", 64)), greedy, use_tqdm=False)
    problems = rows("test")[: spec.get("problems", 0)]
    answers = llm.generate([f"Question: {row['question']}\nAnswer:" for row in problems], greedy, use_tqdm=False)
    result = {
        "tokens": [list(out.outputs[0].token_ids) for out in mixed],
        "prompt_lengths": sorted({len(out.prompt_token_ids) for out in mixed}),
        "solved": solved(answers, problems),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
