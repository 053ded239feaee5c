# SPDX-License-Identifier: Apache-2.0
"""Stands in for AMD's Quark, without which vLLM does not emulate MXFP4; only ops that are never run import from it."""
