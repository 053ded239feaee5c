# SPDX-License-Identifier: Apache-2.0
"""The entry point and the hooks: on a vLLM or torch that is not as expected, MLA_FUSION=1 leaves vLLM stock.

vLLM is made of stand-ins here; the real releases are in tests/versions and test_engine.py.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

import vllm_mla_fusion
from vllm_mla_fusion import activation, identity, kernel, plugin
from vllm_mla_fusion.host import config, hooks, layer_ops, passes, report, support
from vllm_mla_fusion.jit import target
from vllm_mla_fusion.tools import model_check

UPDATE = support.UPDATE_OP


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

    def functions() -> dict[str, object]:
        return {
            "config": VllmConfig.__post_init__,
            "worker": WorkerWrapperBase.init_device,
            "warm-up": getattr(WorkerWrapperBase, "compile_or_warm_up_model", None),
            "pass manager": Platform.get_pass_manager_cls.__func__,
        }

    stock = functions()
    environment: dict = {}
    module(monkeypatch, "stand_in", Manager=Manager)
    module(monkeypatch, "vllm.config", VllmConfig=VllmConfig)
    module(monkeypatch, "vllm.envs", environment_variables=environment)
    module(monkeypatch, "vllm.platforms", current_platform=Platform())
    module(monkeypatch, "vllm.v1.worker.worker_base", WorkerWrapperBase=WorkerWrapperBase)
    module(monkeypatch, support.INDUCTOR_PASS, InductorPass=InductorPass)
    monkeypatch.setattr(support, "support_status", lambda: (True, "supported"))
    monkeypatch.setattr(support, "failed_probe", lambda: None)
    monkeypatch.setattr(layer_ops, "register", lambda: None)
    monkeypatch.setattr(config, "layer_names_are_inputs", lambda: True)
    monkeypatch.setattr(identity, "_kernel_expected", threading.Event())
    monkeypatch.setattr(kernel, "failure", lambda: None)
    monkeypatch.setattr(target, "lacks_gpu", lambda: False)
    monkeypatch.setattr(report, "_left_alone", report.Counter())
    monkeypatch.setenv("MLA_FUSION", "1")
    passes._pass_manager_class.cache_clear()
    return SimpleNamespace(
        Config=VllmConfig,
        Wrapper=WorkerWrapperBase,
        Platform=Platform,
        environment=environment,
        patched=lambda: [name for name, function in functions().items() if function is not stock[name]],
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

    monkeypatch.setattr(hooks, hook, fail)
    plugin.register()
    assert "config" not in vllm.patched()
    assert "VLLM_MLA_FUSION" in vllm.environment
    assert UPDATE in vllm.Config().compilation_config.splitting_ops
    assert len(warnings) == 1
    assert "gone" in warnings[0]


@pytest.mark.parametrize("value", [None, "", " ", "0"])
def test_off_hooks_nothing(value: str | None, vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLA_FUSION")
    if value is not None:
        monkeypatch.setenv("MLA_FUSION", value)
    monkeypatch.setenv("MLA_FUSION_NORM", "on")
    plugin.register()
    assert not vllm.patched()
    assert not vllm.environment
    monkeypatch.setenv("MLA_FUSION", "1")
    monkeypatch.setenv("MLA_FUSION_NORM", "auto")
    plugin.register()
    assert vllm.patched() == ["config", "worker", "warm-up", "pass manager"]


def test_unknown_mode(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION", "yes")
    with pytest.raises(ValueError, match="MLA_FUSION must be 0 or unset"):
        plugin.register()


@pytest.mark.parametrize(
    ("version", "is_supported", "sentence"),
    [
        (None, False, "vLLM is not installed; install vllm"),
        ("0.19.1", False, "vLLM 0.19.1 is too old: before 0.20 a captured cache write is unsafe; upgrade vLLM"),
        ("0.20.2", True, "vLLM 0.20.2 is supported"),
        ("0.26.0+cu130", True, "vLLM 0.26.0+cu130 is supported"),
        ("0.33.0", True, "vLLM 0.33.0 is supported"),
        ("0.34.0", True, "vLLM 0.34.0 is newer than the newest tested release (0.33)"),
        ("0.34.0rc1.dev5+g123", True, "vLLM 0.34.0rc1.dev5+g123 is newer than the newest tested release (0.33)"),
    ],
)
def test_support_status(
    version: str | None, is_supported: bool, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "installed_vllm_version", lambda: version)
    supported, status = support.support_status()
    assert supported is is_supported
    assert status.startswith(sentence)
    assert (support.untested_release() == status) is ("newest tested" in sentence)


UNSUPPORTED = {
    "release": ("support_status", (False, "vLLM 0.19 is too old")),
    "probe": ("failed_probe", "InductorPass in vllm"),
    "platform": ("platform_problem", "platform 'tpu' is not supported"),
}


@pytest.mark.parametrize("what", list(UNSUPPORTED))
def test_unsupported_vllm(what: str, vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    function, answer = UNSUPPORTED[what]
    problem = answer[1] if isinstance(answer, tuple) else answer
    monkeypatch.setattr(support, function, lambda: answer)
    plugin.register()
    plugin.register()
    assert not vllm.patched()
    assert len(warnings) == 1
    assert problem in warnings[0]
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(plugin.UnsupportedError, match="MLA_FUSION=strict, but ") as raised:
        plugin.register()
    assert problem in str(raised.value)


def test_a_server_without_a_gpu_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(is_cuda_alike=lambda: False, is_cpu=lambda: False, device_type="", device_name="")
    monkeypatch.setattr(support, "platform", lambda: none)
    assert support.platform_problem().startswith("vLLM finds no GPU on this machine; look at nvidia-smi")


def test_vllm_lists_what_fuses() -> None:
    """The model types that the installed vLLM counts as MLA."""
    # First: the convertor's module cannot be imported on its own.
    pytest.importorskip("vllm.config")
    convertor = pytest.importorskip("vllm.transformers_utils.model_arch_config_convertor")

    def counts_as_mla(model_type: str) -> bool:
        config = SimpleNamespace(model_type=model_type, kv_lora_rank=512)
        return convertor.ModelArchConfigConvertorBase(config, config).is_deepseek_mla()

    # Newer releases no longer have longcat_flash_ngram.
    assert {name for name in model_check.FUSES if not counts_as_mla(name)} <= {"longcat_flash_ngram"}
    assert not counts_as_mla("sarvam_mla")


# --- hooks ------------------------------------------------------------------------------------------------------------


def manager_of(vllm, stock: type, monkeypatch: pytest.MonkeyPatch, **config) -> Manager:
    """What a worker with this configuration gets where `stock` is vLLM's pass manager."""
    monkeypatch.setattr(sys.modules["stand_in"], "Manager", stock)
    plugin.register()
    home, _, name = vllm.Platform.get_pass_manager_cls().rpartition(".")
    manager = getattr(sys.modules[home], name)()
    manager.configure(vllm.Config(**config))
    return manager


