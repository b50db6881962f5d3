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
    """What the model computes in; `auto` for bfloat16 where the device computes in it, else float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N` or `mps`; `auto` for a CUDA GPU where there is one, else the CPU."""


class DataSection(Section):
    path: Text = "embedded"
    """`embedded`, a file (.jsonl, .ndjson, .json, .csv, .tsv; or .gz after that), `lm_eval:TASK`, or a name or folder
    that `datasets` loads."""
    limit: int | None = Field(None, ge=8)
    """Use this many of the prompts, chosen by a hash of the id; a larger limit only adds prompts."""
    columns: dict[str, Text] = {}
    """Our field -> the source's column; fields not named keep their own names."""
    split: Text = "train"
    """For a data set or a task: which of its splits to read."""
    judge: Text | None = None
    """For prompts that name no judge."""
    force_judge: Text | None = None
    """For all prompts, whatever judge they name; `kl` and `agreement` hold answers against the full model's own."""
    chat_template: Text = "auto"
    """What puts prompts into the form of a conversation: `auto`, the tokenizer's own template where it has one;
    `never`; or a file with a Jinja template. Prompts marked `raw` are given as they are."""
    shares: dict[Split, float] = {"adapt": 0.15, "train": 0.2, "tune": 0.05, "calibrate": 0.4, "test": 0.2}
    """Splits of the prompts. Menus and healing are made from `adapt` alone, whose prompts need no labels. Those to
    calibrate take about half of the labels of those to train (docs/log.md has what other shares give)."""
    seed: int = Field(0, ge=0)
    """Another one deals the prompts to other splits of the same sizes."""

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
    """How answers end; with `lm_eval:TASK` the task says what is not given here."""

    max_new_tokens: int = Field(32, ge=1)
    """Tokens of an answer, at most."""
    stop: list[Text] = []
    """Strings; an answer ends before the first of them."""
    options: dict[str, Any] = {}
    """Further arguments of `generate()` that change greedy answers, such as `repetition_penalty`, in place of what the
    model's own generation config says."""

    @model_validator(mode="after")
    def _check_options(self) -> DecodingSection:
        checked_options(self.options)
        return self

    def settings(self) -> Decoding:
        return Decoding(self.max_new_tokens, tuple(self.stop), options=self.options)


class MenuSection(Section):
    method: Annotated[Text, AfterValidator(MENUS.checked)] = "covering"
    """How plans are chosen: `given`, `exits`, `gaps`, `evenly`, `greedy`, `covering`, or one of your own."""
    probe_depth: int = Field(4, ge=1)
    """First layers that every plan runs, and whose states the controller reads."""
    given: list[str] = []
    """Plans in their text form, such as 0-12,16, for the method `given`; the full plan is added."""
    plans: int = Field(8, ge=2)
    """K, the full plan included."""
    cheapest_budget: float = Field(0.5, gt=0, lt=1)
    """Share of the decoder that the cheapest plan runs, at least."""
    prompts: int = Field(32, ge=1)
    """Prompts of the split `adapt` that a search looks at, half of them at most; `covering` fits bridges on others."""
    losses: list[Annotated[float, Field(ge=0, lt=1)]] = Field(list(LOSSES), min_length=1)
    """Shares of the full model's mean score that the oracle of a menu that `covering` picks may lose, each weighing the
    same. The search scores plans as their bridges alone make them, before any training; see docs/oracle.md."""

    @model_validator(mode="after")
    def _check_method(self) -> MenuSection:
        if (self.method == "given") != bool(self.given):
            raise ValueError(f"the method 'given' and a list of plans in menu.given go together, got {self.method!r}")
        return self


