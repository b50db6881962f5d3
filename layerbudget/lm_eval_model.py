"""`--model layerbudget` of lm-evaluation-harness: answers by an allocator, scored on any task that generates.

Importing this module registers the model. What follows lm_eval 0.4.13 finds it by itself, through the entry point in
`pyproject.toml`; `layerbudget lm-eval` works with 0.4.13 too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from backbone.errors import InputError
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from runtime.allocator import Allocator
from runtime.generate_arguments import warn_of_other_decoding
from runtime.output import mean_layers, share_of_decoder, summary_line

TAKEN = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)
"""Arguments of HFLM that are handed on; the others say how it loads a model, and the allocator's is loaded here."""


@register_model("layerbudget")
class LayerbudgetLM(HFLM):  # type: ignore[misc] # lm_eval has no types that are checked here
    """A model that generates with the plans that an allocator chooses.

    Args:
        allocator: folder, hub repository or `package:NAME` of a saved allocator.
        pretrained: where to load its model from; default: as in training.
        keep: another certified bound to run at than the allocator's own.
        chat_template: file with the chat template that it was made with, where that is not the tokenizer's own.
        device, dtype: of the model, as `load_backbone` takes them. Without a GPU lm_eval's default, `cuda:0`, is the
            CPU.
        options: arguments of HFLM, those of TAKEN.

    Raises:
        InputError: no allocator is named, or an option that is not handed on.
        ArtefactError, LoadError, WrongModelError: an allocator or a model that cannot be used.
    """

    def __init__(
        self,
        allocator: str = "",
        pretrained: str | None = None,
        keep: float | None = None,
        chat_template: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        if not allocator:
            raise InputError("--model layerbudget needs an allocator: --model_args pretrained=MODEL,allocator=DIR")
        if unknown := options.keys() - {*TAKEN}:
            raise InputError(
                f"--model layerbudget takes no {min(unknown)!r}; --model_args holds allocator, pretrained, keep, "
                f"chat_template, dtype or {', '.join(TAKEN)}"
            )
        self.allocator = Allocator.from_pretrained(allocator, keep=keep, chat_template=chat_template)
        source = pretrained or self.allocator.model_source
        place = "auto" if device in (None, "cuda:0") and not torch.cuda.is_available() else str(device or "auto")
        model, tokenizer = load_backbone(source, device=place, dtype=dtype)
        self.allocator.prepare(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.pretrained, self.plans = source, list[LayerPlan]()

    def _model_generate(self, context: Any, max_length: int, stop: Sequence[str], **options: Any) -> Any:
        """Token ids of prompts and answers [B, S], by the allocator instead of the model's own `generate()`."""
        strings = [one for one in stop if one != self.tokenizer.eos_token]  # lm_eval adds that one itself
        asked = {name: options.get(name) for name in ("do_sample", "num_beams")}
        new_tokens = max_length - context.shape[1]
        warn_of_other_decoding(self.allocator, {**asked, "max_new_tokens": new_tokens, "stop_strings": strings})
        output = super()._model_generate(
            context, max_length, stop, custom_generate=self.allocator, return_dict_in_generate=True, **options
        )
        self.plans += output.plans
        return output.sequences

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to requests [N], and a line in the log about the layers that ran."""
        begun, done = time.perf_counter(), len(self.plans)
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        if ran := self.plans[done:]:  # none where lm_eval's cache has all answers
            line = summary_line(ran, self.allocator.menu, self.model, time.perf_counter() - begun)
            logging.getLogger("lm_eval").info(line)
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refused: no certificate says anything of likelihoods."""
        self._refuse(requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refused, as `loglikelihood`."""
        self._refuse(requests)

    def _refuse(self, requests: list[Any]) -> NoReturn:
        task = getattr(requests[0], "task_name", None) if requests else None
        raise InputError(
            f"the task {task!r} asks for likelihoods of texts, and an allocator chooses layers for answers that it "
            "generates: take tasks of the type generate_until, or score the full model with --model hf"
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval keeps with its results: the allocator, and the layers that ran on average, if any did."""
        found = {**super().get_model_info(), "allocator": repr(self.allocator)}
        if self.plans:
            share = share_of_decoder(self.plans, self.allocator.menu, self.model)
            found |= {"layers": mean_layers(self.plans), "share_of_decoder": share}
        return found
