"""The sections of a configuration: every key with its default, its range and what it means."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from backbone.healing.settings import DistillSettings, Form, Where
from controller.base import check_sets
from oracle.decoding import Decoding, checked_options
from oracle.intake import COLUMNS
from oracle.menus import LOSSES, MENUS
from oracle.prompts import SPLITS, Split

AdaptMethod = Literal["none", "heads", "bridges", "adapter", "both", "best", "auto", "given"]
Targets = Literal["auto", "own", "references"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Text = Annotated[str, Field(min_length=1)]
"""Not empty."""
Share = Annotated[float, Field(gt=0, lt=1)]


class ModelSection(Section):
    source: Text
    """Hub id, folder, .gguf file, or package:NAME."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format; `auto` is bfloat16 if the device computes in it, else float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N` or `mps`; `auto` is a CUDA GPU if there is one, else the CPU."""


class DataSection(Section):
    path: Text = "embedded"
    """`embedded` for the project's own prompts; a file (.jsonl, .ndjson, .json, .csv, .tsv; or .gz after that);
    `lm_eval:TASK`; or a name or folder that `datasets` loads."""
    limit: int | None = Field(None, ge=8)
    """Use this many of the prompts, chosen by a hash of the id; a larger limit only adds prompts."""
    columns: dict[str, Text] = {}
    """Maps layerbudget's fields to the source's columns; other fields keep their names."""
    split: Text = "train"
    """For a data set or a task: which of its splits to read."""
    judge: Text | None = None
    """Judge of prompts that name none (docs/oracle.md)."""
    force_judge: Text | None = None
    """Judge of all prompts, also of those that name another; `kl` and `agreement` compare answers with the full
    model's."""
    chat_template: Text = "auto"
    """Template of the prompts: `auto`, the tokenizer's own if there is one; `never`; or a file with a Jinja template.
    Prompts marked `raw` get none."""
    shares: dict[Split, float] = {"adapt": 0.15, "train": 0.2, "tune": 0.05, "calibrate": 0.4, "test": 0.2}
    """Shares of the splits. Menu and healing are made from `adapt` alone, whose prompts need no labels. A prompt of
    `calibrate` needs about half as many labels as one of `train` (docs/log.md compares shares)."""
    seed: int = Field(0, ge=0)
    """Another seed gives other splits of the same sizes."""

    @model_validator(mode="after")
    def _check_columns(self) -> DataSection:
        if unknown := set(self.columns) - set(COLUMNS):
            raise ValueError(
                f"columns names the field {min(unknown)!r}; the fields of a prompt are {', '.join(COLUMNS)}"
            )
        return self

    @model_validator(mode="after")
    def _check_shares(self) -> DataSection:
        is_sound = all(0 <= share <= 1 for share in self.shares.values())
        if set(self.shares) != set(SPLITS) or not is_sound or abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares must name {', '.join(SPLITS)} and sum to 1, got {self.shares}")
        return self


class DecodingSection(Section):
    """How answers end; with `lm_eval:TASK` the task gives the defaults."""

    max_new_tokens: int = Field(32, ge=1)
    """Maximum number of tokens in an answer."""
    stop: list[Text] = []
    """Stop strings; an answer ends before the first of them."""
    options: dict[str, Any] = {}
    """Further arguments of `generate()` that change greedy answers, such as `repetition_penalty`; they override the
    model's generation config."""

    @model_validator(mode="after")
    def _check_options(self) -> DecodingSection:
        checked_options(self.options)
        return self

    def settings(self) -> Decoding:
        return Decoding(self.max_new_tokens, tuple(self.stop), options=self.options)


class MenuSection(Section):
    method: Annotated[Text, AfterValidator(MENUS.checked)] = "covering"
    """How plans are chosen (docs/oracle.md): `given`, `exits`, `heads`, `gaps`, `evenly`, `greedy`, `covering`, or your
    own method."""
    probe_depth: int = Field(4, ge=1)
    """Number of first layers that every plan runs and whose states the controller reads."""
    given: list[str] = []
    """Plans as text, such as 0-12,16, for the method `given`; the full plan is added."""
    plans: int = Field(8, ge=2)
    """Number of plans, the full one included; `heads` adds the full depth with its head."""
    cheapest_budget: float = Field(0.5, gt=0, lt=1)
    """Least share of the decoder that the cheapest plan runs."""
    prompts: int = Field(32, ge=1)
    """Prompts of the split `adapt` that a search uses, at most half of the split; `covering` fits bridges on the
    others."""
    losses: list[Annotated[float, Field(ge=0, lt=1)]] = Field(list(LOSSES), min_length=1)
    """Shares of the full model's mean score that the oracle may lose when `covering` picks a menu, all with equal
    weight. Plans are scored with bridges, before any training (docs/oracle.md)."""

    @model_validator(mode="after")
    def _check_method(self) -> MenuSection:
        if (self.method == "given") != bool(self.given):
            raise ValueError(f"the method 'given' and a list of plans in menu.given go together, got {self.method!r}")
        return self


