"""The configuration of a run: one YAML file in, one frozen `RunConfig` out.

Every key has a default or is required, unknown keys are refused, and the bounds stand in the field. This module
reads no environment and imports neither torch nor ray, so a config can be checked anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

PRESETS: dict[str, dict[str, Any]] = {
    # The default of this library: the SAE as trained, content tokens only, no attention sinks, long text in windows.
    "corrected": {
        "activation": "native",
        "tokens": "content",
        "sink_norm_ratio": 10.0,
        "max_tokens": None,
        "double_bos": False,
    },
    # The text of the paper: the SAE as trained, everything after the chat template's first prefix, 512 tokens.
    "paper": {
        "activation": "native",
        "tokens": "after_prefix",
        "sink_norm_ratio": False,
        "max_tokens": 512,
        "double_bos": False,
    },
    # The released scripts: ReLU of all pre-activations, 31 leading ids dropped, a doubled BOS, 512 tokens.
    "authors-code": {
        "activation": "dense",
        "tokens": {"skip": 31},
        "sink_norm_ratio": False,
        "max_tokens": 512,
        "double_bos": True,
    },
}


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, what was given and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    path: str
    """Hugging Face folder or hub id of the language model whose residual stream is read."""
    hook_layer: int = Field(ge=1)
    """Number of transformer blocks that run: the residual stream after this block is `hidden_states[hook_layer]`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the language model's weights and activations. The SAE always computes in float32."""
    revision: str | None = None
    """Commit of a hub id; not used for a folder."""
    trust_remote_code: bool = False
    """Whether code shipped with the model may run. Leave it off unless you have read that code."""


class SaeConfig(Section):
    path: str
    """SAELens folder, the authors' `.pth` file, or `release:sae_id` on the hub."""
    allow_mismatch: bool = False
    """Whether the SAE may be used on another model (such as the instruct model of its base model), with another
    `model.dtype` or on longer texts than it was trained on. Off, that is refused; on, it is a warning."""


class TokenSkip(Section):
    skip: int = Field(ge=0)
    """Number of leading token ids that are not pooled."""


class MeasureConfig(Section):
    """How a text becomes activations. A `preset` sets the switches below it that are left at None."""

    preset: Literal["corrected", "paper", "authors-code"] = "corrected"
    """Named set of switches, see `PRESETS` and docs/presets.md."""
    activation: Literal["native", "dense"] | None = None
    """`native`: what the SAE outputs. `dense`: ReLU of all pre-activations."""
    tokens: Literal["content", "after_prefix", "all"] | TokenSkip | None = None
    """Which tokens are pooled: those of message contents, all after the first prefix, all, or all but the first few."""
    sink_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | Literal[False] | None = None
    """Pooled tokens whose residual stream is more than so many times as long as the median of the pooled tokens of
    their window are attention sinks, and are not pooled. False: all are pooled."""
    max_tokens: int | None = Field(default=None, ge=8)
    """With a value from the preset or here, texts are cut at this many tokens (`truncated` says so). None: windows."""
    double_bos: bool | None = None
    """Whether a chat template's BOS is doubled by a second tokenisation, as in the authors' code."""
    window_tokens: int | None = Field(default=None, ge=16)
    """Length of one forward pass over a long text; None: the model's longest context, at most 4,096."""
    batch_tokens: int = Field(default=4096, ge=64)
    """Token budget of one forward pass, padding included."""
    threshold: float = Field(default=0.0, ge=0)
    """A feature is active in a sample if its activation is strictly greater than this."""
    thresholds: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0)
    """Grid of the threshold sweep; `threshold` is added if it is not in it."""
    num_exemplars: int = Field(default=8, ge=1, le=100)
    """Spans kept for each feature and corpus."""
    span_words: int = Field(default=16, ge=1)
    """Length of an exemplar's span in words; it always holds the peak token."""
    num_actors: int | None = Field(default=None, ge=1)
    """Upper bound of the extraction pool; None: one actor for each GPU, or one for every two cores."""

    @property
    def grid(self) -> tuple[float, ...]:
        """All thresholds that are counted, ascending."""
        return tuple(sorted({*self.thresholds, self.threshold}))

    def resolved(self) -> MeasureConfig:
        """The same config with every switch that the preset decides filled in."""
        preset = PRESETS[self.preset]
        given = {k: v if getattr(self, k) is None else getattr(self, k) for k, v in preset.items()}
        return MeasureConfig.model_validate({**self.model_dump(), **given})


