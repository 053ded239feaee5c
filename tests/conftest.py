# SPDX-License-Identifier: Apache-2.0
"""Engine tests need a model that is no part of the repository; .ci/run stops where it is absent."""

import pytest
from engine_run import MODEL


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("engine") and not (MODEL / "config.json").exists():
        pytest.skip(f"no model in {MODEL}: put tiny-mla there, or name its folder in MLA_TEST_MODEL")
