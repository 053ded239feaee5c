# SPDX-License-Identifier: Apache-2.0
from flash_attn import flash_attn_varlen_func as apply_rotary  # noqa: F401
