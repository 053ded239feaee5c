# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.versions`: the plugin's pass on the graphs of every supported vLLM release, without a GPU.

Prints a Markdown table: per release and form of checkpoint, in how many configurations every MLA layer of whole models
was fused, in how many forms of RoPE those of bare layers, and where whole engines ran (`python -m
tests.versions.end_to_end`, and by hand on GPUs).
"""

import argparse
import re
import sys
from pathlib import Path

from . import environments, matrix, readme
from .extent import Extent


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
    parser.add_argument("--match", default="", metavar="REGEX", help="only checks whose names match")
    parser.add_argument("--quick", action="store_true", help="only what CI runs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many releases at a time, a core each")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="only run the pass on the graph of a pass failure")
    parser.add_argument("--list", action="store_true", help="print the names of the checks, and run none")
    parser.add_argument(
        "--readme", action="store_true", help="only what the table of tests/README.md counts, and put the rows there"
    )
    arguments = parser.parse_args()
    if arguments.readme and (arguments.match or arguments.quick):
        parser.error("--readme needs the outcome of all that the table counts; leave --match and --quick out")
    extent = Extent.QUICK if arguments.quick else Extent.TABLE if arguments.readme else Extent.ALL
    if arguments.replay:
        from . import failed_graph

        print(failed_graph.rerun(arguments.replay))
        return 0
    if arguments.list:
        names = (check for release in arguments.only for check in matrix.checks_of(release, extent))
        print("\n".join(name for name in dict.fromkeys(names) if re.search(arguments.match, name)))
        return 0
    print(matrix.markdown_header(), flush=True)
    outcomes = []
    for outcome in matrix.run(arguments.only, arguments.graphs, arguments.match, extent, arguments.jobs):
        print(matrix.markdown_row(outcome), flush=True)
        outcomes.append(outcome)
        if arguments.readme:
            readme.write(outcome)
    failed = [outcome for outcome in outcomes if not outcome.is_clean()]
    for outcome in failed:
        print(f"\n{outcome.release}\n{outcome.describe()}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