def pass_names(manager: Manager) -> list[str]:
    return [type(each).__name__ for each in manager.passes]


STOCK_PASSES = ["InductorPass", "MLARoPEKVCacheCatFusionPass", "InductorPass"]


def test_ours_comes_before_vllms_own_fusion(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(vllm, Manager, monkeypatch)
    assert pass_names(manager) == ["InductorPass", "FusionPass", *STOCK_PASSES[1:]]
    assert type(manager.fix_functionalization).__name__ == "ThenDefunctionalise"


@pytest.mark.parametrize(
    "config",
    [{"splitting_ops": ["vllm::attention", UPDATE]}, {"attention_config": SimpleNamespace(hisparse_config=object())}],
    ids=["splitting_ops", "hisparse"],
)
def test_graphs_of_a_configuration_that_stays_stock(config, vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's partition shows the pass the update whatever splitting_ops say."""
    manager = manager_of(vllm, Manager, monkeypatch, **config)
    assert pass_names(manager) == STOCK_PASSES
    assert type(manager.fix_functionalization).__name__ == "InductorPass"
    assert len(warnings) == 1


def test_pass_manager_without_its_last_pass(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half of the fusion: without the second step a graph would copy each query."""
    assert pass_names(manager_of(vllm, NewerManager, monkeypatch)) == STOCK_PASSES
    assert "no attribute 'fix_functionalization'" in next(iter(report._left_alone))
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(RuntimeError, match="does not know this vLLM's pass manager"):
        manager_of(vllm, NewerManager, monkeypatch)


def test_inductor_pass_that_moved(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, support.INDUCTOR_PASS)
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
    for home, names in support.WORKERS_NAMES.items():
        source = tmp_path.joinpath(*home.split(".")).with_suffix(".py")
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("\n".join(each for each in names if each != name) + f"\n{name}_of_another_kind")
    module(monkeypatch, "vllm", __path__=[str(package)])
    assert support._missing_in_workers().split()[0] == name


# --- configurations ---------------------------------------------------------------------------------------------------


def splitting_ops(config) -> list[str]:
    return config.compilation_config.splitting_ops


def test_update_enters_the_graphs(vllm, warnings) -> None:
    plugin.register()
    assert splitting_ops(vllm.Config()) == ["vllm::attention"]
    assert not warnings


def assert_stays_stock(vllm, warnings, monkeypatch: pytest.MonkeyPatch, problem: str, **options) -> None:
    """Two engines: both stock, one WARNING; strict raises."""
    plugin.register()
    for _ in range(2):
        assert UPDATE in splitting_ops(vllm.Config(**options))
    assert len(warnings) == 1
    assert problem in warnings[0]
    monkeypatch.setenv("MLA_FUSION", "strict")
    with pytest.raises(plugin.UnsupportedError, match="MLA_FUSION=strict, but ") as raised:
        vllm.Config(**options)
    assert problem in str(raised.value)


def test_explicit_splitting_ops_are_respected(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = {"splitting_ops": ["vllm::attention", UPDATE]}
    assert_stays_stock(vllm, warnings, monkeypatch, "splitting_ops were set explicitly", **explicit)


def test_prefill_context_parallelism_is_left_alone(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(prefill_context_parallel_size=2)
    assert_stays_stock(vllm, warnings, monkeypatch, "prefill context parallelism", parallel_config=parallel)
    assert not identity._kernel_expected.is_set()


def test_hisparse_is_left_alone(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = SimpleNamespace(hisparse_config=object())
    assert_stays_stock(vllm, warnings, monkeypatch, "HiSparse", attention_config=attention)
    assert not identity._kernel_expected.is_set()


def test_kv_scales_that_are_measured_are_left_alone(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their op stands between RoPE and the cache write (0.20 to 0.27), and the write reads the scale that it finds."""
    cache = SimpleNamespace(calculate_kv_scales=True)
    assert_stays_stock(vllm, warnings, monkeypatch, "start vLLM without it", cache_config=cache)
    assert "--calculate-kv-scales measures the rotated query" in warnings[0]


def test_layer_names_in_the_graphs_are_left_alone(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "layer_names_are_inputs", lambda: False)
    assert_stays_stock(vllm, warnings, monkeypatch, "unset VLLM_USE_LAYERNAME")


def test_layer_names_in_the_one_graph_of_inductors_partition(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "layer_names_are_inputs", lambda: False)
    compilation = vllm.Config().compilation_config
    compilation.use_inductor_graph_partition = True
    assert config.config_problem(SimpleNamespace(parallel_config=None, compilation_config=compilation)) is None


@pytest.mark.parametrize("value", ["0", "1"])
def test_vllm_says_where_layer_names_are(value: str) -> None:
    """In a process of its own: vLLM reads the variable when it is imported."""
    pytest.importorskip("vllm")
    script = "from vllm_mla_fusion.host import layers; print(layers.layer_names_are_inputs())"
    environ = {**os.environ, "VLLM_USE_LAYERNAME": value, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(value == "1")


def test_failed_build(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "failure", lambda: "There is no compiler.")
    assert_stays_stock(vllm, warnings, monkeypatch, "There is no compiler.")


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            "The cache cannot be used.\nWhat to do: Set MLA_FUSION_CACHE_DIR to another directory.",
            "MLA_FUSION=strict, but the kernel is not available: The cache cannot be used.\n"
            "What to do: Set MLA_FUSION_CACHE_DIR to another directory. Or set MLA_FUSION=1 to run stock vLLM.",
        ),
        (
            "The kernel does not fit: it is for cpu.",
            "MLA_FUSION=strict, but the kernel is not available: The kernel does not fit: it is for cpu. "
            "Remove the cause, or set MLA_FUSION=1 to run stock vLLM.",
        ),
    ],
)
def test_strict_says_one_remedy_in_whole_sentences(failure, sentence, vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_FUSION", "strict")
    monkeypatch.setattr(kernel, "failure", lambda: failure)
    plugin.register()
    with pytest.raises(plugin.UnsupportedError) as raised:
        vllm.Config()
    assert str(raised.value) == sentence


TELL = """
from vllm_mla_fusion import activation, plugin
import logging
logging.basicConfig()
plugin._warn("the kernel is not available: no compiler.\\nWhat to do: tried twice")
plugin._warn("another problem")
"""


def test_what_a_parent_has_told_its_children_do_not_repeat(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API server, the engine's core and the workers all meet the same problem."""
    monkeypatch.setenv(activation.TOLD_VARIABLE, "")
    problem = "the kernel is not available: no compiler."
    assert not activation.is_told(problem)
    plugin._warn(problem)
    assert activation.is_told(problem)
    child = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True)
    assert "no compiler" not in child.stderr
    assert "another problem" in child.stderr
    monkeypatch.setenv(activation.TOLD_VARIABLE, "")
    stranger = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True)
    assert "no compiler" in stranger.stderr
    assert len(warnings) == 1


def test_driver_without_gpu_leaves_the_build_to_its_workers(vllm, warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray head, or a process that CUDA_VISIBLE_DEVICES hides all GPUs from."""
    monkeypatch.setattr(target, "lacks_gpu", lambda: True)
    monkeypatch.setattr(kernel, "failure", lambda: pytest.fail("a kernel for no GPU is built"))
    plugin.register()
    config = vllm.Config()
    assert splitting_ops(config) == ["vllm::attention"]
    assert "no-kernel-expected" in vllm.environment["VLLM_MLA_FUSION"]()
    wrapper = vllm.Wrapper()
    wrapper.vllm_config = config
    wrapper.init_device()
    assert identity._kernel_expected.is_set()
    assert not warnings


def test_compiled_by_plain_inductor(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass goes where this compilation has one, whatever the platform: Inductor's hook or vLLM's pass manager."""
    monkeypatch.setattr(vllm.Platform, "is_cpu", lambda self: True)
    monkeypatch.setattr(vllm.Platform, "is_cuda_alike", lambda self: False)
    plugin.register()
    hook = passes.POST_GRAD_HOOK
    assert hook not in vllm.Config().compilation_config.inductor_compile_config
    plain = vllm.Config().compilation_config
    plain.mode = SimpleNamespace(name="DYNAMO_TRACE_ONCE")
    hooks.keep_update_in_graph(SimpleNamespace(compilation_config=plain), True)
    assert isinstance(plain.inductor_compile_config[hook], passes.InductorHook)


# --- the compile cache's key ------------------------------------------------------------------------------------------


class UsersPass:
    def __init__(self, key: str | None) -> None:
        self.uuid = lambda: key


def test_users_pass_in_inductors_hook() -> None:
    """A pass without an id forbids caching, and so does the hook around it."""
    assert passes.InductorHook(lambda graph: None).uuid() is None
    assert passes.InductorHook(UsersPass(None)).uuid() is None
    keys = {passes.InductorHook(each).uuid() for each in (None, UsersPass("a"), UsersPass("b"))}
    assert len(keys) == 3
    assert None not in keys


def test_library_that_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with it, there is a key, and an answer instead of an exception."""

    def load() -> None:
        raise RuntimeError("registered twice")

    monkeypatch.setattr(kernel, "load", load)
    kernel.loading_failure.cache_clear()
    try:
        assert kernel.failure() == kernel.failure_in_short() == "RuntimeError: registered twice"
        monkeypatch.setattr(identity, "_kernel_expected", threading.Event())
        identity.expect_kernel()
        assert identity.compile_cache_key().startswith("unavailable:")
    finally:
        kernel.loading_failure.cache_clear()


def test_version_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_kernel_expected", threading.Event())
    before = identity.compile_cache_key()
    assert identity.compile_cache_key() == before
    monkeypatch.setattr(vllm_mla_fusion, "__version__", "9.9.9")
    assert identity.compile_cache_key() != before


def test_rank_among_the_engines_workers(vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executors of one worker each call all of them 0."""
    ranks = []
    monkeypatch.setattr(report, "after_warm_up", lambda config, worker, rank: ranks.append(rank))
    plugin.register()
    for worker in (SimpleNamespace(rank=3), SimpleNamespace()):
        wrapper = vllm.Wrapper()
        wrapper.vllm_config = vllm.Config()
        wrapper.worker = worker
        worker.compile_or_warm_up_model = lambda: "times"
        assert wrapper.compile_or_warm_up_model() == "times"
    assert ranks == [3, 0]
