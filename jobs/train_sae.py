"""Job: a Top-K SAE for a config's model, trained on the texts of its corpora and written to its `sae.path`."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from fac_ray.artifacts import read_table
from fac_ray.cli import reported
from fac_ray.config import ConfigError, RunConfig, load_config
from fac_ray.progress import Progress
from fac_ray.sae_training import SaeRecipe, Text, train_sae
from fac_ray.session import ray_session


@click.command()
@click.option("--config", "path", required=True, metavar="FILE", help="A run's YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="a.b=v", help="Set one key; may be repeated.")
@click.option("--d-sae", default=1024, show_default=True, help="Number of features.")
@click.option("--k", default=16, show_default=True, help="Features that are active at each token.")
@click.option("--num-tokens", default=2_000_000, show_default=True, help="Tokens to train on.")
def main(path: str, overrides: tuple[str, ...], d_sae: int, k: int, num_tokens: int) -> None:
    """Train the SAE that a config names.

    \b
    Example: python jobs/train_sae.py --config jobs/configs/hh-rlhf-stories260k.yaml
    """
    with reported():
        from fac_ray.backbone import load_backbone

        config = load_config(path, overrides)
        folder = Path(config.sae.path)
        if folder.exists():
            raise ConfigError(f"sae.path {folder}: something is here already; move it away or name another folder")
        backbone = load_backbone(config.model)
        with ray_session():
            texts = list(texts_of(config))
        facts = train_sae(backbone, texts, folder, SaeRecipe(d_sae=d_sae, k=k, num_tokens=num_tokens))
        click.echo(json.dumps({"folder": str(folder), "num_texts": len(texts), **facts}, indent=2))


def texts_of(config: RunConfig) -> Iterator[Text]:
    """Every sample of every corpus, read as a run would read it."""
    from fac_ray.corpus import ingest_corpus

    for name, corpus in config.corpora.items():
        with tempfile.TemporaryDirectory() as scratch, Progress(f"samples/{name}", unit="rows") as progress:
            samples, rejected = Path(scratch) / "samples", Path(scratch) / "rejected"
            ingest_corpus(corpus, samples, rejected, config.run.max_rejected_fraction, progress)
            rows = read_table(samples, ["text", "messages"])
        yield from (row["messages"] or row["text"] for row in rows.to_pylist())


if __name__ == "__main__":
    main()
