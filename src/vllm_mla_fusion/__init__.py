# SPDX-License-Identifier: Apache-2.0
"""One kernel for RoPE and the KV-cache write of every MLA layer in a stock vLLM.

Importing this package does nothing: no CUDA initialisation, no directory, no build.
"""

__version__ = "0.2.0"
