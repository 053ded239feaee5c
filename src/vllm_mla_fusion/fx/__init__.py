# SPDX-License-Identifier: Apache-2.0
"""What the fusion knows of torch graphs, importing nothing of vLLM or of the rest of this package: reading a graph,
evaluating a part of it, recognising RoPE and RMSNorm, rewriting, and the last step that makes the calls in place."""
