"""What a command is asked and how it ends: options in, a config out; a failure becomes a reason and an exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from fac_ray import __version__
from fac_ray.config import ConfigError, RunConfig, load_config

FAILED = 1
UNUSABLE = 2
"""Exit code of a command whose 1 is an answer, and of click for options that it does not know."""
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
            click.option(
                "--verbose", is_flag=True, envvar="FAC_RAY_DEBUG", help="Show Ray's own output, and tracebacks."
            ),
        ]
    ):
        command = option(command)
    return command


@contextmanager
def run_of(
    path: str | None,
    overrides: tuple[str, ...],
    folder: str | None,
    world_seed: int | None,
    verbose: bool,
    failure: int = FAILED,
) -> Iterator[RunConfig]:
    """The run that the options name, for a block that works on it; ends the process as `reported` does."""
    with reported(verbose, failure):
        yield config_of(path, overrides, folder, world_seed)


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


def sae_config_of(path: str | None, overrides: tuple[str, ...], folder: str | None) -> RunConfig:
    """The run whose SAE `fac-ray sae train` makes: a YAML file, or the embedded world with its SAE in the folder.

    Raises:
        ConfigError: the file is not a config, or the folder of the embedded world came with a file.
    """
    if path is None:
        from fac_ray.reference.build import sae_config

        return sae_config(Path(folder or DEFAULT_SAE_FOLDER), overrides=overrides)
    if folder is not None:
        raise ConfigError("--folder belongs to the embedded world; with --config use --set sae.path=DIR")
    return load_config(path, overrides)


@contextmanager
def reported(verbose: bool = False, failure: int = FAILED) -> Iterator[None]:
    """Ends the process with the exit code `failure` and a reason on one line where the block fails as a user can mend.

    An exception that none of our own or Ray's checks raises is a mistake in the program: it keeps its traceback.
    """
    _log_to_stderr(verbose)
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
        sys.exit(failure)


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


def _log_to_stderr(verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fac_ray").setLevel(logging.DEBUG if verbose else logging.INFO)
