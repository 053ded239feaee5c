# SPDX-License-Identifier: Apache-2.0
"""The release matrix under pytest: of two releases what CI has time for."""

from collections.abc import Callable
from typing import Any

import pytest

from . import configurations, environments, matrix, model_classes, models, variants
from .extent import CI_RELEASES, Extent


@pytest.mark.versions
@pytest.mark.parametrize("release", CI_RELEASES)
def test_release(release: str) -> None:
    (outcome,) = matrix.run([release], extent=Extent.QUICK)
    assert outcome.is_clean(), outcome.describe()


def test_ci_has_everything_common_in_one_release_or_the_other() -> None:
    def both(of: Callable[[str, Extent], list[Any]]) -> set[str]:
        return {str(each) for release in CI_RELEASES for each in of(release, Extent.QUICK)}

    assert both(variants.variants_of) == set(map(str, variants.all_variants()))
    assert both(configurations.cases_of) >= set(map(str, configurations.cases_of("0.20.2")))


@pytest.mark.versions
@pytest.mark.parametrize("release", CI_RELEASES)
def test_every_model_class_is_traced_or_has_a_reason(release: str) -> None:
    found = model_classes.architectures(environments.vllm_of(release))
    traced = {model.architecture for model in models.MODELS} | {models.DEEPSEEK_V3.architecture}
    assert found.keys() - traced == models.NOT_TRACED.keys() & found.keys()
