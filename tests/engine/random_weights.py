# SPDX-License-Identifier: Apache-2.0
"""vLLM's load format `random`, for models that exist as a config only.

With stock's `dummy` every weight is below 0.001, the norms' too: what the attention adds to the residual is lost in
bfloat16's rounding, and a model whose RoPE is wrong answers as one whose RoPE is right.
"""

from __future__ import annotations

import os
from pathlib import Path

from plugin_metadata import write_plugin_metadata

HERE = Path(__file__).parent


def register() -> None:
    """Called by vLLM in each of its processes: norms of one, matrices that keep the size of what they multiply."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader("random")
    class RandomModelLoader(DummyModelLoader):
        @torch.no_grad()
        def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
            for seed, parameter in enumerate(model.parameters()):
                if parameter.ndim < 2:
                    parameter.fill_(1)
                    continue
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)


def python_path(folder: Path) -> str:
    """What PYTHONPATH needs for vLLM to know the format; `folder` receives the plugin's entry point."""
    write_plugin_metadata(folder, "vllm.general_plugins", "random_weights", "register")
    return os.pathsep.join((str(folder), *map(str, (HERE, HERE.parent))))
