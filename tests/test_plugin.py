# SPDX-License-Identifier: Apache-2.0
"""The entry point and the hooks: on a vLLM or torch that is not as expected, MLA_FUSION=1 leaves vLLM stock and says so.

vLLM is made of stand-ins here; the real releases are in tests/versions and test_engine.py.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
from torch import fx

from vllm_mla_fusion import activation, compat, identity, kernel, ops, plugin, report

UPDATE = compat.UPDATE_OP


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class InductorPass:
    def uuid(self) -> str:
        return "pass"


class MLARoPEKVCacheCatFusionPass(InductorPass):
    """vLLM's own fusion, by its name."""


class Manager:
    """vLLM's pass manager with a pass of the user, vLLM's own fusion, and another one."""

    def __init__(self) -> None:
        self.passes = []

    def configure(self, config) -> None:
        self.passes += [InductorPass(), MLARoPEKVCacheCatFusionPass(), InductorPass()]
        self.fix_functionalization = InductorPass()


class NewerManager(Manager):
    def configure(self, config) -> None:
        super().configure(config)
        del self.fix_functionalization


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Fresh stand-ins for all that the hooks patch, on a CUDA platform with a loaded kernel."""

    class VllmConfig:
        def __init__(self, splitting_ops: list[str] | None = None, **others) -> None:
            self.model_config = SimpleNamespace(use_mla=True)
            self.parallel_config = SimpleNamespace()
            self.compilation_config = SimpleNamespace(
                mode=SimpleNamespace(name="VLLM_COMPILE"),
                backend="inductor",
                splitting_ops=splitting_ops,
                inductor_compile_config={},
                static_forward_context={},
            )
            vars(self).update(others)
            self.__post_init__()

        def __post_init__(self) -> None:
            if getattr(self.compilation_config, "splitting_ops", ()) is None:
                self.compilation_config.splitting_ops = ["vllm::attention", UPDATE]

    class WorkerWrapperBase:
        rpc_rank = 0

        def init_device(self) -> str:
            return "device"

    class Platform:
        device_type = "cuda"

        @classmethod
        def get_pass_manager_cls(cls) -> str:
            return "stand_in.Manager"

        def is_cpu(self) -> bool:
            return False

        def is_cuda_alike(self) -> bool:
            return True

    environment: dict = {}
    module(monkeypatch, "stand_in", Manager=Manager)
    module(monkeypatch, "vllm.config", VllmConfig=VllmConfig)
    module(monkeypatch, "vllm.envs", environment_variables=environment)
    module(monkeypatch, "vllm.platforms", current_platform=Platform())
    module(monkeypatch, "vllm.v1.worker.worker_base", WorkerWrapperBase=WorkerWrapperBase)
    module(monkeypatch, compat._INDUCTOR_PASS, InductorPass=InductorPass)
    monkeypatch.setattr(compat, "support_status", lambda: (True, "supported"))
    monkeypatch.setattr(compat, "failed_probe", lambda: None)
    monkeypatch.setattr(ops, "register", lambda: None)
    monkeypatch.setattr(identity, "_kernel_expected", threading.Event())
    monkeypatch.setattr(kernel, "failure", lambda: None)
    monkeypatch.setattr(report, "_left_alone", report.Counter())
    monkeypatch.setenv("MLA_FUSION", "1")
    compat._pass_manager_class.cache_clear()
    return SimpleNamespace(
        Config=VllmConfig,
        Wrapper=WorkerWrapperBase,
        Platform=Platform,
        environment=environment,
        patched=lambda: [
            name
            for name, function in {
                "config": VllmConfig.__post_init__,
                "worker": WorkerWrapperBase.init_device,
                "warm-up": getattr(WorkerWrapperBase, "compile_or_warm_up_model", None),
                "pass manager": Platform.get_pass_manager_cls,
            }.items()
            if function is not None and function.__module__ == compat.__name__
        ],
    )


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the plugin logs as WARNING or worse."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    activation.logger.addHandler(handler)
    plugin._warn.cache_clear()
    yield found
    activation.logger.removeHandler(handler)


# --- the entry point --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "torch._inductor.pattern_matcher.stable_topological_sort",
        "torch.utils._python_dispatch._disable_current_modes",
        "torch._inductor.custom_graph_pass.CustomGraphPass",
    ],
)
@pytest.mark.parametrize("mode", ["1", "strict"])
def test_torch_that_moved_a_private_name(name: str, mode: str) -> None:
    """In a process of its own: the plugin's modules must not have been imported before."""
    home, _, attribute = name.rpartition(".")
    script = f"import {home} as home; del home.{attribute}; from vllm_mla_fusion import plugin; plugin.register()"
    environ = {"MLA_FUSION": mode, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=False)
    if mode == "strict":
        assert done.returncode != 0
        assert f"ImportError: cannot import name '{attribute}'" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "is off, vLLM runs as stock: could not be activated (ImportError" in done.stderr


