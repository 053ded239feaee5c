# SPDX-License-Identifier: Apache-2.0
"""The release matrix under pytest: the oldest release, the newest, and three between that changed most."""

import pytest

from . import matrix

# 0.22.1: vLLM's own fusion; 0.27.1: torch 2.13; 0.30.0: update_kv_cache and HiSparse.
RELEASES = ["0.20.2", "0.22.1", "0.27.1", "0.30.0", "0.33.0"]


@pytest.mark.versions
@pytest.mark.parametrize("release", RELEASES)
def test_release(release: str) -> None:
    (outcome,) = matrix.run([release])
    assert outcome.is_clean(), outcome.describe()