class CorpusConfig(Section):
    path: str | tuple[str, ...]
    """File, folder, glob or several; local, `s3://`, `gs://`, `hf://`; jsonl, json, csv, txt, also .gz, and parquet."""
    format: Literal["jsonl", "csv", "parquet", "text"] | None = None
    """None: from the file ending."""
    text: str | None = None
    """Column with the text. None with `messages` None: `text`."""
    messages: str | None = None
    """Column with a chat: a list of {role, content}."""
    transcript: bool = False
    """Whether the text column is a `\\n\\nHuman: ... \\n\\nAssistant: ...` transcript, to be read as a chat."""
    label: str | None = None
    """Column with the sample's label, read as a string."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows."""

    @model_validator(mode="after")
    def _one_content_column(self) -> CorpusConfig:
        if self.text and self.messages:
            raise ValueError("give `text` or `messages`, not both")
        if self.messages and self.transcript:
            raise ValueError("`transcript` reads a text column; leave `messages` out")
        return self


class RelevanceConfig(Section):
    method: Literal["statistical"] = "statistical"
    """`statistical`: features that are active more often in positive anchor samples than in the others."""
    positive: tuple[str, ...] = ("1", "true", "True", "yes")
    """Labels that mean "belongs to the task". If the anchor has no labels, it is tested against the background."""
    max_q_value: float = Field(default=0.01, gt=0, le=1)
    """Largest false discovery rate (Benjamini-Hochberg) at which a feature is called relevant."""
    min_effect: float = 1.0
    """Smallest log2 odds ratio (Haldane-Anscombe corrected) at which a feature is called relevant."""
    min_samples: int = Field(default=5, ge=1)
    """Smallest number of positive anchor samples in which a relevant feature is active."""


class DiversityConfig(Section):
    """The diversity measures beside FAC (docs/diversity.md)."""

    sample_size: int = Field(default=400, ge=2, le=5000)
    """Samples of each corpus, drawn with `run.seed`, for the measures that compare samples with each other."""
    num_clusters: int = Field(default=16, ge=2)
    """Clusters of the cluster entropy; they are those of the anchor's sample where there is an anchor."""
    gram_width: int = Field(default=1024, ge=16, le=8192)
    """Widest SAE whose Vendi score is exact at corpus scale; wider vectors are projected to so many dimensions."""
    pos_language: Literal["en"] | None = "en"
    """Language of the part-of-speech tagger. None: no POS Distinct-2, for texts of another language."""


class SynthesisConfig(Section):
    task: str = "customer-policy"
    """Task card: the name of a built-in one, or a YAML file. It holds the prompts and the label."""
    generator: str | None = None
    """Model that writes; None: `model.path`."""
    engine: Literal["vllm"] = "vllm"
    num_actors: int = Field(default=1, ge=1)
    """vLLM engines."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one engine."""
    gpu_memory_fraction: float = Field(default=0.6, gt=0, le=1)
    """Share of a GPU's memory that an engine takes; the rest is for the extractor that verifies."""
    num_spans: int = Field(default=3, ge=1)
    """Exemplar spans in a prompt."""
    first_candidates: int = Field(default=4, ge=2)
    """n: candidates of step 1 for each feature and attempt (the paper does not state it)."""
    second_candidates: int = Field(default=8, ge=1)
    """m: candidates of step 2 for each feature and attempt (the paper does not state it)."""
    samples_per_feature: int = Field(default=1, ge=1)
    """Accepted samples at which a feature is done."""
    max_attempts: int = Field(default=4, ge=1)
    """Attempts after which a feature without enough accepted samples is given up."""
    temperature: float = Field(default=0.8, ge=0)
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_new_tokens: int = Field(default=64, ge=1)
    max_features: int | None = Field(default=None, ge=1)
    """Only the best-ranked missing features; None: all."""
    allow_harmful: bool = False
    """Must be true for a task card that says its texts are harmful."""


