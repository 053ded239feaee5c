# SPDX-License-Identifier: Apache-2.0
"""What people run: the command line, `doctor`, the judgement of a model's config, and the kernel's benchmark."""
