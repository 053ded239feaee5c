# SPDX-License-Identifier: Apache-2.0
"""Stands in for AMD's AITER as FlashInfer's stand-in does: all is there; a function returns its first tensor."""

import flashinfer

flashinfer.stand_in_for(__name__)
