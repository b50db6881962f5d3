"""The sections of a configuration: every key with its default, its range and what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from backbone.stand_ins.settings import DistillSettings, Form, Where
from controller.base import CONTROLLERS
from controller.certificate.risks import Risk
from controller.feature_sets import check_sets
from oracle.decoding import Decoding, checked_options
from oracle.menus import MENUS
from oracle.prompts import COLUMNS, SPLITS, Split

AdaptMethod = Literal["none", "bridges", "adapter", "both", "best"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Text = Annotated[str, Field(min_length=1)]
"""Not empty."""
Share = Annotated[float, Field(gt=0, lt=1)]


class ModelSection(Section):
    source: Text
    """Hub id, folder, .gguf file, or package:NAME."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"


class DataSection(Section):
    path: Text = "embedded"
    """`embedded`, a .jsonl, .csv or .json file, or a name or folder that `datasets` loads."""
    limit: int | None = Field(None, ge=8)
    columns: dict[str, Text] = {}
    """For a table or data set: our field -> its column."""
    split: Text = "train"
    """For a data set: which of its splits to read."""
    judge: Text | None = None
    """For prompts that name no judge."""
    force_judge: Text | None = None
    """For all prompts, whatever judge they name; `kl` and `agreement` hold answers against the full model's own."""
    chat_template: Text = "auto"
    """What puts prompts into the form of a conversation: `auto`, the tokenizer's own template where it has one;
    `never`; or a file with a Jinja template. Prompts marked `raw` are given as they are."""
    shares: dict[Split, float] = {"adapt": 0.15, "train": 0.3, "tune": 0.1, "calibrate": 0.25, "test": 0.2}
    """Splits of the prompts. Menus and stand-ins are made from `adapt` alone, whose prompts need no labels."""

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
    max_new_tokens: int = Field(32, ge=1)
    stop: list[Text] = []
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
    method: Annotated[Text, AfterValidator(MENUS.checked)] = "greedy_layers"
    probe_depth: int = Field(4, ge=1)
    given: list[str] = []
    """Plans in their text form, such as 0-12,16, for the method `given`; the full plan is added."""
    plans: int = Field(8, ge=2)
    """K, the full plan included."""
    cheapest_budget: float = Field(0.5, gt=0, lt=1)
    prompts: int = Field(32, ge=1)
    """Prompts of the split `adapt` that a search looks at."""

    @model_validator(mode="after")
    def _check_method(self) -> MenuSection:
        if (self.method == "given") != bool(self.given):
            raise ValueError(f"the method 'given' and a list of plans in menu.given go together, got {self.method!r}")
        return self


