# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.versions`: the plugin's pass on the graphs of every supported vLLM release, without a GPU.

Prints a Markdown table: per release and form of RoPE, in how many variants every MLA layer was fused.
"""

import argparse
import sys
from pathlib import Path

from . import environments, matrix


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="RELEASE",
        default=list(environments.TORCH_OF_RELEASE),
        choices=environments.TORCH_OF_RELEASE,
        help="releases to run (default: all)",
    )
    parser.add_argument(
        "--graphs", type=Path, metavar="FOLDER", help="write the graphs before and after the passes here"
    )
    arguments = parser.parse_args()
    print(matrix.markdown_header(), flush=True)
    failed = []
    for outcome in matrix.run(arguments.only, arguments.graphs):
        print(matrix.markdown_row(outcome), flush=True)
        if not outcome.is_clean():
            failed.append(outcome)
    for outcome in failed:
        print(f"\n{outcome.release}\n{outcome.describe()}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
