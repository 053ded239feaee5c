# SPDX-License-Identifier: Apache-2.0
"""The kernel's benchmark: `python examples/benchmark_kernel.py --out results` (the same as `vllm-mla-fusion bench`)."""

import sys

from vllm_mla_fusion.tools.bench import main

sys.exit(main())
