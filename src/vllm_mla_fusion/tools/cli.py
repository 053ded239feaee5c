# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-mla-fusion``: doctor, build, bench, clean."""

import json
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import click

from vllm_mla_fusion import __version__
from vllm_mla_fusion.jit.errors import BuildError

if TYPE_CHECKING:
    from vllm_mla_fusion.jit.target import Target

COLOURS = {"ok": "green", "note": "yellow", "untried": "yellow", "problem": "red"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vllm-mla-fusion")
def main() -> None:
    """One kernel for RoPE and the KV-cache write of every MLA layer in a stock vLLM (MLA_FUSION=1)."""


def _json_object(context: click.Context, option: click.Parameter, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise click.BadParameter(f'expected a JSON object such as {{"kv_cache_dtype": "fp8"}}, got {text!r}')
    return value


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option(
    "--model", metavar="NAME_OR_PATH", help="Also say whether this model would fuse; its config.json is enough."
)
@click.option("--no-trial", is_flag=True, help="Do not start the model's first layers: judge its config alone.")
@click.option(
    "--engine-args",
    metavar="JSON",
    default="{}",
    callback=_json_object,
    help='Start them with these arguments of vLLM\'s engine, such as \'{"kv_cache_dtype": "fp8"}\'.',
)
def doctor(as_json: bool, model: str | None, no_trial: bool, engine_args: dict[str, Any]) -> None:
    """Check this machine. Exit code 1 if there is a problem; changes nothing, uses no network.

    With --model, the model's first layers are started in this vLLM, small and with random weights: a minute or two, and
    about 2 GB of memory.
    """
    from vllm_mla_fusion.tools import doctor as examination

    checks = examination.diagnose(model, None if no_trial else engine_args)
    report = examination.as_json(checks)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        for check in checks:
            click.secho(f"{check.status:<8}", fg=COLOURS[check.status], nl=False)
            click.echo(f"{check.name:<12}{textwrap.indent(check.detail, ' ' * 20).strip()}")
            if check.remedy:
                click.echo(f"{'':<20}-> {check.remedy}")
        click.echo(examination.verdict(checks))
    sys.exit(0 if report["ok"] else 1)


@main.command()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ARCH",
    help="9.0, 10.0, gfx942, cpu, ...; may be repeated. 9.0,10.0 is one kernel for both.",
)
def build(archs: tuple[str, ...]) -> None:
    """Build the kernel ahead of time, for the visible GPUs or for each ARCH (no GPU needed: container images).

    Builds nothing where the wheel has a kernel that serves; MLA_FUSION_JIT=1 asks for a build all the same.
    """
    from vllm_mla_fusion.jit.target import BUILD_AHEAD, detect_target, lacks_gpu, parse_arch

    failed = False
    try:
        if not archs and lacks_gpu():
            # Not the CPU kernel: a server on GPUs would never load it.
            raise BuildError("No GPU is visible, so its architecture is not known.", BUILD_AHEAD)
        targets = [parse_arch(arch) for arch in archs] or [detect_target()]
    except BuildError as error:
        raise click.ClickException(str(error)) from None
    for target in dict.fromkeys(targets):
        try:
            _build_one(target)
        except BuildError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            failed = True
    sys.exit(1 if failed else 0)


def _build_one(target: "Target") -> None:
    from vllm_mla_fusion.jit import build as builder
    from vllm_mla_fusion.jit import prebuilt, resources

    ready, why_not = prebuilt.find(target)
    if ready:
        click.echo(f"{target}: {ready} (prebuilt, nothing to build; {prebuilt.FORCE_JIT}=1 builds it here)")
        return
    if prebuilt.FOLDER.exists():
        click.echo(f"{target}: the wheel's kernel is passed over: {why_not}")
    began = time.monotonic()

    def step(done: int, total: int) -> None:
        click.echo(f"  [{done}/{total}] {time.monotonic() - began:.1f} s")

    library = builder.build(target, say=click.echo, progress=step)
    log = library.parent / "build.log"
    kernels = resources.summary(log.read_text()) if log.exists() else None
    click.echo(f"{target}: {library} ({time.monotonic() - began:.1f} s{'; ' + kernels if kernels else ''})")


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Benchmark the kernel against the kernels it replaces; `bench --help` lists its options."""
    from vllm_mla_fusion.tools import bench as benchmark

    sys.exit(benchmark.main(list(arguments)))


@main.command()
def clean() -> None:
    """Remove every built kernel from the cache directory."""
    from vllm_mla_fusion.jit import cache

    try:
        root = cache.cache_dir()
        count = cache.clean(root, say=click.echo)
    except BuildError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"removed {count} built kernel{'' if count == 1 else 's'} from {root}")
