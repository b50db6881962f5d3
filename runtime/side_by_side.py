"""Each prompt answered by the full model and under an allocator, in turn, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from runtime.allocator import Allocator
from runtime.answer_files import Line, answering
from runtime.offline import AllocatedText, generate_texts
from runtime.paired_timing import synchronize

ENTRIES = {"full": str, "full_ms": float, "allocated": str, "allocated_ms": float, "layers": float, "plan": str}
"""What a line holds beside what was asked: both answers, and the milliseconds that each took, from text to text."""


def compare_file(
    allocator: Allocator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Path,
    out: Path | None,
    *,
    overwrite: bool = False,
    begin: Callable[[int, int], None] = lambda done, total: None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Line]:
    """A line with both answers for each row of a file of prompts, in the same order; with `out` they are written there.

    Prompts run one at a time. A comparison that was stopped goes on from `<out>.partial`. Arguments and errors are as
    in `runtime.answer_files.answer_file`.
    """
    with answering(allocator, model, tokenizer, prompts, out, "compare", overwrite, ENTRIES) as run:
        todo = run.todo
        begin(len(run.lines), len(run.lines) + len(todo))
        if todo:  # warm-up: tests of the model, first kernels
            _compared(allocator, model, tokenizer, run.texts[todo[0]], "full")
        for number, key in enumerate(todo):
            run.add({key: _compared(allocator, model, tokenizer, run.texts[key], ("full", "allocated")[number % 2])})
            advance(1)
        if out is not None:
            run.write(out)
        return run.found()


def _compared(
    allocator: Allocator, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, first: str
) -> Line:
    ways: dict[str, Callable[..., Any]] = {"full": _in_full, "allocated": allocator.generate}
    answers: dict[str, tuple[AllocatedText, float]] = {}
    for way in sorted(ways, key=lambda name: name != first):
        start = time.perf_counter()
        (answer,) = generate_texts(ways[way], model, tokenizer, [text], allocator.decoding)
        synchronize()
        answers[way] = answer, round((time.perf_counter() - start) * 1000, 2)
    (full, full_ms), (allocated, allocated_ms) = answers["full"], answers["allocated"]
    return {
        "full": full.text,
        "full_ms": full_ms,
        "allocated": allocated.text,
        "allocated_ms": allocated_ms,
        "layers": allocated.plan.layers,
        "plan": str(allocated.plan),
    }


def _in_full(model: PreTrainedModel, **arguments: Any) -> Any:
    """Stock `generate()`; its output also says that every prompt ran the full plan."""
    output: Any = model.generate(**arguments)  # type: ignore[operator]
    output["plans"] = [LayerPlan.full(model.config.get_text_config().num_hidden_layers)] * len(output.sequences)
    return output


def summary(lines: Sequence[Line], n_layers: int, share: float) -> str:
    """What the lines say together; `share` of the decoder was run."""
    n, same = len(lines), sum(line["full"] == line["allocated"] for line in lines)
    layers, full_ms, allocated_ms = (
        sum(line[name] for line in lines) / n for name in ("layers", "full_ms", "allocated_ms")
    )
    return (
        f"{n} prompts: {same} answers are the full model's, {layers:.2f} of {n_layers} layers on average "
        f"({share:.1%} of the decoder), {allocated_ms:.0f} ms a prompt instead of {full_ms:.0f} "
        f"(each timed once, in turn: {full_ms / allocated_ms:.2f}x)"
    )
