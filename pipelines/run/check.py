"""`layerbudget check`: what can be known to fail before anything is computed. Loads no model, and not torch either."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from backbone.errors import InputError, reason_of
from backbone.plan import LayerPlan
from controller.base import CONTROLLERS, WIDE
from controller.certificate.p_values import fewest_prompts
from oracle.judges import KL, JudgeError, score
from oracle.menus import MENUS, check_depths, checked_menu
from oracle.prompts import SPLITS, Prompt, Split
from oracle.splits import count_twins
from pipelines.config import Config, ConfigError
from pipelines.config.learning_sections import TuningSection
from pipelines.run.model_files import ModelFiles
from pipelines.run.prompts import LEAST_OF_A_SPLIT, labelled_of, prompts_of, splits_of
from pipelines.run.state import read_record
from pipelines.run.tracking import check_answers, check_store

if TYPE_CHECKING:
    from pipelines.run.model import Loaded

LABEL_BYTES = 2_000
"""Of one answer with its score in the database of labels, as the demo's are."""
OTHER_BYTES = 64 * 2**20
"""Of everything that does not grow with prompts, plans or the model: the databases of Optuna and MLflow, the report."""
TRIED = 8
"""Prompts on which a judge is tried until it scores one."""
COPIES = 3
"""Of the healing parts: the stage's file, the allocator's, and MLflow's."""


def check_run(config: Config, loaded: Loaded | None = None) -> list[str]:
    """What was looked at, in a line each.

    Args:
        config: of the run.
        loaded: its model and tokenizer, where they are loaded already.

    Raises:
        ConfigError: what would fail, all of it in one sentence.
    """
    checks, said, problems = _Checks(config, loaded), [], []
    for look in (
        checks.model,
        checks.methods,
        checks.stores,
        checks.prompts_of_run,
        checks.tokens,
        checks.splits,
        checks.certificate,
        checks.disk,
    ):
        try:
            said.append(look())
        except _UnknownError:
            continue  # another check has said why
        except InputError as error:
            if str(error) not in problems:  # several look at the splits
                problems.append(str(error))
    if problems:
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise ConfigError(count + "; ".join(problems))
    return said


