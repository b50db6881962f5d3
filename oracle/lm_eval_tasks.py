"""Prompts of tasks of lm-evaluation-harness: `lm_eval:TASK`, the name of a task or group, or the YAML file of one.

A prompt is the text that lm_eval gives a model, worked examples included. docs/lm-eval.md has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any

from backbone.errors import reason_of
from oracle.judges import JUDGES, KL
from oracle.prompt_sources import PromptError, Row, Source, expanded

PREFIX = "lm_eval:"
EXAMPLES_SEED = 1234
"""Worked examples are drawn as by lm_eval's command line."""
JUDGED_BY = {"exact_match": "exact", "rougeL": "rouge_l", "rouge_l": "rouge_l", "contains": "contains"}
"""A metric of generated answers -> the judge that measures the same."""
CHOSEN = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics that count the right choices; the judge `exact` counts them among generated answers."""
_UNFILTERED = {"take_first", "remove_whitespace", "lowercase", "uppercase"}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_FINDS_NUMBERS = re.compile(r"\[[^]]*0-9|\\d")

Task = Any
"""`lm_eval.api.task.ConfigurableTask`."""


def is_task(source: str) -> bool:
    """Whether `data.path` names a task of lm-evaluation-harness."""
    return source.startswith(PREFIX)


def read_task(source: str, split: str, tasks: list[Task] | None = None) -> Source:
    """The prompts of one split of a task, or of all tasks of a group, each with its references and its judge.

    Args:
        source: `lm_eval:TASK`.
        split: of the task's data set; one that the task names as its training, validation or test split.
        tasks: what `tasks_of` gives for the source, where that is known.

    Raises:
        PromptError: no such task or split, one that asks for no answer, or one that cannot be loaded.
        ModuleNotFoundError: the extra `lm-eval` is not installed.
    """
    tasks = tasks or tasks_of(source)
    unjudged = (_unjudged(task) for task in tasks if _judge(task) is None)
    rows = [row for task in tasks for row in _rows(task, split)]
    return Source(source, source.removeprefix(PREFIX), rows, next(unjudged, ""))


def decoding_of(tasks: list[Task]) -> dict[str, Any]:
    """How tasks end their answers: `stop`, and `max_new_tokens` unless they are of multiple choice.

    Raises:
        PromptError: they end their answers in several ways.
    """
    found = [_decoding(task) for task in tasks]
    if any(one != found[0] for one in found):
        names = ", ".join(task.task_name for task in tasks)
        raise PromptError(
            f"the tasks {names} end their answers in several ways: set decoding.stop and decoding.max_new_tokens"
        )
    return found[0]


def first_split(tasks: list[Task]) -> str:
    """The split to learn from: the training split of the first task, or the one that it has instead."""
    return next(iter(_splits(tasks[0])))


@cache
def _index(with_defaults: bool) -> Any:
    """The tasks that there are; those of lm_eval itself take seconds to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_defaults)


def tasks_of(source: str) -> list[Task]:
    """The task of a source, or all of a group, with their data. Raises as `read_task`."""
    name = source.removeprefix(PREFIX)
    is_file = name.endswith((".yaml", ".yml"))
    if is_file and not expanded(name).is_file():
        raise PromptError(f"there is no task file {name}")
    index = _index(not is_file)
    if not is_file and name not in index.all_tasks:
        nearest = get_close_matches(name, index.all_tasks, n=1)
        hint = f"the nearest is {nearest[0]!r}" if nearest else "`lm_eval ls tasks` lists all"
        raise PromptError(f"lm_eval knows no task {name!r}; {hint}. A task of your own is named by its YAML file")
    try:
        found = list(index.load(str(expanded(name)) if is_file else name)["tasks"].values())
    except Exception as error:  # of a data set, or of a task's own code
        raise PromptError(f"the task {name!r} cannot be loaded: {type(error).__name__}: {reason_of(error)}") from error
    for task in found:
        _check(task)
    return found


def _check(task: Task) -> None:
    from lm_eval.api.task import ConfigurableTask

    reason = ""
    if not isinstance(task, ConfigurableTask):
        raise PromptError(f"the task {type(task).__name__} is a class of its own; a task with a YAML file is needed")
    if task.OUTPUT_TYPE not in ("generate_until", "multiple_choice"):
        reason = f"is of the type {task.OUTPUT_TYPE}, which asks for no answer: take generate_until or multiple_choice"
    elif task.multiple_input:
        reason = "puts its choices into the question, so that there is no answer to generate"
    elif getattr(task, "MULTIMODAL", False):
        reason = "shows pictures or plays sound, and prompts are texts"
    if reason:
        raise PromptError(f"the task {task.task_name!r} {reason}")


