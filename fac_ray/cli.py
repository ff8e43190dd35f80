"""The command `fac-ray`: options in, one stage of the pipeline done or one question answered, a page of text out.

Every stage takes the same options, so `jobs/` runs these commands too. Nothing heavy is imported before it is
needed: `--help` and a config's mistakes come at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fac_ray.invocation import DEFAULT_SAE_FOLDER, UNUSABLE, reported, run_of, run_options, sae_config_of

if TYPE_CHECKING:
    from fac_ray.doctor import Check

NUM_SHOWN = 8
"""Features or samples of a list that a terminal shows, unless --show says otherwise."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fac-ray")
def main() -> None:
    """Feature Activation Coverage: what a text data set covers of a model's features, and what it misses.

    Every stage does first what is missing before it. A command that was interrupted goes on where it stopped.

    \b
    The whole way on the embedded world:    fac-ray run
    Your own data:                          fac-ray run --config my.yaml
    What has one corpus that another lacks? fac-ray compare anchor seed
    Is this data good enough to merge?      fac-ray check --min-fac 0.8
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


show_option = click.option(
    "--show",
    "num_shown",
    type=click.IntRange(0),
    default=NUM_SHOWN,
    show_default=True,
    help="Rows of each list to print.",
)


@main.command()
@click.argument("corpora", nargs=-1, required=True, metavar="CORPUS CORPUS...")
@click.option("--all-features", is_flag=True, help="Count every feature, not the relevant ones alone.")
@show_option
@run_options
def compare(corpora: tuple[str, ...], all_features: bool, num_shown: int, **options: Any) -> None:
    """What each corpus has that the others lack, and how far they overlap.

    A CORPUS is one of the run's config, or RUN:CORPUS for one of another run folder that was measured in the same way.
    What is measured already is not measured again.

    \b
    Example: fac-ray compare anchor seed --config my.yaml
    Example: fac-ray compare seed runs/last-month:seed --config my.yaml
    """
    with run_of(**options) as config:
        from fac_ray import pipeline
        from fac_ray.decisions.pages import comparison_page
        from fac_ray.decisions.questions import comparison_folder, require_comparison
        from fac_ray.decisions.terminal import terminal_page
        from fac_ray.session import ray_session

        require_comparison(config, corpora)
        with ray_session(options["verbose"]):
            facts = pipeline.compare(config, corpora, all_features)
        click.echo(terminal_page(comparison_page(facts, num_shown)))
        folder = comparison_folder(config, corpora)
        click.echo(f"All of it: {folder / 'compare.json'}, {folder / 'compare.md'}")


@main.command()
@click.argument("corpus", metavar="CORPUS")
@click.option("--k", "num_samples", type=int, metavar="N", help="Take at most N samples.")
@click.option("--budget-tokens", type=int, metavar="T", help="Take samples of at most T tokens together.")
@click.option("--weights", type=click.Choice(["relevant", "effect", "all"]), help="What a feature counts [relevant].")
@click.option("--base", metavar="CORPUS", help="Corpus whose features are covered already, such as seed.")
@click.option("--partitions", type=int, metavar="M", help="Search in M parts, for pools too large for one search.")
@show_option
@run_options
def select(
    corpus: str,
    num_samples: int | None,
    budget_tokens: int | None,
    weights: str | None,
    base: str | None,
    partitions: int | None,
    num_shown: int,
    **options: Any,
) -> None:
    """The samples of a corpus that together cover most.

    The options stand for the keys of the config's section `selection`.

    \b
    Example: fac-ray select pool --k 500 --config my.yaml
    Example: fac-ray select anchor --k 20 --base seed
    """
    given = {
        "num_samples": num_samples,
        "budget_tokens": budget_tokens,
        "weights": weights,
        "base": base,
        "num_partitions": partitions,
    }
    options["overrides"] += tuple(o for key, value in given.items() for o in override(f"selection.{key}", value))
    with run_of(**options) as config:
        from fac_ray import pipeline
        from fac_ray.artifacts import read_table
        from fac_ray.decisions.pages import selection_page
        from fac_ray.decisions.questions import require_selection
        from fac_ray.decisions.terminal import terminal_page
        from fac_ray.session import ray_session

        require_selection(config, corpus)
        with ray_session(options["verbose"]):
            facts = pipeline.select(config, corpus)
        folder = config.folder / "selection" / corpus
        click.echo(terminal_page(selection_page(facts, read_table(folder / "selected.parquet"), num_shown)))
        click.echo(f"The samples: {folder / 'selected.jsonl'}, {folder / 'selected.parquet'}")


@main.command()
@click.option("--min-fac", type=float, metavar="X", help="Fail if the FAC of the seed is smaller than X.")
@click.option("--baseline", metavar="RUN", help="Fail if FAC is lost against the seed of this run folder.")
@click.option("--max-drop", type=float, metavar="D", help="FAC that may be lost against the baseline [0.01].")
@click.option("--summary", type=click.Path(dir_okay=False), metavar="FILE", help="Append the page to FILE as well.")
@show_option
@run_options
def check(
    min_fac: float | None,
    baseline: str | None,
    max_drop: float | None,
    summary: str | None,
    num_shown: int,
    **options: Any,
) -> None:
    """Is the seed good enough? Exit code 0: yes. 1: a rule fails. 2: it could not be checked.

    The options stand for the keys of the config's section `check`.

    \b
    Example: fac-ray check --config my.yaml --min-fac 0.8 --baseline runs/main --summary "$GITHUB_STEP_SUMMARY"
    """
    given = {"min_fac": min_fac, "baseline": baseline, "max_drop": max_drop}
    options["overrides"] += tuple(o for key, value in given.items() for o in override(f"check.{key}", value))
    with run_of(**options, failure=UNUSABLE) as config:
        from fac_ray import pipeline
        from fac_ray.decisions.pages import check_page
        from fac_ray.decisions.questions import require_check
        from fac_ray.decisions.terminal import terminal_page
        from fac_ray.session import ray_session

        require_check(config)
        with ray_session(options["verbose"]):
            facts = pipeline.check(config)
        page = check_page(facts, num_shown)
        click.echo(terminal_page(page))
        if summary is not None:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(page + "\n")
    sys.exit(0 if facts["passed"] else 1)


@main.group()
def sae() -> None:
    """An SAE of your own, where there is none to load."""


@sae.command("train")
@click.option("--config", "path", metavar="FILE", help="A run's YAML file. Without it: the embedded world.")
@click.option("--set", "overrides", multiple=True, metavar="a.b=v", help="Set one key; may be repeated.")
@click.option("--folder", metavar="DIR", help=f"Embedded world: where to write [{DEFAULT_SAE_FOLDER}].")
@click.option("--verbose", is_flag=True, help="Show Ray's own output, and tracebacks.")
def sae_train(path: str | None, overrides: tuple[str, ...], folder: str | None, verbose: bool) -> None:
    """Train and measure the SAE at `sae.path`.

    It learns the model's residual stream over the texts of all corpora, by the section `sae_training` of the config.
    The same command goes on after an interruption; the folder that comes out holds card.md. See docs/sae-training.md.

    \b
    Example: fac-ray sae train --config my.yaml --set sae_training.d_sae=16384 --set sae_training.k=32
    """
    with reported(verbose):
        config = sae_config_of(path, overrides, folder)
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


def carry_out(stage: str, **options: Any) -> None:
    """Bring a run to the end of a stage and print its headline; ends the process with the exit code."""
    with run_of(**options) as config:
        from fac_ray import pipeline
        from fac_ray.headline import headline
        from fac_ray.session import ray_session

        if stage == "report":
            facts = pipeline.report(config)
        else:
            with ray_session(options["verbose"]):
                facts = getattr(pipeline, stage)(config)
        for line in headline(facts):
            click.echo(line)
        click.echo(f"\nReport: {config.folder / 'report.html'}")


def override(key: str, value: Any) -> tuple[str, ...]:
    """The `--set` that an option of its own stands for; nothing where the option was not given."""
    return () if value is None else (f"{key}={value}",)


def check_line(check: Check) -> str:
    """A line of the doctor's table, and one below it with the advice if the check failed."""
    mark, color = ("ok", "green") if check.ok else ("FAILS", "red") if check.needed else ("note", "yellow")
    line = f"{click.style(f'{mark:>5}', fg=color)}  {check.name:<22}  {check.found}"
    return line if check.ok or not check.advice else f"{line}\n{'':31}{click.style(check.advice, dim=True)}"


if __name__ == "__main__":
    main()