def check_storage(url: str) -> None:
    """Raises ConfigError unless `tuning.storage` is the URL of a database whose driver is installed; opens nothing."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(url).get_dialect().import_dbapi()
    except (SQLAlchemyError, ImportError) as error:
        raise ConfigError(f"cannot use tuning.storage {url!r}: {reason_of(error)}") from error
    check_answers("tuning.storage", url)


def check_given_settings(tuning: TuningSection) -> None:
    """Raises ConfigError for settings in `tuning.given` that their controller does not take."""
    for name, given in tuning.given.items():
        try:
            CONTROLLERS[name](**given.parameters)
        except TypeError as error:
            raise ConfigError(f"tuning.given.{name}.parameters cannot be used: {error}") from None


def try_judge(judge: str, prompts: Sequence[Prompt]) -> None:
    """Scores a reference held against itself.

    Raises:
        JudgeError: a score outside of [0, 1].
        ConfigError: the judge fails on all prompts that are tried.
    """
    failure: BaseException | None = None
    for prompt in prompts[:TRIED]:
        try:
            score(judge, prompt.reference, prompt.reference, prompt.reference)
        except JudgeError:
            raise
        except (Exception, SystemExit) as error:  # somebody's own code, which may do anything
            failure = error
        else:
            return
    raise ConfigError(
        f"the judge {judge!r} fails on references held against themselves ({type(failure).__name__}: {failure}); "
        "mend it, or name another"
    )


class _UnknownError(Exception):
    """What a check needs to know has been found wrong by another one."""


class _Checks:
    """The checks of one configuration; each returns what it found, or raises InputError."""

    def __init__(self, config: Config, loaded: Loaded | None) -> None:
        self._config, self._loaded = config, loaded

    @cached_property
    def _model(self) -> ModelFiles:
        return ModelFiles(self._config.model.source, self._loaded)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        return prompts_of(self._config)

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        """Id and text of every prompt as the model is given it; raises _UnknownError where the template is unknown."""
        model, wanted = self._model, self._config.data.chat_template
        template = model.template(wanted)
        if wanted == "auto" and not model.has_tokenizer:
            raise _UnknownError
        asked = [Prompt(f"try_prompts {i}", "", text, "", "") for i, text in enumerate(self._config.try_prompts, 1)]
        return [(prompt.id, prompt.rendered(template).prompt) for prompt in [*self._prompts, *asked]]

    @cached_property
    def _of_split(self) -> dict[Split, list[Prompt]]:
        """The prompts that each split has, those that are labelled in the splits that need labels."""
        if "_prompts" not in self.__dict__:
            raise _UnknownError
        parts = splits_of(self._prompts, self._config)
        return {**labelled_of(parts, self._config), "adapt": parts["adapt"]}

    def model(self) -> str:
        source, menu, device = self._config.model.source, self._config.menu, self._config.model.device
        n_layers = self._model.n_layers
        if device not in ("auto", "cpu"):
            from backbone.loading import checked_device  # torch, which knows what this machine has

            checked_device(device)
        if n_layers is None:
            return f"model        {source}; its layers are known once it is loaded"
        self._model.check_vocabulary()
        check_depths(menu.method, n_layers, menu.probe_depth, menu.cheapest_budget)
        if menu.method == "given":
            plans = [LayerPlan.parse(plan, n_layers) for plan in menu.given]
            checked_menu("given", plans, [(1, 1)] * n_layers, menu.probe_depth)
        return f"model        {source}, {n_layers} layers"

    def methods(self) -> str:
        menu, tuning, given = self._config.menu, self._config.tuning, self._config.adapt.given
        MENUS.check_there(menu.method)
        if given is not None and not Path(given).is_file():
            raise ConfigError(f"adapt.given: there is no file {given}")
        for name in tuning.controllers:
            CONTROLLERS.check_there(name)
        check_given_settings(tuning)
        plans = len(menu.given) + 1 if menu.given else menu.plans
        return f"methods      menu {menu.method} (at most {plans} plans), controllers {', '.join(tuning.controllers)}"

    def stores(self) -> str:
        """Where trials and the finished run go. A database beside the run is made when it is needed."""
        trials, tracking = self._config.tuning.storage, self._config.tracking.uri
        if trials is not None:
            check_storage(trials)
        check_store(tracking)
        return f"stores       trials in {trials or 'the run folder'}, the finished run in {tracking}"

    def prompts_of_run(self) -> str:
        """Also tries every judge."""
        judges, kinds = ({getattr(prompt, name) for prompt in self._prompts} for name in ("judge", "task"))
        for judge in sorted(judges - {KL}):
            try_judge(judge, [prompt for prompt in self._prompts if prompt.judge == judge])
        twins = count_twins(self._prompts)
        said = f"prompts      {len(self._prompts)} of {len(kinds)} kinds, judged by {', '.join(sorted(judges))}"
        return said + (f"; {twins} have the text of another one, and stay in its split" if twins else "")

    def tokens(self) -> str:
        """Renders every prompt and turns it into tokens, as far as the model's files are here."""
        texts, new = self._texts, self._config.decoding.max_new_tokens
        if not self._model.has_tokenizer:
            raise _UnknownError
        lengths = self._model.checked_lengths(texts, new)
        counts = f"{sum(lengths):,} of all prompts, {max(lengths)} of the longest prompt, {new} new ones"
        return f"tokens       {counts}{self._endless}"

    @property
    def _endless(self) -> str:
        """A warning where nothing but `max_new_tokens` may end an answer that is judged as a whole."""
        config, judges = self._config, {prompt.judge for prompt in self._prompts}
        if config.decoding.stop or "exact" not in judges or self._model.template(config.data.chat_template):
            return ""
        return (
            "; there is neither a chat template nor decoding.stop, and an answer that runs on is not 'exact': "
            'set decoding.stop, such as ["\\n"]'
        )

    def splits(self) -> str:
        sizes = {split: len(prompts) for split, prompts in self._of_split.items()}
        if small := [split for split in SPLITS[1:] if sizes[split] < LEAST_OF_A_SPLIT]:
            raise ConfigError(
                f"label.limit={self._config.label.limit} leaves {sizes[small[0]]} labelled prompts for the split "
                f"{small[0]!r}, which needs {LEAST_OF_A_SPLIT} or more"
            )
        if (learned := sizes["train"] + sizes["tune"]) < self._config.tuning.folds:
            raise ConfigError(
                f"tuning.folds is {self._config.tuning.folds}, and there are {learned} prompts to train and to tune"
            )
        return "splits       " + ", ".join(f"{split} {size}" for split, size in sizes.items())

    def certificate(self) -> str:
        """Whether the bound can be shown with these prompts, whatever they lose."""
        wanted, prompts = self._config.calibration, self._of_split["calibrate"]
        if wanted.alpha <= 0:
            return f"certificate  {len(prompts)} prompts to calibrate on; how many it takes depends on what plans win"
        least = fewest_prompts(wanted.alpha, wanted.delta_of_one, wanted.risk)
        sizes = Counter(prompt.task for prompt in prompts) if wanted.per_task else {"": len(prompts)}
        task, size = min(sizes.items(), key=lambda item: item[1], default=("", 0))
        of_task = f" of the task {task!r}" if task else ""
        if size < least:
            raise ConfigError(
                f"calibration.keep={wanted.keep[0]:g} at its {wanted.delta_of_one:g} of delta takes {least} prompts to "
                f"calibrate on{of_task}, whatever they lose, and there are {size}: use more prompts, a larger share "
                "for data.shares.calibrate, or a smaller keep"
            )
        return f"certificate  {size} prompts to calibrate on{of_task}, {least} needed at least"

    def disk(self) -> str:
        read_record(self._config)
        wanted = self._config.folder
        folder = next(path for path in [wanted.resolve(), *wanted.resolve().parents] if path.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigError(f"the run's folder {wanted} cannot be made: {folder} cannot be written to")
        held = sum(path.stat().st_size for path in wanted.rglob("*") if path.is_file())
        needed, free = max(self._bytes() - held, 0), shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                f"the run takes some {needed / 1e6:,.0f} MB more in {folder}, and {free / 1e6:,.0f} MB are free"
            )
        return f"disk         {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"

    def _bytes(self) -> int:
        """What the run's folder will hold: features, labels and bridges, as far as the model's size is known."""
        config, model = self._config, self._model.config
        size = int(model.get("hidden_size", model.get("n_embd", 0)))
        wide = sum((1 if name == "embedding" else 2) for name in config.features.sets if name in WIDE)
        labelled = sum(len(prompts) for split, prompts in self._of_split.items() if split != "adapt")
        bridges = config.menu.plans if config.adapt.method not in ("none", "adapter", "given") else 0
        width = size if config.adapt.form == "full" else 2 * config.adapt.rank
        numbers = labelled * wide * size + COPIES * bridges * size * width
        return OTHER_BYTES + 4 * numbers + labelled * config.menu.plans * LABEL_BYTES