def _splits(task: Task) -> dict[str, Callable[[], Iterable[Any]]]:
    """Name of a split -> its documents; the training split first, then those that lm_eval scores."""
    config = task.config
    named = {
        config.training_split: task.training_docs,
        config.validation_split: task.validation_docs,
        config.test_split: task.test_docs,
    }
    return {name: docs for name, docs in named.items() if name}


def _rows(task: Task, split: str) -> Iterator[tuple[str, Row | PromptError]]:
    name, splits, judge = task.task_name, _splits(task), _judge(task)
    if split not in splits:
        raise PromptError(
            f"the task {name!r} has no split {split!r}; it has {', '.join(splits)}: set data.split or --split"
        )
    task.set_fewshot_seed(EXAMPLES_SEED)
    leaves_out = split == _split_of_examples(task) and split != task.config.test_split
    for number, doc in enumerate(splits[split]()):
        place = f"{name}, document {number}"
        try:
            row = {"id": f"{name}-{split}-{number}", "task": name, "prompt": _prompt(task, doc, leaves_out)}
            yield place, {**row, "judge": judge, "reference": _references(task, doc)}
        except Exception as error:  # of a task's own code
            yield place, PromptError(f"{type(error).__name__}: {reason_of(error)}")


def _split_of_examples(task: Task) -> str | None:
    """Where worked examples are drawn from; None where they are not from the data set."""
    examples = task.fewshot_cfg
    return examples.split or (next(iter(_splits(task))) if examples.samples is None else None)


class _Others:
    """A task's worked examples without the document that is asked, which lm_eval leaves out of its test split alone."""

    def __init__(self, sampler: Any, asked: Any) -> None:
        self._sampler, self._asked = sampler, asked

    def sample(self, n: int, **_: object) -> Any:
        return self._sampler.sample(n=n, eval_doc=self._asked)


def _prompt(task: Task, doc: Any, leaves_out: bool) -> str:
    examples, sampler = task.config.num_fewshot or 0, task.sampler
    if leaves_out:
        task.sampler = _Others(sampler, doc)
    try:
        return str(task.fewshot_context(doc=doc, num_fewshot=examples, gen_prefix=task.doc_to_prefix(doc)))
    finally:
        task.sampler = sampler


def _references(task: Task, doc: Any) -> list[str]:
    """The right answers; of choices the text that the task would have the model say."""
    target = task.doc_to_target(doc)
    targets = target if isinstance(target, list) else [target]
    if task.config.doc_to_choice is None:
        return [str(one) for one in targets]
    choices = task.doc_to_choice(doc)
    if wrong := [one for one in targets if isinstance(one, int) and not 0 <= one < len(choices)]:
        raise PromptError(f"the right choice is number {wrong[0]}, and there are {len(choices)}, counted from 0")
    return [str(choices[one] if isinstance(one, int) else one) for one in targets]


def _decoding(task: Task) -> dict[str, Any]:
    if task.OUTPUT_TYPE == "multiple_choice":
        return {"stop": ["\n"]}
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS

    options = task.config.generation_kwargs
    until = options.get("until") or []
    length = next((options[name] for name in _LENGTHS if options.get(name)), DEFAULT_MAX_GEN_TOKS)
    return {"stop": [one for one in ([until] if isinstance(until, str) else until) if one], "max_new_tokens": length}


def _judge(task: Task) -> str | None:
    """The judge that measures what the first metric does that has one; None where no metric has one."""
    metrics = list(task.aggregation())
    if task.OUTPUT_TYPE == "multiple_choice":
        return "exact" if {*metrics} & {*CHOSEN} else None
    known = (JUDGED_BY.get(metric) if metric != "exact_match" else _judge_of_matches(task) for metric in metrics)
    return next((judge for judge in known if judge), None)


def _judge_of_matches(task: Task) -> str | None:
    """The judge for the metric `exact_match`: it compares what a task's filters leave of an answer."""
    if task.config.process_results is not None:
        return None  # code of its own decides what matches
    filters = [each["filter"] for each in task.config.filter_list or []]
    if not filters or any({step["function"] for step in steps} <= _UNFILTERED for steps in filters):
        return JUDGED_BY["exact_match"]
    patterns = [str(step.get("regex_pattern", "")) for steps in filters for step in steps]
    return "number" if any(_FINDS_NUMBERS.search(pattern) for pattern in patterns) else None


def _unjudged(task: Task) -> str:
    known = ", ".join([*JUDGES, KL])
    return (
        f"the task {task.task_name!r} is scored by {', '.join(task.aggregation())}, for which there is no judge: set "
        f"data.judge to {known}, or module:function"
    )
