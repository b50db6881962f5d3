"""Read labels: needs the store and the names under which they are kept there, but no language model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from backbone.plan import LayerPlan, PlanMenu
from oracle.decoding import Decoding
from oracle.judges import judge_key
from oracle.labels.store import Label, LabelStore
from oracle.prompts import Prompt

Key = tuple[str, str]
"""(prompt hash, `judge_key`)."""

READ_TOGETHER = 4096
"""Labels that are in memory at once where only their digest is wanted."""


def key_of(prompt: Prompt) -> Key:
    return prompt.hash, judge_key(prompt.judge)


def model_key(fingerprint: str, dtype: str, healing: str) -> str:
    """What answers: the model, its dtype, and the digest of the healing parts that the plan runs with, if any."""
    return f"{fingerprint} {dtype}" + (f" with {healing}" if healing else "")


class LabelReader:
    """The labels of one model and one decoding.

    Args:
        store: where they are kept.
        decoding: how answers are generated, complete (see `Decoding.of`).
        key_of_model: `model_key` of a plan.

    Attributes:
        decoding: as given.
    """

    def __init__(self, store: LabelStore, decoding: Decoding, key_of_model: Callable[[LayerPlan], str]) -> None:
        self._store, self.decoding, self._key_of_model = store, decoding, key_of_model

    def missing(self, prompts: Sequence[Prompt], plan: LayerPlan) -> list[Prompt]:
        """The prompts that have no label under `plan` yet."""
        hashes = [prompt.hash for prompt in prompts]
        found = self._store.keys(self._key_of_model(plan), str(plan), str(self.decoding), hashes)
        return [prompt for prompt in prompts if key_of(prompt) not in found]

    def scores(self, prompts: Sequence[Prompt], plan: LayerPlan) -> list[float]:
        """The scores of prompts that were labelled under `plan`."""
        labels = self.labels(plan, prompts)
        return [labels[key_of(prompt)].score for prompt in prompts]

    def read(self, prompts: Sequence[Prompt], menu: PlanMenu) -> list[list[Label]]:
        """For each prompt its K labels, cheapest plan first."""
        by_plan = [self.labels(plan, prompts) for plan in menu.plans]
        return [[labels[key_of(prompt)] for labels in by_plan] for prompt in prompts]

    def labels(self, plan: LayerPlan, prompts: Iterable[Prompt]) -> dict[Key, Label]:
        """The labels of these prompts under `plan` that the store holds."""
        hashes = {prompt.hash for prompt in prompts}
        return self._store.read(self._key_of_model(plan), str(plan), str(self.decoding), hashes)

    def digest(self, prompts: Sequence[Prompt], menu: PlanMenu) -> str | None:
        """SHA-256 of the labels of all these prompts under all plans; None while any is missing."""
        content, ordered = hashlib.sha256(), sorted(prompts, key=key_of)
        for plan, start in product(menu.plans, range(0, len(ordered), READ_TOGETHER)):
            some = ordered[start : start + READ_TOGETHER]
            labels = self.labels(plan, some)
            for prompt in some:
                if (label := labels.get(key_of(prompt))) is None:
                    return None
                row = [str(plan), label.prompt, label.judge, label.answer, list(label.answer_ids), repr(label.score)]
                content.update(json.dumps(row).encode())
        return content.hexdigest()


def score_matrix(labels: Sequence[Sequence[Label]]) -> NDArray[np.float64]:
    """Scores [N, K] of N prompts under K plans; NaN where a judge failed."""
    return np.array([[label.score for label in row] for row in labels], dtype=np.float64)


def judged(scores: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Of scores [N, K] with NaN where a judge failed: the rows [M] that count, and their scores [M, K] without NaN.

    A row counts if the judge read the full plan's answer. A shortened plan's answer that the judge cannot read scores
    0. To leave such a prompt out would be to leave out the prompts on which shortened plans do worst.
    """
    rows = np.flatnonzero(~np.isnan(scores[:, -1]))
    return rows, np.nan_to_num(scores[rows], nan=0.0)


def acceptance_rates(labels: Sequence[Sequence[Label]]) -> tuple[float, ...]:
    """For each of K plans the share of its tokens that the full model says too, counted up to the first that it does
    not: the probability with which a drafted token is accepted, as far as it is the same at every place.

    Args:
        labels: of N prompts under K plans, the last of which is the full one. Answers that were cut short hold at least
            the first token that is not the full model's.
    """
    accepted, drafted = [0] * len(labels[0]), [0] * len(labels[0])
    for row in labels:
        full = row[-1].answer_ids
        for plan, label in enumerate(row):
            same = [own == other for own, other in zip(label.answer_ids, full, strict=False)]
            agreed = same.index(False) if False in same else len(same)
            accepted[plan] += agreed
            drafted[plan] += min(agreed + 1, len(same))
    return tuple(a / n if n else 1.0 for a, n in zip(accepted, drafted, strict=True))
