# SPDX-License-Identifier: Apache-2.0
"""Compilers and the cache directory, importing nothing of vLLM: what to build for, with what, where it is kept, and how
a build is run, found again and explained when it fails."""