class AdaptSection(Section):
    method: AdaptMethod = "bridges"
    """How the menu's plans are healed (docs/healing.md): `none`; exit `heads`, for early exits and short answers;
    `bridges`, in closed form; a trained `adapter`; or `both` of these two. `auto` makes heads if every plan is an early
    exit and the full model's answers have a few tokens, and otherwise compares bridges and an adapter. `best` compares
    none, bridges, an adapter and both. Comparisons weigh quality and time on a held-out fifth of the prompts. `given`
    takes the file `adapt.given`."""
    given: Text | None = None
    """Healing parts of another run with this model and menu, for example from a GPU: its `healing.safetensors`. Keep
    that run's prompts and `data.shares`, so that the prompts they were fitted on lie in the split `adapt`."""
    prompts: int | None = Field(None, ge=8)
    """Prompts of the split `adapt` to fit and train on. Default: all for heads, which gain from every prompt, and 400
    for other methods."""
    form: Form = "full"
    """Rank of the bridges, `full` or `low_rank`."""
    rank: int = Field(64, ge=1)
    """Rank of `low_rank` bridges."""
    in_order: bool = False
    """Fit a plan's later gaps on the states that it produces with its earlier bridges."""
    targets: Targets = "auto"
    """What exit heads are fitted on, at the positions that predict the answer: the full model's `own` distribution, or
    the `references` too. `auto` fits both at three depths if judges use references, and takes for all depths the one
    that predicts more of them on a held-out eighth of the prompts."""
    where: Where = "all"
    """Weights that the adapter changes: in all layers after the probe, or in those beside a gap; `nowhere` trains the
    bridges alone."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapter."""
    epochs: float = Field(2.0, gt=0)
    """Passes of the adapter's training over the prompts."""
    minutes: float | None = Field(None, gt=0)
    """Training time on this machine, instead of `epochs`, for the methods `adapter` and `both`, and for each of them
    with `best`."""
    batch_tokens: int = Field(1024, ge=16)
    """Tokens of a training step, padding included."""
    plans_per_step: int = Field(3, ge=1)
    """Plans that a training step runs each prompt under."""
    learning_rate: float = Field(3e-4, gt=0)
    """Learning rate of the adapter."""
    evaluate_every: int = Field(25, ge=1)
    """Steps between evaluations on held-out prompts, each with a checkpoint; a hundred suit a GPU better, whose steps
    are short."""
    references: bool = False
    """Train the adapter on references too, where prompts have one, not on the full model's distribution alone."""

    @model_validator(mode="after")
    def _check_trained(self) -> AdaptSection:
        if (self.method == "given") != (self.given is not None):
            raise ValueError(
                f"the method 'given' and a file of healing parts in adapt.given go together, got {self.method!r} and "
                f"{self.given!r}"
            )
        if self.method in ("adapter", "best", "auto") and self.where == "nowhere":
            raise ValueError(
                f"where is 'nowhere', and the method {self.method!r} trains an adapter, which would change nothing; "
                "take the method 'both', which then trains the bridges alone"
            )
        return self

    def most_prompts(self, method: AdaptMethod) -> int:
        """How many prompts a method fits and trains on, at most."""
        return self.prompts or (sys.maxsize if method == "heads" else 400)

    def settings(self) -> DistillSettings:
        return DistillSettings(
            where=self.where,
            rank=self.lora_rank,
            epochs=self.epochs,
            minutes=self.minutes,
            batch_tokens=self.batch_tokens,
            plans_per_step=self.plans_per_step,
            learning_rate=self.learning_rate,
            evaluate_every=self.evaluate_every,
        )


class LabelSection(Section):
    batch_size: int = Field(32, ge=1)
    """Prompts that are answered together."""
    limit: int | None = Field(None, ge=8)
    """Label only this many of the prompts outside the split `adapt`, chosen by a hash of the id."""
    verify: bool = True
    """End each answer where its score is decided, and verify early exits along the full model's answer where that is
    cheaper; `false` generates every answer to its end."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """A plan is sufficient if its score is at most this much below the full plan's. It must be above 0 with the judge
    `kl`, under which a shortened plan hardly ever scores 1."""


class FeaturesSection(Section):
    batch_size: int = Field(32, ge=1)
    """Prompts that are read together."""
    sets: list[str] = ["length", "tokens", "embedding", "states", "windows", "path"]
    """Feature sets of the probe layers (docs/controllers.md); `lens` costs more, since it runs the output head."""

    @model_validator(mode="after")
    def _check_sets(self) -> FeaturesSection:
        check_sets(self.sets)
        if "embedding" not in self.sets:
            raise ValueError(f"sets must hold 'embedding', which the report's controls need, got {self.sets}")
        return self


class TrackingSection(Section):
    uri: Text = "sqlite:///mlruns/mlflow.db"
    """MLflow's tracking URI."""
    experiment: Text = "layerbudget"
    """MLflow's experiment of the run."""


class RaySection(Section):
    """Workers of a Ray cluster, with `--ray`. They change how fast results come, not the results."""

    min_workers: int = Field(1, ge=1)
    """Fewest workers; Ray Data releases idle ones down to this number."""
    max_workers: int | None = Field(None, ge=1)
    """Default: as many as the cluster has room for when it is joined."""
    cpus: float = Field(1.0, gt=0)
    """Cores of a worker, and its threads."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of a worker. Default: one if the cluster has any, else none."""

    @model_validator(mode="after")
    def _check_workers(self) -> RaySection:
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ValueError(f"max_workers must be at least min_workers, {self.min_workers}, got {self.max_workers}")
        return self
