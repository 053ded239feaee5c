# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_mla_fusion``: the same as the command ``vllm-mla-fusion``."""

from vllm_mla_fusion.tools.cli import main

if __name__ == "__main__":
    main(prog_name="vllm-mla-fusion")
