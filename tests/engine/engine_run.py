# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine on the shared tiny-mla model, for `engines.py`: `python engine_run.py SPEC.json RESULT.json`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

MODEL = Path(os.environ.get("MLA_TEST_MODEL", Path(__file__).parents[3] / "shared" / "models" / "tiny-mla"))


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (MODEL / f"{name}.jsonl").read_text().splitlines()]


def mixed_prompts(count: int) -> list[str]:
    """Zero to four solved problems before each question: several lengths, shared prefixes, prompts beyond one chunk."""
    shots = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows("train")[:4]]
    return [
        "".join(shots[: index % 5]) + f"Question: {row['question']}\nAnswer:"
        for index, row in enumerate(rows("test")[:count])
    ]


def solved(outputs: list, problems: list[dict[str, str]]) -> list[bool]:
    def last(text: str) -> str:
        return text.split("####")[-1].strip()

    return [last(out.outputs[0].text) == last(row["answer"]) for out, row in zip(outputs, problems, strict=True)]


def give_layers_their_own_writer() -> None:
    """Makes every layer one whose cache our kernel may not write."""
    from vllm.v1.attention.backends.mla import amx_mla, cpu_mla

    # Which of the two serves depends on the CPU.
    for backend in (cpu_mla.CPUMLABackend, amx_mla.AMXMLABackend):

        class OwnWriter(backend.get_impl_cls()):
            def do_kv_cache_update(self, *args, **kwargs) -> None:
                super().do_kv_cache_update(*args, **kwargs)

        backend.get_impl_cls = staticmethod(lambda implementation=OwnWriter: implementation)


def options(spec: dict) -> dict:
    import torch

    found = {"model": str(MODEL), "tokenizer": str(MODEL), "max_model_len": 1536, "max_num_batched_tokens": 384}
    found |= {"max_num_seqs": 32, "enable_chunked_prefill": True, "enable_prefix_caching": True}
    if torch.cuda.is_available():
        # A corner of the GPU: tests may run beside each other.
        found |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
    return found | spec.get("engine", {})


def start(spec: dict):
    from vllm import LLM

    return LLM(**options(spec))


def greedy():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=256, stop=["\n\n"])


def generate(llm, prompts: list[str]) -> list:
    return llm.generate(prompts, greedy(), use_tqdm=False)


def tokens(outputs: list) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in outputs]


def several_engines(spec: dict, prompts: list[str]) -> list[list[list[int]]]:
    """The tokens of one engine, of a second beside it, of the first again, and of a third after both are gone."""
    first = start(spec)
    found = [tokens(generate(first, prompts))]
    second = start(spec)
    found += [tokens(generate(second, prompts)), tokens(generate(first, prompts))]
    for llm in (first, second):
        llm.llm_engine.engine_core.shutdown()
    del first, second, llm
    return [*found, tokens(generate(start(spec), prompts))]


async def data_parallel(spec: dict, prompts: list[str]) -> list[list[list[int]]]:
    """The tokens that rank 0 generates while rank 1 runs dummy batches only, and those of all ranks at work."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options(spec)))

    async def one(number: str, prompt: str, rank: int | None) -> list[int]:
        async for output in engine.generate(prompt, greedy(), number, data_parallel_rank=rank):
            last = output
        return list(last.outputs[0].token_ids)

    async def all_of(name: str, rank: int | None) -> list[list[int]]:
        return await asyncio.gather(*(one(f"{name}-{i}", prompt, rank) for i, prompt in enumerate(prompts)))

    found = [await all_of("one rank", 0), await all_of("all ranks", None)]
    engine.shutdown()
    return found


def before_and_after_sleep(spec: dict, prompts: list[str]) -> list[list[list[int]]]:
    """The tokens before weights and cache left the GPU, and after they are back."""
    llm = start(spec)
    found = [tokens(generate(llm, prompts))]
    llm.sleep(level=1)
    llm.wake_up()
    return [*found, tokens(generate(llm, prompts))]


def main(spec_file: Path, result_file: Path) -> None:
    spec = json.loads(spec_file.read_text())
    if spec.get("own_writer"):
        give_layers_their_own_writer()
    prompts = mixed_prompts(spec.get("prompts", 64))
    if spec.get("several"):
        result_file.write_text(json.dumps({"tokens": several_engines(spec, prompts)}))
        return
    if spec.get("engine", {}).get("enable_sleep_mode"):
        result_file.write_text(json.dumps({"tokens": before_and_after_sleep(spec, prompts)}))
        return
    if "data_parallel_size" in spec.get("engine", {}):
        result_file.write_text(json.dumps({"tokens": asyncio.run(data_parallel(spec, prompts))}))
        return
    began = time.monotonic()
    llm = start(spec)
    seconds = time.monotonic() - began
    mixed = generate(llm, prompts)
    problems = rows("test")[: spec.get("problems", 0)]
    answers = generate(llm, [f"Question: {row['question']}\nAnswer:" for row in problems])
    result = {
        "start_seconds": seconds,
        "tokens": tokens(mixed),
        "prompt_lengths": sorted({len(out.prompt_token_ids) for out in mixed}),
        "solved": solved(answers, problems),
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
