"""Other ways to run fewer layers, in the same process as ours. What cannot run says why in one sentence.

    pip install economize tide-inference      # both optional; without them their rows say that they are missing

Each peer gets a copy of the model with shared weights, so that what it hooks in slows nobody else down.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import Answers, FirstTokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.execution.delete_layers import delete_layers
from backbone.families import decoder_layers
from backbone.plan import LayerPlan

Batch = dict[str, torch.Tensor]
Contestant = Callable[[Sequence[Batch]], Answers]

CALM_THRESHOLDS = (0.9, 0.95, 0.98, 0.99)
NOTES = {
    "early_exit": "transformers' assistant_early_exit: lossless; made for models trained to exit early, which this one "
    "need not be",
    "tide": "tide-inference: runs every layer and picks one afterwards; sees no attention mask; decodes with an end "
    "token of its own",
    "calm": "economize's calm: confidence of states, the lowest threshold that keeps as many tokens of the full "
    "model as the allocator does; the head runs for every token of the prompt; its layers cannot be counted",
    "layer_skip": "economize's layer_skip: lossless; drafts without the layers that the static plan leaves out",
}
"""What a reader of the numbers must know."""
ONE_PROMPT = "it takes one prompt at a time: see batch 1"


class Peers:
    """The peers for one model and one setting of new tokens T.

    Attributes:
        refused: why a peer is not there at all, a sentence each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        static: LayerPlan,
        allocated: Sequence[list[int]],
        texts: Sequence[str],
        sample: Sequence[Batch],
        new_tokens: int,
    ) -> None:
        """`texts` and `sample`, single prompts, set the peers up; `allocated`: the allocator's tokens for it."""
        self._model, self._static, self._new_tokens = model, static, new_tokens
        self._ready: dict[str, Contestant] = {}
        self.refused: dict[str, str] = {}
        makers: dict[str, Callable[[], Contestant]] = {
            "early_exit": self._early_exit,
            "tide": lambda: self._tide(tokenizer, texts),
            "calm": lambda: self._calm(allocated, sample),
            "layer_skip": self._layer_skip,
        }
        for name, make in makers.items():
            try:
                self._ready[name] = make()
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:200]
                self.refused[name] = reason if isinstance(error, MissingError) else f"{type(error).__name__}: {reason}"

    def contestants(self, batches: Sequence[Batch]) -> tuple[dict[str, Callable[[], Answers]], dict[str, str]]:
        """The peers that can answer these batches, and why the others do not."""
        several = any(len(batch["input_ids"]) > 1 for batch in batches)
        alone = ("early_exit", "tide") if several else ()
        skipped = {name: ONE_PROMPT for name in alone if name in self._ready}
        runs = {
            name: (lambda answer=answer: answer(batches)) for name, answer in self._ready.items() if name not in alone
        }
        return runs, {**self.refused, **skipped}

    def _copy(self) -> PreTrainedModel:
        return delete_layers(self._model, LayerPlan.full(len(decoder_layers(self._model))))

    def _early_exit(self) -> Contestant:
        return self._generating(self._copy(), assistant_early_exit=max(1, len(decoder_layers(self._model)) // 2))

    def _layer_skip(self) -> Contestant:
        economize = imported("economize", "economize")
        from economize.techniques.layer_skip import LayerSkipConfig

        skipped = tuple(sorted(layer + 1 for layer in self._static.skipped_layers))
        if not skipped:
            raise MissingError("the static plan skips no layer, so there is nothing to draft with")
        return self._generating(economize.apply(self._copy(), LayerSkipConfig(skip_layers=skipped)), False)

    def _calm(self, allocated: Sequence[list[int]], sample: Sequence[Batch]) -> Contestant:
        """At the lowest threshold that keeps as many of the full model's tokens as the allocator does on the sample."""
        economize = imported("economize", "economize")
        from economize.techniques.dynamic_depth import CalmConfig

        full = self._generating(self._model)(sample).tokens
        for threshold in CALM_THRESHOLDS:
            config = CalmConfig(confidence="state", threshold=threshold, min_layer=2)
            found = self._generating(economize.apply(self._copy(), config), first_token_shows=False)
            if agreement(found(sample).tokens, full) >= agreement(allocated, full):
                break
        return found

    def _tide(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Contestant:
        tide, copy = imported("TIDE", "tide-inference"), self._copy()
        with tempfile.TemporaryDirectory() as folder:
            several = max(1, 1 + 200 // min(map(len, texts)))  # it leaves out texts of up to 100 characters
            joined = ["\n".join(texts[start : start + several]) for start in range(0, len(texts), several)]
            rows = [json.dumps({"text": text}) for text in joined if len(text.strip()) > 100]
            if not rows:
                raise MissingError("these prompts are too few or too short for its calibration")
            (Path(folder) / "train.jsonl").write_text("\n".join(rows) + "\n")
            path = str(Path(folder) / "router.pt")
            config = tide.TIDEConfig(min_layers=min(8, len(decoder_layers(copy)) // 2))
            tide.TIDE.calibrate(copy, tokenizer, dataset=folder, num_samples=len(rows), save_path=path, config=config)
            engine = tide.TIDE(copy, path, config)

        def answer(batches: Sequence[Batch]) -> Answers:
            found = Answers()
            for batch in batches:
                output = engine.generate(batch["input_ids"], max_new_tokens=self._new_tokens, temperature=0.0)
                found.tokens += output[:, batch["input_ids"].shape[1] :].tolist()
            return found

        return answer

    def _generating(self, model: Any, first_token_shows: bool = True, **options: Any) -> Contestant:
        """By the model's own `generate()`, exactly T tokens for every prompt."""

        def answer(batches: Sequence[Batch]) -> Answers:
            found = Answers()
            for batch in batches:
                clock = FirstTokens(time.perf_counter())
                output = model.generate(
                    batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=self._new_tokens,
                    do_sample=False,
                    stopping_criteria=[clock],
                    **options,
                )
                found.tokens += output[:, batch["input_ids"].shape[1] :].tolist()
                found.first_token_ms += [clock.ms or 0.0] * len(output) if first_token_shows else []
            return found

        return answer


def agreement(tokens: Sequence[list[int]], full: Sequence[list[int]]) -> float:
    """Share of tokens that are the full model's, place by place."""
    pairs = [pair for row, of_full in zip(tokens, full, strict=True) for pair in zip(row, of_full, strict=False)]
    return sum(one == other for one, other in pairs) / len(pairs)


class MissingError(Exception):
    """A peer that is not there; the message is the whole reason."""


def imported(module: str, package: str) -> Any:
    if find_spec(module) is None:
        raise MissingError(f"not installed: pip install {package}")
    return __import__(module)