class TrainingConfig(Section):
    task: Literal["classification"] = "classification"
    model: str | None = None
    """Model that is fine-tuned; None: `model.path`."""
    arms: tuple[Literal["seed", "untargeted", "targeted", "anchor"], ...] = ("seed", "untargeted", "targeted", "anchor")
    """Training sets that are compared, all of the same size and label balance."""
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Samples of one optimizer step, over all workers; a multiple of `num_workers`."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Peak; right for millions of parameters, use about 1e-5 for billions."""
    warmup_fraction: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises; then it falls to 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    max_tokens: int = Field(default=256, ge=8)
    num_workers: int = Field(default=1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU and on a CPU with instructions for it, else float32. Optimizer states are float32."""


class SaeTrainingConfig(Section):
    """How `fac-ray sae train` makes the SAE at `sae.path`, from the texts of all corpora. Tokens are those of message
    contents and are counted with repetition: texts are read again until there are enough."""

    architecture: Literal["topk", "batch-topk", "jumprelu", "standard", "gated"] = "topk"
    """Of SAELens. `batch-topk` is saved as a JumpReLU SAE, which is what it is at use."""
    d_sae: int = Field(default=1024, ge=1)
    """Number of features."""
    k: int | None = Field(default=None, ge=1)
    """Features that are active at each token; of batch-topk on average, of jumprelu as an aim. None: 16."""
    l1_coefficient: float | None = Field(default=None, gt=0)
    """Weight of the sparsity loss of standard and gated, which have no k. None: 1."""
    num_tokens: int = Field(default=2_000_000, ge=1)
    """Tokens to train on."""
    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens of one optimizer step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak: reached after a twentieth of the steps, and in the last quarter of them it falls to 0."""
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    """Memory of squared gradients. 0.99 follows within a hundred steps; trainings of many thousands can take 0.999."""
    decoder_init_norm: float = Field(default=1.0, gt=0)
    """Length of the decoder's rows at the start. Rows of 0.1, SAELens' default, turn by a third at each early step, and
    features die."""
    dead_steps: int = Field(default=100, ge=1)
    """A feature that was not active for so many steps is dead, and topk and batch-topk try to revive it."""
    buffer_tokens: int = Field(default=1 << 17, ge=1)
    """Tokens among which a batch is drawn. Memory, and size of a checkpoint: this times d_model times 4 bytes."""
    checkpoint_tokens: int = Field(default=500_000, ge=1)
    """Tokens between checkpoints, which is what an interruption can cost."""
    num_actors: int | None = Field(default=None, ge=1)
    """Backbones that make activations; None: one for each GPU that the trainer leaves, or for every two cores."""
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> SaeTrainingConfig:
        has_k = self.architecture not in ("standard", "gated")
        if not has_k and self.k is not None:
            raise ValueError(f"architecture {self.architecture} has no `k`; its sparsity is set by `l1_coefficient`")
        if has_k and self.l1_coefficient is not None:
            raise ValueError(f"architecture {self.architecture} has no `l1_coefficient`; its sparsity is set by `k`")
        if has_k and self.sparsity["k"] > self.d_sae:
            raise ValueError(f"`k` {self.sparsity['k']:g} is more than the {self.d_sae} features of `d_sae`")
        if not self.batch_tokens <= min(self.buffer_tokens, self.num_tokens):
            raise ValueError(f"`batch_tokens` {self.batch_tokens} is more than `buffer_tokens` or `num_tokens`")
        return self

    @property
    def sparsity(self) -> dict[str, float]:
        """What sets the architecture's sparsity, by its key, with the default filled in."""
        if self.architecture in ("standard", "gated"):
            return {"l1_coefficient": 1.0 if self.l1_coefficient is None else self.l1_coefficient}
        return {"k": 16 if self.k is None else self.k}

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.num_tokens // self.batch_tokens


class EvaluationConfig(Section):
    heldout: str = "heldout"
    """Corpus on which the arms are scored; training never sees it."""
    truth: str | None = None
    """JSON file with the true concepts of each anchor sample, where they are known. Read by the report alone."""


class SelectionConfig(Section):
    """What `fac-ray select` takes out of a corpus: the samples that together cover most."""

    num_samples: int | None = Field(default=None, ge=1)
    """k: take at most so many samples."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """Take samples of at most so many pooled tokens together."""
    weights: Literal["relevant", "effect", "all"] = "relevant"
    """What a covered feature counts: 1 if relevant, its log2 odds ratio if relevant, or 1 whatever it is."""
    base: str | None = None
    """Corpus whose features count as covered before the first sample is taken, such as `seed`; None: nothing is."""
    num_partitions: int | None = Field(default=None, ge=1)
    """Parts that are searched on their own before what they found is searched together. 1: one search over all samples;
    None: 1 as long as their features fit into memory."""


class CheckConfig(Section):
    """The rules of `fac-ray check`; the seed passes if it keeps each one that is given."""

    min_fac: float | None = Field(default=None, ge=0, le=1)
    """Smallest FAC of the seed."""
    baseline: str | None = None
    """Folder of a finished run whose seed the seed is compared with."""
    max_drop: float = Field(default=0.01, ge=0, le=1)
    """Largest FAC that may be lost against the baseline, both at the number of samples of the smaller seed."""


class RunSection(Section):
    folder: str | None = None
    """Where everything is written; None: `runs/<name>`."""
    seed: int = 0
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of unusable rows in a corpus above which the run fails."""


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    model: ModelConfig
    sae: SaeConfig
    corpora: dict[str, CorpusConfig]
    measure: MeasureConfig = MeasureConfig()
    relevance: RelevanceConfig = RelevanceConfig()
    diversity: DiversityConfig | None = DiversityConfig()
    """None: no diversity measures beside FAC."""
    synthesis: SynthesisConfig | None = SynthesisConfig()
    """None: the run stops at the gaps."""
    training: TrainingConfig | None = TrainingConfig()
    """None: nothing is trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    sae_training: SaeTrainingConfig = SaeTrainingConfig()
    """Read by `fac-ray sae train` alone; no other stage depends on it."""
    selection: SelectionConfig = SelectionConfig()
    check: CheckConfig = CheckConfig()
    run: RunSection = RunSection()

    @field_validator("corpora")
    @classmethod
    def _corpus_names(cls, corpora: dict[str, CorpusConfig]) -> dict[str, CorpusConfig]:
        if not corpora:
            raise ValueError("at least one corpus is needed")
        for name in corpora:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"corpus name {name!r}: use letters, digits, '_' and '-'")
        return corpora

    @property
    def folder(self) -> Path:
        return Path(self.run.folder or f"runs/{self.name}")


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """The config of a YAML file with `section.key=value` overrides (values are YAML) laid over it.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is out of bounds.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return config_from_tree(tree, overrides, source=str(path))


def config_from_tree(tree: dict[str, Any], overrides: tuple[str, ...] = (), source: str = "config") -> RunConfig:
    """A checked `RunConfig` from nested dictionaries and overrides.

    Raises:
        ConfigError: one line per problem, each with its key.
    """
    tree = json.loads(json.dumps(tree))
    for override in overrides:
        _lay_over(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (given: {e['input']!r:.80})" for e in error.errors()
        ]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from error
