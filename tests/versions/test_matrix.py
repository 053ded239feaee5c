# SPDX-License-Identifier: Apache-2.0
"""The release matrix under pytest: the newest release, and of its whole models what CI has time for."""

import pytest

from . import configurations, environments, matrix, model_classes, models

# 0.26.0, the last with torch 2.11, joins it when its sparse layers trace again.
RELEASES = ["0.33.0"]


@pytest.mark.versions
@pytest.mark.parametrize("release", RELEASES)
def test_release(release: str) -> None:
    (outcome,) = matrix.run([release], quick=True)
    assert outcome.is_clean(), outcome.describe()


@pytest.mark.versions
@pytest.mark.parametrize("release", configurations.WHOLLY_TRACED)
def test_every_model_class_is_traced_or_has_a_reason(release: str) -> None:
    found = model_classes.architectures(environments.vllm_of(release))
    traced = {model.architecture for model in models.MODELS} | {models.DEEPSEEK_V3.architecture}
    assert found.keys() - traced == models.NOT_TRACED.keys() & found.keys()
