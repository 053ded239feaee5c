# SPDX-License-Identifier: Apache-2.0
"""The release matrix under pytest: of two releases what CI has time for."""

import pytest

from . import environments, matrix, model_classes, models
from .extent import CI_RELEASES, Extent


@pytest.mark.versions
@pytest.mark.parametrize("release", CI_RELEASES)
def test_release(release: str) -> None:
    (outcome,) = matrix.run([release], extent=Extent.QUICK)
    assert outcome.is_clean(), outcome.describe()


@pytest.mark.versions
@pytest.mark.parametrize("release", CI_RELEASES)
def test_every_model_class_is_traced_or_has_a_reason(release: str) -> None:
    found = model_classes.architectures(environments.vllm_of(release))
    traced = {model.architecture for model in models.MODELS} | {models.DEEPSEEK_V3.architecture}
    assert found.keys() - traced == models.NOT_TRACED.keys() & found.keys()
