"""Judged answers with tokens that leave early, kept in a file as they are made: a stopped run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backbone.fingerprint import model_fingerprint
from backbone.plan import LayerPlan
from backbone.stand_ins.attaching import attached_digest
from oracle.chat import padded_prompts
from oracle.decoding import Decoding
from oracle.labels.generate_answers import answer_text, stop_token_ids
from oracle.labels.reader import model_key
from oracle.prompts import Prompt
from pipelines.progress import progress
from runtime.token_exits.token_exits import TokenExits


@dataclass(frozen=True, slots=True)
class ExitAnswer:
    """One answer.

    Attributes:
        key: hash of everything that the answer and its score depend on.
        text: the answer.
        score: in [0, 1].
        layers: that each of its tokens ran.
    """

    key: str
    text: str
    score: float
    layers: tuple[int, ...]


class ExitAnswers:
    """Answers by token exits, plan, model, decoding, prompt and judge.

    Args:
        path: where they are kept, one JSON object a line; a line that was cut off by a kill is made again.
        full_answers: of the full model, by prompt id, for judges that compare with them.
    """

    def __init__(
        self,
        path: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        batch_size: int,
        full_answers: Mapping[str, str],
    ) -> None:
        self._path, self._model, self._tokenizer = path, model, tokenizer
        self._decoding, self._batch_size, self._full = decoding.of(model, tokenizer), batch_size, full_answers
        self._known = {answer.key: answer for answer in _read(path)}

    def of(
        self,
        key: str,
        make: Callable[[], TokenExits],
        prompts: Sequence[Prompt],
        plans: Sequence[LayerPlan] | None = None,
    ) -> list[ExitAnswer]:
        """The answers to `prompts`, in their order; what is not known yet is made, and kept a batch at a time.

        Args:
            key: stands for all that `make` puts into the token exits; its beginning, up to a colon, names them.
            plans: a plan for each prompt, below which its tokens leave. Prompts of one plan are answered together.
        """
        own: Sequence[LayerPlan | None] = plans or [None] * len(prompts)
        keys = [self._key(key, plan, prompt) for prompt, plan in zip(prompts, own, strict=True)]
        missing: dict[LayerPlan | None, list[tuple[str, Prompt]]] = {}
        for each, prompt, plan in zip(keys, prompts, own, strict=True):
            if each not in self._known:
                missing.setdefault(plan, []).append((each, prompt))
        if missing:
            self._make(key.partition(":")[0], make(), missing)
        return [self._known[each] for each in keys]

    def _key(self, exits: str, plan: LayerPlan | None, prompt: Prompt) -> str:
        stand_ins = attached_digest(self._model, plan) if plan is not None else ""
        model = model_key(model_fingerprint(self._model), str(self._model.dtype), stand_ins)
        parts = [exits, str(plan), model, str(self._decoding), prompt.hash, prompt.judge]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _make(
        self, name: str, exits: TokenExits, missing: Mapping[LayerPlan | None, Sequence[tuple[str, Prompt]]]
    ) -> None:
        with progress(f"token exits, {name}", sum(map(len, missing.values()))) as advance:
            for plan, some in missing.items():
                ordered = sorted(some, key=lambda keyed: len(keyed[1].prompt))
                for start in range(0, len(ordered), self._batch_size):
                    batch = ordered[start : start + self._batch_size]
                    self._keep(self._answered(exits, batch, plan))
                    advance(len(batch))

    def _answered(
        self, exits: TokenExits, keyed: Sequence[tuple[str, Prompt]], plan: LayerPlan | None
    ) -> list[ExitAnswer]:
        inputs = padded_prompts(self._tokenizer, [prompt.prompt for _, prompt in keyed]).to(self._model.device)
        stops = stop_token_ids(self._tokenizer, self._decoding)
        options = self._decoding.arguments(self._tokenizer, list(stops))
        output = exits.generate(self._model, **inputs, **options, plan=plan, return_dict_in_generate=True)
        assert not isinstance(output, torch.Tensor)
        rows = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        found = []
        for (key, prompt), ids, layers in zip(keyed, rows, output["layers_run"].tolist(), strict=True):
            n_tokens = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
            text = answer_text(self._tokenizer, ids[:n_tokens], self._decoding)
            value = prompt.score_or_zero(text, self._full[prompt.id])
            found.append(ExitAnswer(key, text, value, tuple(layers[:n_tokens])))
        return found

    def _keep(self, answers: Sequence[ExitAnswer]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
        self._known |= {answer.key: answer for answer in answers}


def _read(path: Path) -> list[ExitAnswer]:
    """What is kept; lines that are no answers are left out, and a last line without its end is ended."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        with path.open("a") as file:
            file.write("\n")
    found = []
    for line in text.splitlines():
        try:
            fields = json.loads(line)
            found.append(ExitAnswer(**{**fields, "layers": tuple(fields["layers"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return found