def test_unknown_norm_is_a_warning(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION_NORM", "on")
    plugin.register()
    assert not vllm.patched()
    assert len(warnings) == 1
    assert "MLA_FUSION_NORM must be auto or unset" in warnings[0]
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(ValueError, match="MLA_FUSION_NORM must be"):
        plugin.register()


@pytest.mark.parametrize("hook", ["_hook_pass_manager", "_hook_worker", "_hook_config"])
def test_hook_that_cannot_be_installed(hook: str, vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever fails, no graph changes: the configuration's hook is the last, behind a key for the compile cache."""

    def fail(*_) -> None:
        raise AttributeError("gone")

    monkeypatch.setattr(compat, hook, fail)
    plugin.register()
    assert "config" not in vllm.patched()
    assert "VLLM_MLA_FUSION" in vllm.environment
    assert UPDATE in vllm.Config().compilation_config.splitting_ops
    assert len(warnings) == 1
    assert "gone" in warnings[0]


# --- hooks ------------------------------------------------------------------------------------------------------------


def manager_of(vllm, stock: type, monkeypatch: pytest.MonkeyPatch) -> Manager:
    """What a worker gets where `stock` is vLLM's pass manager."""
    monkeypatch.setattr(sys.modules["stand_in"], "Manager", stock)
    plugin.register()
    home, _, name = vllm.Platform.get_pass_manager_cls().rpartition(".")
    manager = getattr(sys.modules[home], name)()
    manager.configure(None)
    return manager


def pass_names(manager: Manager) -> list[str]:
    return [type(each).__name__ for each in manager.passes]


STOCK_PASSES = ["InductorPass", "MLARoPEKVCacheCatFusionPass", "InductorPass"]


def test_ours_comes_before_vllms_own_fusion(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(vllm, Manager, monkeypatch)
    assert pass_names(manager) == ["InductorPass", "FusionPass", *STOCK_PASSES[1:]]
    assert type(manager.fix_functionalization).__name__ == "ThenDefunctionalise"


def test_pass_manager_without_its_last_pass(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half of the fusion: without the second step a graph would copy each query."""
    assert pass_names(manager_of(vllm, NewerManager, monkeypatch)) == STOCK_PASSES
    assert "no attribute 'fix_functionalization'" in next(iter(report._left_alone))
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(RuntimeError, match="does not know this vLLM's pass manager"):
        manager_of(vllm, NewerManager, monkeypatch)


def test_inductor_pass_that_moved(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, compat._INDUCTOR_PASS)
    assert type(manager_of(vllm, Manager, monkeypatch)) is Manager
    assert "no attribute 'InductorPass'" in next(iter(report._left_alone))
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(RuntimeError, match="does not know this vLLM's pass manager"):
        manager_of(vllm, Manager, monkeypatch)


def test_configuration_without_splitting_ops(vllm, warnings) -> None:
    plugin.register()
    compilation = SimpleNamespace(mode="VLLM_COMPILE", backend="inductor")
    vllm.Config(compilation_config=compilation)
    assert "splitting_ops" in warnings[0]


def test_wrapper_without_what_the_hooks_read(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker starts as stock vLLM's does, whatever the hooks cannot find out."""
    vllm.Wrapper.compile_or_warm_up_model = lambda self: "times"
    plugin.register()
    wrapper = vllm.Wrapper()
    assert wrapper.init_device() == "device"
    assert wrapper.compile_or_warm_up_model() == "times"
    assert [each.split(":")[0] for each in warnings] == ["MLA fusion"] * 3
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(AttributeError, match="vllm_config"):
        wrapper.init_device()


@pytest.mark.parametrize(
    "name", ["get_attention_context", "MLAAttention", "InductorPass", "self.fix_functionalization"]
)
def test_probe_of_what_workers_import(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A name that this vLLM does not have is found without importing the module that should have it."""
    package = tmp_path / "vllm"
    for home, names in compat._WORKERS_NAMES.items():
        source = tmp_path.joinpath(*home.split(".")).with_suffix(".py")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("\n".join(each for each in names if each != name) + f"\n{name}_of_another_kind")
    module(monkeypatch, "vllm", __path__=[str(package)])
    assert compat._missing_in_workers().split()[0] == name
