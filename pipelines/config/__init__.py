"""The configuration of a run: `--set key=value` over one YAML file over the defaults. Unknown keys are errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from backbone.errors import InputError
from oracle.lm_eval_tasks import decoding_of, is_task, tasks_of
from oracle.menus import LOOK_AT_NO_PROMPTS
from pipelines.config.learning_sections import CalibrationSection, EvaluationSection, TuningSection
from pipelines.config.parsing import NotYAMLError, hint_of, parse_yaml, renamed
from pipelines.config.sections import (
    AdaptSection,
    DataSection,
    DecodingSection,
    FeaturesSection,
    LabelSection,
    MenuSection,
    ModelSection,
    RaySection,
    Section,
    Text,
    TrackingSection,
)

LONGEST_NAME = 200
"""Characters of a run's name: file systems take 255, and names of files and studies are made from it."""


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the key, its value and what would be right."""


class Config(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$", max_length=LONGEST_NAME)
    """The run's name; its folder is `runs/<name>`."""
    runs: Path = Path("runs")
    """Folder that holds all runs."""
    model: ModelSection
    data: DataSection = DataSection()
    decoding: DecodingSection = DecodingSection()
    menu: MenuSection = MenuSection()
    adapt: AdaptSection = AdaptSection()
    label: LabelSection = LabelSection()
    features: FeaturesSection = FeaturesSection()
    tuning: TuningSection = TuningSection()
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
    ray: RaySection = RaySection()
    try_prompts: Annotated[list[Text], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)] = (
        Field([])
    )
    """Prompts, or a single one, that `run` answers with the finished allocator."""
    file: str = Field("", exclude=True)
    """Path of the YAML file this came from."""

    @model_validator(mode="after")
    def _check_features(self) -> Config:
        wanted = {"feature_sets": self.tuning.feature_sets}
        wanted |= {f"given.{name}.sets": [given.sets] for name, given in self.tuning.given.items()}
        for key, sets in wanted.items():
            if missing := {name for some in sets for name in some} - set(self.features.sets):
                raise ValueError(
                    f"tuning.{key} names {min(missing)!r}, which features.sets does not hold: {self.features.sets}"
                )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Config:
        healed = [text for text in self.menu.given if text.endswith("h")]
        if healed and self.adapt.method not in ("heads", "given"):
            raise ValueError(
                f"menu.given names {healed[0]}, the full depth with an exit head, and "
                f"adapt.method={self.adapt.method} fits none; take 'heads'"
            )
        if self.menu.method == "heads" and self.adapt.method != "heads":
            raise ValueError(
                f"menu.method=heads chooses exits by the heads that adapt.method=heads fits, got {self.adapt.method!r}"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    @property
    def makes_from_prompts(self) -> bool:
        """Whether the menu or the healing parts are made from the prompts of the split `adapt`."""
        return self.adapt.method not in ("none", "given") or self.menu.method not in LOOK_AT_NO_PROMPTS

    def dump(self) -> str:
        """YAML with every key, from which the same run can be made."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def load_config(path: Path, settings: Sequence[str] = ()) -> Config:
    """Read a YAML file and put `key=value` settings over it (values are read as YAML).

    In the file that a run keeps in its folder, a key that has been renamed since may have its old name.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (a near one is named, if any), or a value out of range.
    """
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    try:
        data = parse_yaml(path.read_bytes())
    except NotYAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} should hold keys and values, got {type(data).__name__}")
    if path.with_name("run.json").is_file():
        data = renamed(data)
    return checked_config({**data, "file": str(path.resolve())}, settings)


def checked_config(data: dict[str, Any], settings: Sequence[str] = ()) -> Config:
    """The configuration of these keys and values, with settings over it as `load_config` takes them.

    Raises:
        ConfigError: see `load_config`.
        PromptError: a task of lm-evaluation-harness that cannot be read.
    """
    for setting in settings:
        _put(data, setting)
    try:
        return _as_the_task_decodes(Config.model_validate(data))
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None


def _as_the_task_decodes(config: Config) -> Config:
    """Takes from a task of lm-evaluation-harness what the section `decoding` leaves open."""
    given = {name: getattr(config.decoding, name) for name in config.decoding.model_fields_set}
    if not is_task(config.data.path) or {"max_new_tokens", "stop"} <= given.keys():
        return config
    decoding = DecodingSection.model_validate({**decoding_of(tasks_of(config.data.path)), **given})
    return config.model_copy(update={"decoding": decoding})


def _put(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, got {setting!r}")
    *sections, last = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {setting}: {section!r} has no keys of its own")
    try:
        data[last] = parse_yaml(text)
    except NotYAMLError as error:
        raise ConfigError(f"--set {setting}: cannot read the value {text!r}: {error}") from None


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])  # of one misspelt
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {hint_of(key, _all_keys(Config), problem['input'])}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing; it has no default"
    if problem["type"] == "model_type":
        hint = hint_of(f"{key}.", _all_keys(Config))
        return f"{key} should hold keys of its own, got {_short(problem['input'])}; {hint}"
    reason = f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    return reason if problem["type"] == "value_error" else f"{reason}, got {_short(problem['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys
