"""Test prompts answered with all layers and with those that the allocator chooses: shown, timed, and checked.

Some are printed at the end of a run and in its report; a rule picks them that does not flatter.

Shapes: `N` test prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.batches import spread
from oracle.chat import padded_prompts
from oracle.judges import KL
from oracle.prompts import Prompt
from pipelines.evaluation.learning_table import Table
from pipelines.run.progress import progress
from pipelines.run.workspace import Workspace
from runtime.allocator import Allocator
from runtime.offline import decoding_options, generate_texts, new_texts
from runtime.output import check_layers
from runtime.paired_timing import seconds_of

SHOWN = 6
"""Prompts that are shown; each answer is timed once, after the one that is shown."""
COMPARED = 16
"""Prompts of which `generate()` is checked to run the plans that were certified, at most."""
RULE = "the first test prompt of each kind, one of whose answers is worse than the full model's, if there is any"


def check_layers_run(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    certified: Sequence[LayerPlan],
) -> None:
    """Generate a token for some of the rendered prompts whose certified plan is shortened, and compare plans.

    Raises:
        InputError: see `runtime.output.check_layers`.
    """
    timed, one = replace(allocator, drift=None), replace(allocator.decoding, max_new_tokens=1)
    shortened = [(text, plan) for text, plan in zip(texts, certified, strict=True) if not plan.is_full]
    compared = spread(shortened, COMPARED)
    ran = [generate_texts(timed.generate, model, tokenizer, [text], one)[0].plan for text, _ in compared]
    check_layers([plan for _, plan in compared], ran)


def example_rows(tasks: Sequence[str], is_worse: NDArray[np.bool_], count: int = SHOWN) -> list[int]:
    """Rows of the prompts to show: the first of each kind, then the second of each, until there are `count`.

    Args:
        tasks: kind of each prompt [N].
        is_worse: where the allocator's answer scores below the full model's [N]. If there are such prompts and none is
            picked, the next of them takes the last place.
    """
    seen: Counter[str] = Counter()
    turns = []
    for row, task in enumerate(tasks):
        turns.append((seen[task], row))
        seen[task] += 1
    order = [row for _, row in sorted(turns)]
    picked, left = order[:count], order[count:]
    worse = [row for row in left if is_worse[row]]
    if worse and not is_worse[picked].any():
        picked[-1] = worse[0]
    return picked


def answered_both_ways(
    workspace: Workspace, allocator: Allocator, test: Table, chosen: NDArray[np.intp]
) -> list[dict[str, Any]]:
    """Each picked prompt with its reference, both answers with their scores, layers and milliseconds.

    The answers are generated again, as `generate()` gives them, so that what is shown is what was timed. Prompts are
    picked by the plans that were chosen for them [N].
    """
    timed = replace(allocator, drift=None)  # the same prompts over and over are no served requests
    rows = np.arange(len(test.prompts))
    picked = example_rows(test.tasks.tolist(), test.scores[rows, chosen] < test.scores[:, -1])
    with progress("answers to show", len(picked) * 4) as advance:
        return [_answered(workspace, timed, test.prompts[row], advance) for row in picked]


def _answered(
    workspace: Workspace, allocator: Allocator, prompt: Prompt, advance: Callable[[int], None]
) -> dict[str, Any]:
    model, tokenizer = workspace.model.loaded
    inputs = dict(padded_prompts(tokenizer, [prompt.prompt]).to(model.device))
    options = decoding_options(tokenizer, workspace.model.decoding)
    stock: Any = model.generate
    full = partial(stock, **inputs, **options)
    allocated: Any = partial(allocator.generate, model, **inputs, **options)
    output = allocated(return_dict_in_generate=True)
    plan: LayerPlan = output["plans"][0]

    def text(sequences: torch.Tensor) -> str:
        return new_texts(tokenizer, sequences, inputs["input_ids"].shape[1], workspace.model.decoding)[0]

    full_answer, answer = text(full()), text(output.sequences)
    advance(2)
    full_ms, ms = (1000 * seconds_of(run) for run in (full, allocated))
    advance(2)
    return {
        "id": prompt.id,
        "task": prompt.task,
        "prompt": prompt.shown,
        "reference": prompt.shown_references,
        "full_answer": full_answer,
        "answer": answer,
        "full_score": _score(prompt, full_answer, full_answer),
        "score": _score(prompt, answer, full_answer),
        "plan": str(plan),
        "layers": plan.layers,
        "full_ms": full_ms,
        "ms": ms,
    }


def _score(prompt: Prompt, answer: str, full_answer: str) -> float:
    """By the prompt's judge; one that reads no answers is stood in for by agreement with the full model's answer."""
    return prompt.score_or_zero(answer, full_answer, "agreement" if prompt.judge == KL else None)
