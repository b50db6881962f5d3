"""What does an allocator change? Each prompt answered by the full model and under the allocator, in turn, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.plan import LayerPlan
from oracle.prompts import questions_of
from runtime.allocator import Allocator
from runtime.answer_files import check_places, partial_file, rendered_texts, settings_digest, write_lines
from runtime.paired_timing import synchronize
from runtime.texts import AllocatedText, generate_texts

ENTRIES = {
    "id": str,
    "full": str,
    "full_ms": float,
    "allocated": str,
    "allocated_ms": float,
    "layers": float,
    "plan": str,
}
"""What a line holds beside what was asked: both answers, and the milliseconds that each took, from text to text."""

Line = dict[str, Any]


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

    Prompts run one at a time. A comparison that was stopped goes on from `<out>.partial`.

    Args:
        allocator, model, tokenizer: what answers.
        prompts: the file of prompts.
        out, overwrite, begin, advance: see `runtime.answer_files.answer_file`.

    Raises:
        PromptError, AnswersError: see `runtime.answer_files.answer_file`.
        WrongModelError: another model than the one this allocator was made for.
    """
    check_places(prompts, out, overwrite=overwrite)
    keys = questions_of(prompts)
    texts = rendered_texts(allocator, model, tokenizer, keys)
    settings = f"compare {settings_digest(allocator, model)}"
    with partial_file(out, settings, overwrite, ENTRIES) as partial:
        lines = partial.read() if partial else {}
        todo = [key for key in dict.fromkeys(keys) if key not in lines]
        begin(len(lines), len(lines) + len(todo))
        if todo:
            _compared(allocator, model, tokenizer, texts[todo[0]], "full")  # warm-up: tests of the model, first kernels
        for number, key in enumerate(todo):
            both = _compared(allocator, model, tokenizer, texts[key], ("full", "allocated")[number % 2])
            lines[key] = {"id": key[0], **key[1].to_row(), **both}
            if partial:
                partial.append([lines[key]])
            advance(1)
        found = [lines[key] for key in keys]
        if out is not None and partial is not None:
            write_lines(out, found)
            partial.path.unlink(missing_ok=True)
    return found


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
    n = len(lines)
    same = sum(line["full"] == line["allocated"] for line in lines)
    layers = sum(line["layers"] for line in lines) / n
    full_ms, allocated_ms = (sum(line[name] for line in lines) / n for name in ("full_ms", "allocated_ms"))
    return (
        f"{n} prompts: {same} answers are the full model's, {layers:.2f} of {n_layers} layers on average "
        f"({share:.1%} of the decoder), {allocated_ms:.0f} ms a prompt instead of {full_ms:.0f} "
        f"(each timed once, in turn: {full_ms / allocated_ms:.2f}x)"
    )