class AdaptSection(Section):
    method: AdaptMethod = "bridges"
    """What makes the menu's plans better: closed-form bridges over their gaps, a trained adapter, both, or nothing;
    `best` makes all of them and keeps what does best for the time it takes, on a fifth of the prompts held out."""
    prompts: int = Field(400, ge=8)
    """Prompts of the split `adapt`, with the full model's answers, to fit and train on."""
    form: Form = "full"
    rank: int = Field(64, ge=1)
    """Of bridges that are `low_rank`."""
    in_order: bool = False
    """Fit a plan's later gaps on the states that it produces with its bridges so far."""
    where: Where = "all"
    """Weights that the adapter changes; `nowhere` trains the bridges alone."""
    lora_rank: int = Field(16, ge=1)
    epochs: float = Field(2.0, gt=0)
    batch_tokens: int = Field(1024, ge=16)
    plans_per_step: int = Field(3, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    references: bool = False
    """Train towards the references too, where prompts have one; otherwise towards the full model alone."""

    @model_validator(mode="after")
    def _check_trained(self) -> AdaptSection:
        if self.method == "adapter" and self.where == "nowhere":
            raise ValueError("an adapter that sits 'nowhere' changes nothing; with the method 'both' it trains bridges")
        return self

    def settings(self) -> DistillSettings:
        return DistillSettings(
            where=self.where,
            rank=self.lora_rank,
            epochs=self.epochs,
            batch_tokens=self.batch_tokens,
            plans_per_step=self.plans_per_step,
            learning_rate=self.learning_rate,
        )


class LabelSection(Section):
    batch_size: int = Field(32, ge=1)
    limit: int | None = Field(None, ge=8)
    """Label this many of the prompts that are not in the split `adapt`, chosen by a hash of the id."""
    shortcut: bool = True
    """Follow the full model's answer with every plan and generate only what differs, instead of everything."""
    tolerance: float = Field(0.0, ge=0, lt=1)
    """A plan is sufficient if its score is at least the full plan's less this. With the judge `kl`, under which a
    shortened plan hardly ever scores the full plan's 1, it has to be above 0."""


class FeaturesSection(Section):
    batch_size: int = Field(32, ge=1)
    sets: list[str] = ["length", "tokens", "embedding", "states", "windows", "path"]
    """Sets of features to read from the probe layers; `lens` is dearer, since it runs the output head."""

    @model_validator(mode="after")
    def _check_sets(self) -> FeaturesSection:
        check_sets(self.sets)
        if missing := {"length", "embedding"} - set(self.sets):
            raise ValueError(f"sets must hold {min(missing)!r}, which the report's controls need, got {self.sets}")
        return self


class GivenSettings(Section):
    """What is to be known to fit one controller; see `controller.learning.Settings`."""

    sets: list[str] = Field(min_length=1)
    components: int = Field(ge=1)
    parameters: dict[str, Any] = {}


class TuningSection(Section):
    controllers: list[Annotated[Text, AfterValidator(CONTROLLERS.checked)]] = Field(["lightgbm", "mlp"], min_length=1)
    trials: int = Field(20, ge=1)
    """Finished trials of each controller, for the least regret; the first one tries the defaults, and those that fall
    behind after some folds are given up."""
    feature_sets: list[list[str]] = Field(
        [["length", "path", "states"], ["length", "tokens", "path", "states"], ["length", "path", "states", "windows"]],
        min_length=1,
    )
    """Combinations of sets of features to choose from."""
    components: list[Annotated[int, Field(ge=1)]] = Field([12, 24, 48, 96], min_length=1)
    """Numbers of principal components of the wide sets to choose from."""
    folds: int = Field(4, ge=2, le=50)
    """A trial is judged on the prompts to train and to tune, each predicted by a controller that did not see it."""
    workers: int = Field(1, ge=1)
    """Processes that try settings at the same time."""
    given: dict[str, GivenSettings] = {}
    """Settings of controllers for which nothing is searched, as in a run's tuning.json."""
    storage: Text | None = None
    """Any URL that Optuna takes; default: tuning.db in the run folder."""

    @model_validator(mode="after")
    def _check_names(self) -> TuningSection:
        for sets in [*self.feature_sets, *(given.sets for given in self.given.values())]:
            check_sets(sets)
        if not all(self.feature_sets):
            raise ValueError(f"feature_sets must not hold an empty set, got {self.feature_sets}")
        if len(set(self.controllers)) < len(self.controllers):
            raise ValueError(f"controllers names one twice, got {self.controllers}")
        if unknown := set(self.given) - set(self.controllers):
            raise ValueError(f"given holds settings of {min(unknown)!r}, which is not among tuning.controllers")
        return self


class CalibrationSection(Section):
    risk: Risk = "mean_score"
    """What is bounded: how far the mean score falls below the full model's, `mean_score`, where answers that win make
    up for answers that lose; the mean of the score that answers lose, `score_lost`; or the share of answers that are no
    longer sufficient (`label.tolerance`), `insufficient`."""
    alpha: float = Field(0.1, gt=0, lt=1)
    """The bound; for `mean_score` in shares of the full model's mean score."""
    delta: float = Field(0.1, gt=0, lt=1)
    """Probability that the bound fails."""
    per_task: bool = False
    """Bound the loss of every task instead of their mean."""
    outliers: float = Field(0.05, ge=0, lt=1)
    """Share of prompts like the calibration prompts that a test may take for unlike all known ones and send to the full
    plan, before calibration; 0 for no such test."""
    false_alarms: float = Field(0.01, gt=0, lt=1)
    """Probability that the drift alarm ever rings although the prompts are like the calibration prompts."""


class EvaluationSection(Section):
    alphas: list[Share] = Field([0.01, 0.02, 0.05, 0.1], min_length=1)
    """Mean losses, in the unit of `calibration.alpha`, at which the controllers and the controls are compared."""
    control_trials: int = Field(8, ge=1)
    """Trials of each control's own search: the defaults, the best controller's settings, and others."""
    own_judges: int = Field(0, ge=0)
    """With `data.force_judge`: also judge so many of the test prompts as they say themselves, to see what the
    loss means there."""
    template: str | None = None
    """Another template, with {prompt} in it, into which some test prompts are put to see whether a controller still
    works; their labels are made in addition."""
    template_prompts: int = Field(64, ge=8)
    frozen: bool = True
    """Also label the test prompts under the plans without stand-ins, to show what these are worth."""
    speed_prompts: int = Field(8, ge=1)
    """Test prompts that speeds are measured on, as one batch and one at a time."""
    speed_tokens: int = Field(16, ge=2)
    """New tokens of each."""
    speed_rounds: int = Field(20, ge=1)
    """Times, at most, that everything is measured, in turn, after a warm-up; fewer once the figures are exact."""
    speed_seconds: float = Field(60.0, gt=0)
    """No round begins after this time, as long as there are five."""

    @model_validator(mode="after")
    def _check_template(self) -> EvaluationSection:
        if self.template is None:
            return self
        try:
            told_apart = self.template.format(prompt="a") != self.template.format(prompt="b")
        except (ValueError, KeyError, IndexError, AttributeError):
            told_apart = False
        if not told_apart:
            raise ValueError(f"template should hold {{prompt}}, and other braces twice, got {self.template!r}")
        return self


class TokenExitsSection(Section):
    """Token exits beside the allocator; see docs/token-exits.md."""

    enabled: bool = False
    """Compare them in the stage `evaluate`."""
    gates: list[Literal["top", "margin", "entropy", "patience", "saturation", "classifier"]] = Field(
        ["top", "margin", "entropy", "patience", "saturation", "classifier"], min_length=1
    )
    depths: list[Annotated[int, Field(ge=1)]] = []
    """The layers before which tokens may leave, ascending; none for six, evenly over the last two thirds."""
    strategy: Literal["propagate", "share", "recompute"] = "propagate"
    """Keys and values of layers left out."""
    decay: float | None = Field(None, ge=0)
    """Rate at which the threshold comes down along the answer."""
    shortlist: int = Field(2048, ge=2)
    """Tokens of the vocabulary that gates look at."""
    training_steps: int = Field(0, ge=0)
    """For which bridges are trained towards the full model's distribution."""
    agreements: list[Share] = Field([0.99, 0.97, 0.94, 0.9, 0.8], min_length=1)
    """Shares of held-out tokens to keep, safest first: the thresholds that a certificate tests."""
    tokens: int = Field(600, ge=16)
    """Held-out tokens that thresholds are set on."""
    prompts: int = Field(60, ge=2)
    """Prompts, at most, of the splits `calibrate` and `test` each."""
    batch_size: int = Field(32, ge=1)
    batches: list[Annotated[int, Field(ge=1)]] = Field([1, 8, 32], min_length=1)
    """Sizes of the batches that are timed."""

    @model_validator(mode="after")
    def _check_order(self) -> TokenExitsSection:
        if sorted(self.agreements, reverse=True) != self.agreements:
            raise ValueError(f"agreements must descend, safest first, got {self.agreements}")
        if sorted({*self.depths}) != self.depths:
            raise ValueError(f"depths must ascend, got {self.depths}")
        return self


class TrackingSection(Section):
    uri: Text = "sqlite:///mlruns/mlflow.db"
    """Any URI that MLflow takes."""
    experiment: Text = "layerbudget"


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