class AdaptSection(Section):
    method: AdaptMethod = "bridges"
    """What makes the menu's plans better: exit heads for a menu of early exits, where answers are short; closed-form
    bridges over their gaps, a trained adapter, both, or nothing;
    `auto` makes heads where every plan is an early exit and the full model's answers have a few tokens, and otherwise
    compares bridges and an adapter; `best` compares nothing, bridges, an adapter, and both. What is compared is kept by
    what it does for the time it takes, on a fifth of the prompts held out. `given` takes those of the file
    `adapt.given`."""
    given: Text | None = None
    """Healing parts that another run of this model and menu made, for example on a GPU: its `healing.safetensors`. What
    they were fitted and trained on should lie in the split `adapt`, so keep that run's prompts and `data.shares`."""
    prompts: int | None = Field(None, ge=8)
    """Prompts of the split `adapt`, with the full model's answers, to fit and train on. By default all for heads, which
    gain from every prompt, and 400 for the other methods."""
    form: Form = "full"
    """Of bridges: maps of full rank, or `low_rank`."""
    rank: int = Field(64, ge=1)
    """Of bridges that are `low_rank`."""
    in_order: bool = False
    """Fit a plan's later gaps on the states that it produces with its bridges so far."""
    targets: Targets = "auto"
    """What exit heads are fitted on, at the places that predict the answer: the full model's `own` distribution, or the
    `references` beside it. `auto` fits both at three depths where prompts are judged by references, and keeps for all
    depths what says more of them on an eighth of the prompts, held out."""
    where: Where = "all"
    """Weights that the adapter changes; `nowhere` trains the bridges alone."""
    lora_rank: int = Field(16, ge=1)
    """Of the adapter."""
    epochs: float = Field(2.0, gt=0)
    """Times that the adapter sees each prompt."""
    minutes: float | None = Field(None, gt=0)
    """Train for so long, instead of `epochs`, on this machine; the methods `adapter` and `both`, and each of them with
    `best`."""
    batch_tokens: int = Field(1024, ge=16)
    """Tokens of a training step, padding included."""
    plans_per_step: int = Field(3, ge=1)
    """Plans that a training step runs each prompt under."""
    learning_rate: float = Field(3e-4, gt=0)
    """Of the adapter's training."""
    evaluate_every: int = Field(25, ge=1)
    """Steps between looks at held-out prompts, at each of which a checkpoint is written; a GPU's steps are short beside
    a look, and a hundred suit it better."""
    references: bool = False
    """Train towards the references too, where prompts have one; otherwise towards the full model alone."""

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
    """Label this many of the prompts that are not in the split `adapt`, chosen by a hash of the id."""
    verify: bool = True
    """End each answer where its score is decided, and verify early exits along the full model's answer where that is
    cheaper; `false` generates every answer to its end."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """A plan is sufficient if its score is at least the full plan's less this. With the judge `kl`, under which a
    shortened plan hardly ever scores the full plan's 1, it has to be above 0."""


class FeaturesSection(Section):
    batch_size: int = Field(32, ge=1)
    """Prompts that are read together."""
    sets: list[str] = ["length", "tokens", "embedding", "states", "windows", "path"]
    """Sets of features to read from the probe layers; `lens` is dearer, since it runs the output head."""

    @model_validator(mode="after")
    def _check_sets(self) -> FeaturesSection:
        check_sets(self.sets)
        if "embedding" not in self.sets:
            raise ValueError(f"sets must hold 'embedding', which the report's controls need, got {self.sets}")
        return self


class TrackingSection(Section):
    uri: Text = "sqlite:///mlruns/mlflow.db"
    """Any URI that MLflow takes."""
    experiment: Text = "layerbudget"
    """MLflow's experiment that the run belongs to."""


class RaySection(Section):
    """Workers of a cluster, with `--ray`. Changes when results come, not what they are."""

    min_workers: int = Field(1, ge=1)
    """Ray Data lets workers go that have nothing to do, down to this number."""
    max_workers: int | None = Field(None, ge=1)
    """Default: as many as there is room for in the cluster when it is joined."""
    cpus: float = Field(1.0, gt=0)
    """Cores of a worker, and its threads."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of a worker. Default: one where the cluster has any, else none."""

    @model_validator(mode="after")
    def _check_workers(self) -> RaySection:
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ValueError(f"max_workers must be at least min_workers, {self.min_workers}, got {self.max_workers}")
        return self
