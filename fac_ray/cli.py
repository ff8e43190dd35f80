"""The command `fac-ray`: options in, one stage of the pipeline done, the report's headline out.

Every stage takes the same options, so `jobs/` runs these commands too. Nothing heavy is imported before it is
needed: `--help` and a config's mistakes come at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fac_ray import __version__
from fac_ray.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    from fac_ray.doctor import Check

INTERRUPTED = 130
DEFAULT_FOLDER = "runs/reference"
DEFAULT_SAE_FOLDER = "runs/reference-sae"


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which run a command works on."""
    for option in reversed(
        [
            click.option(
                "--config", "path", metavar="FILE", help="The run's YAML file. Without it: the embedded world."
            ),
            click.option("--set", "overrides", multiple=True, metavar="a.b=v", help="Set one key; may be repeated."),
            click.option("--folder", metavar="DIR", help=f"Embedded world: where to write [{DEFAULT_FOLDER}]."),
            click.option("--world-seed", type=int, metavar="N", help="Embedded world: seed of its texts [0]."),
            click.option("--verbose", is_flag=True, help="Show Ray's own output, and tracebacks."),
        ]
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fac-ray")
def main() -> None:
    """Feature Activation Coverage: what a text data set covers of a model's features, and what it misses.

    Every stage does first what is missing before it. A command that was interrupted goes on where it stopped.

    \b
    The whole way on the embedded world:    fac-ray run
    Your own data:                          fac-ray run --config my.yaml
    Is this machine ready?                  fac-ray doctor
    """


@main.command()
@run_options
def run(**options: Any) -> None:
    """Everything, from texts to the report.

    \b
    Example: fac-ray run --config my.yaml --set synthesis.max_features=50
    """
    carry_out("run", **options)


@main.command()
@run_options
def measure(**options: Any) -> None:
    """Coverage of every corpus.

    \b
    Example: fac-ray measure --config my.yaml --set measure.threshold=0.5
    """
    carry_out("measure", **options)


@main.command()
@run_options
def gaps(**options: Any) -> None:
    """The relevant features that the seed misses.

    \b
    Example: fac-ray gaps --config my.yaml --set relevance.max_q_value=0.05
    """
    carry_out("gaps", **options)


@main.command()
@run_options
def synthesize(**options: Any) -> None:
    """Verified texts that switch the missing features on.

    \b
    Example: fac-ray synthesize --config my.yaml --set synthesis.max_attempts=8
    """
    carry_out("synthesize", **options)


@main.command()
@run_options
def train(**options: Any) -> None:
    """A classifier on each arm of the experiment.

    \b
    Example: fac-ray train --config my.yaml --set training.seeds=[0,1,2,3,4]
    """
    carry_out("train", **options)


@main.command()
@run_options
def evaluate(**options: Any) -> None:
    """The arms compared on the held-out corpus.

    \b
    Example: fac-ray evaluate --config my.yaml
    """
    carry_out("evaluate", **options)


@main.command()
@run_options
def report(**options: Any) -> None:
    """Write the report again from what is finished.

    \b
    Example: fac-ray report --folder runs/reference
    """
    carry_out("report", **options)


@main.group()
def sae() -> None:
    """An SAE of your own, where there is none to load."""


@sae.command("train")
@click.option("--config", "path", metavar="FILE", help="A run's YAML file. Without it: the embedded world.")
@click.option("--set", "overrides", multiple=True, metavar="a.b=v", help="Set one key; may be repeated.")
@click.option("--folder", metavar="DIR", help=f"Embedded world: where to write [{DEFAULT_SAE_FOLDER}].")
@click.option("--verbose", is_flag=True, help="Show Ray's own output, and tracebacks.")
def sae_train(path: str | None, overrides: tuple[str, ...], folder: str | None, verbose: bool) -> None:
    """Train the SAE at `sae.path` on the texts of the corpora, and measure it.

    \b
    Example: fac-ray sae train --config my.yaml --set sae_training.d_sae=16384 --set sae_training.k=32
    """
    _log_to_stderr(verbose)
    with reported(verbose):
        config = _sae_config(path, overrides, folder)
        from fac_ray.sae_training import train_sae
        from fac_ray.session import ray_session

        with ray_session(verbose):
            card = train_sae(config)
        for name, value in card["figures"].items():
            click.echo(f"{name:<24}{'not measured' if value is None else value}")
        click.echo(f"\nSAE and card: {config.sae.path}")


@main.command()
@click.option("--folder", default=".", metavar="DIR", help="Where runs will be written.")
@click.option("--deep", is_flag=True, help="Also start a vLLM and a DeepSpeed engine (minutes).")
def doctor(folder: str, deep: bool) -> None:
    """Is this machine ready for a run, and if not, what to do.

    \b
    Example: fac-ray doctor --deep
    """
    from fac_ray.doctor import examine

    with reported():
        click.echo("Looking at this machine; libraries are started one after another.", err=True)
        checks = examine(Path(folder), deep)
    for check in checks:
        click.echo(check_line(check))
    if any(check.needed and not check.ok for check in checks):
        sys.exit(1)
    click.echo("\nReady.")


def carry_out(  # one parameter for each option
    stage: str, path: str | None, overrides: tuple[str, ...], folder: str | None, world_seed: int | None, verbose: bool
) -> None:
    """Bring a run to the end of a stage and print its headline; ends the process with the exit code."""
    verbose = verbose or os.environ.get("FAC_RAY_DEBUG") == "1"
    _log_to_stderr(verbose)
    with reported(verbose):
        config = config_of(path, overrides, folder, world_seed)
        from fac_ray import pipeline
        from fac_ray.headline import headline
        from fac_ray.session import ray_session

        if stage == "report":
            facts = pipeline.report(config)
        else:
            with ray_session(verbose):
                facts = getattr(pipeline, stage)(config)
        for line in headline(facts):
            click.echo(line)
        click.echo(f"\nReport: {config.folder / 'report.html'}")


def config_of(path: str | None, overrides: tuple[str, ...], folder: str | None, world_seed: int | None) -> RunConfig:
    """The run that the options name: a YAML file, or the embedded world in its folder.

    Raises:
        ConfigError: the file is not a config, or options of the embedded world came with a file.
    """
    if path is not None:
        if folder is not None or world_seed is not None:
            raise ConfigError(
                "--folder and --world-seed belong to the embedded world; with --config use --set run.folder=DIR"
            )
        return load_config(path, overrides)
    from fac_ray.artifacts import Stage, fingerprint
    from fac_ray.reference import default_config, write_world

    home, seed = Path(folder or DEFAULT_FOLDER), world_seed or 0
    config = default_config(home, seed, overrides)
    world = Stage(home / "world", fingerprint(stage="world", version=__version__, seed=seed))
    if not world.finished:  # files that are written again would look changed to every stage
        write_world(world.begin(), seed)
        world.finish()
    return config


def _sae_config(path: str | None, overrides: tuple[str, ...], folder: str | None) -> RunConfig:
    if path is None:
        from fac_ray.reference.build import sae_config

        return sae_config(Path(folder or DEFAULT_SAE_FOLDER), overrides=overrides)
    if folder is not None:
        raise ConfigError("--folder belongs to the embedded world; with --config use --set sae.path=DIR")
    return load_config(path, overrides)


@contextmanager
def reported(verbose: bool = False) -> Iterator[None]:
    """Ends the process with a reason on one line where the block fails for a reason that a user can act on.

    An exception that none of our own or Ray's checks raises is a mistake in the program: it keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\ninterrupted; the same command goes on from here", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not is_expected(error):
            raise
        if verbose:
            traceback.print_exc()
        hint = "" if verbose or isinstance(error, ConfigError) else " (--verbose shows where)"
        click.echo(f"fac-ray: {reason_of(error)}{hint}", err=True)
        sys.exit(1)


def is_expected(error: BaseException) -> bool:
    """Whether an exception speaks of input, machine or cluster: ours, the system's and Ray's own."""
    from_ray = any(kind.__module__.split(".")[0] == "ray" for kind in type(error).__mro__)
    bare = type(error) is Exception  # how Ray says that it could not start
    return from_ray or bare or isinstance(error, ValueError | RuntimeError | OSError)


def reason_of(error: BaseException) -> str:
    """The first cause of an exception on one line; what a remote task raised stands without its remote traceback."""
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if len(lines) > 1 and "Traceback" in str(error) else " ".join(lines)


def check_line(check: Check) -> str:
    """A line of the doctor's table, and one below it with the advice if the check failed."""
    mark, color = ("ok", "green") if check.ok else ("FAILS", "red") if check.needed else ("note", "yellow")
    line = f"{click.style(f'{mark:>5}', fg=color)}  {check.name:<22}  {check.found}"
    return line if check.ok or not check.advice else f"{line}\n{'':31}{click.style(check.advice, dim=True)}"


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fac_ray").setLevel(logging.DEBUG if verbose else logging.INFO)


if __name__ == "__main__":
    main()
