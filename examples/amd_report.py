# SPDX-License-Identifier: Apache-2.0
"""Runs the GPU tests on an AMD machine and writes a report to send back.

Needs a checkout of this repository with the plugin installed beside vLLM's ROCm build: pip install -e '.[test]'
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import _common

ROOT = Path(__file__).resolve().parents[1]
SENT_TO = "an issue of this repository"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _common.add_out(parser)
    parser.add_argument("pytest", nargs="*", metavar="PYTEST_ARG", help="what to run (default: tests -m gpu)")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    doctor = _run([sys.executable, "-m", "vllm_mla_fusion", "doctor"], out / "amd_report.doctor.log")
    junit = out / "amd_report.junit.xml"
    junit.unlink(missing_ok=True)
    chosen = arguments.pytest or ["tests", "-m", "gpu"]
    tests = _run([sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", *chosen], out / "amd_report.tests.log")
    facts = _common.measured_on() | _rocm_facts()
    results = _results(junit) if junit.exists() else []
    data = {"facts": facts, "doctor": doctor, "pytest": tests, "arguments": chosen, "tests": results}
    _common.write_results(out, "amd_report", data, _markdown(facts, results, tests, out))
    print(f"Please attach the files amd_report* of {out} to {SENT_TO}. Thank you!")
    return tests


def _run(command: list[str], log: Path) -> int:
    """Exit code; the output goes to `log` and to the terminal."""
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    log.write_text(done.stdout)
    print(done.stdout, flush=True)
    return done.returncode


def _rocm_facts() -> dict[str, str]:
    import torch

    from vllm_mla_fusion.jit import build, target

    try:
        fingerprint = f"{(found := target.detect_target())} {build.fingerprint(found)}"
    except build.BuildError as error:
        fingerprint = str(error)
    return {
        "HIP of torch": torch.version.hip or "none: this torch is not built for ROCm",
        "driver": target.driver_version(target.torch_backend()) or "not found",
        "kernel": fingerprint,
    }


def _results(junit: Path) -> list[dict[str, str]]:
    """Name, outcome and message of every test."""
    results = []
    for case in ElementTree.parse(junit).iter("testcase"):
        verdict = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        results.append(
            {
                "test": f"{case.get('classname')}.{case.get('name')}",
                "outcome": "passed" if verdict is None else verdict.tag,
                "message": "" if verdict is None else verdict.get("message", ""),
            }
        )
    return results


def _markdown(facts: dict[str, str], results: list[dict[str, str]], code: int, out: Path) -> str:
    outcomes = [result["outcome"] for result in results]
    counts = [[name, str(outcomes.count(name))] for name in ("passed", "failure", "error", "skipped")]
    lines = ["# GPU tests of vllm-mla-fusion", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [_common.markdown_table(["outcome", "tests"], counts), ""]
    for result in results:
        if result["message"]:
            lines.append(f"- {result['outcome']} {result['test']}: {result['message'].splitlines()[0][:300]}")
    if not results:
        lines += [
            f"pytest ended with code {code} before it ran a test:",
            "",
            _common.tail(out / "amd_report.tests.log"),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
