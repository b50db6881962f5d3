"""The saved artefact: prompt in, plan out; probe, controller, menu, certified price and drift alarm."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from backbone.errors import ArtefactError, UnsupportedGenerationError
from backbone.families import check_is_model, decoder_of
from backbone.left_padding import position_inputs
from backbone.plan import LayerPlan
from oracle.chat import ChatError
from runtime.generate_arguments import generate_by, warn_of_other_decoding
from runtime.lossless import check_lossless, draft_plans, generate_losslessly
from runtime.offline import AllocatedText, finished_texts
from runtime.output import Allocated, allocated, share_of_decoder
from runtime.parts import AllocatorParts, Prompts, check_is_tokenizer, listed
from runtime.request import (
    Moment,
    Request,
    check_known,
    check_left_padded,
    decode,
    inferred_mask,
    loop_arguments,
    plans_of,
    prefix_inputs,
)
from runtime.saving.allocator_files import load_allocator, save_allocator, upload_allocator
from runtime.saving.file_bundle import MANIFEST
from runtime.step_costs import StepCosts, measured_step_costs

RUN_FOLDER = "allocator"
"""Where in its own folder a run saves its allocator."""


@dataclass(frozen=True, repr=False)
class Allocator(AllocatorParts):
    """Chooses a layer plan for each prompt and generates with it.

    Use `allocator.generate(model, **inputs, ...)`, or pass it to the model: `model.generate(**inputs,
    custom_generate=allocator, ...)`. Both take and return what stock `generate()` does. The first alone takes a
    streamer and stop strings, and refuses `assistant_model` and `synced_gpus`: transformers 5.24 hands none of them
    on to a `custom_generate`.

    The fields are those of `AllocatorParts`.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        chat_template: str | Path | None = None,
        keep: float | None = None,
    ) -> Allocator:
        """Load a saved allocator from a folder or a hub repository.

        Args:
            source: a folder, a repository's name, or `package:NAME` for an installed package that brings an allocator.
            revision: branch, tag or commit of the repository.
            token: for a private repository; True takes the one that `hf auth login` stored.
            cache_dir: where downloads are kept; default: the hub's own cache.
            subfolder: of the folder or repository, in which the allocator lies.
            chat_template: a file with the chat template that it was made with, where that is not the tokenizer's own.
                What is saved holds only its hash.
            keep: another certified bound to run at than the one that it was made for, see `at`.

        Raises:
            PlanError: a `keep` that is not certified.
            ArtefactError: no allocator there, or a damaged one (every file is checked against its SHA-256); the folder
                of a run, which has it inside; a revision of a local folder; a subfolder that lies outside.
            ChatError: another chat template than the allocator's, or one for an allocator that has none.
        """
        inner = Path(source).expanduser() / RUN_FOLDER
        if not subfolder and (inner / MANIFEST).is_file() and not (inner.parent / MANIFEST).exists():
            raise ArtefactError(f"{source} is the folder of a run and no allocator; give {Path(source) / RUN_FOLDER}")
        loaded = load_allocator(cls, source, revision, token, cache_dir, subfolder)
        loaded = loaded if keep is None else loaded.at(keep)
        return loaded if chat_template is None else loaded.with_chat_template(chat_template)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save to a folder, beside what lies there, in the place of an allocator that was saved there before.

        A reader, also after a kill, gets the old allocator or the new one.

        Raises:
            ArtefactError: the folder is a file, or somebody else's file, such as a README.md, is in the way.
        """
        save_allocator(self, Path(folder))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload to a repository on the hub, made where it is missing; returns its URL."""
        return upload_allocator(self, repo_id, private, token)

    def allocate(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> list[LayerPlan]:
        """The plan of each prompt, as `generate` runs it.

        A look: the drift alarm does not count these prompts.

        Args:
            input_ids: [B, S], left-padded.
            attention_mask: [B, S]; inferred from the pad token if not given, as `generate()` does.
            inputs: tensors that the model's decoder takes beside, such as `position_ids` [B, S].

        Raises:
            UnsupportedGenerationError: an argument that the decoder does not take, or padding on the right.
            WrongModelError: another model than the one this allocator was made for.
        """
        check_is_model(model)
        check_known(model, inputs)
        mask = inferred_mask(model, input_ids) if attention_mask is None else attention_mask
        check_left_padded(mask)
        self.prepare(model)
        mask = mask.to(model.device)
        own = {name: value.to(model.device) for name, value in prefix_inputs(model, inputs).items()}
        positions = {**position_inputs(decoder_of(model), mask), **own}
        if self.chat is not None:
            self.chat.warn_without(input_ids, mask)
        selector = replace(self.selector(), is_served=False)
        decision = selector.decide(model, input_ids.to(model.device), mask, keep_cache=False, **positions)
        return [self.menu.plans[index] for index in decision.chosen]

    def measure(self, model: PreTrainedModel) -> StepCosts:
        """Time this model's passes on its device, for `lossless` and `generate_many`, which else work by an estimate.

        Once for a model, device and dtype: the numbers are kept under `$LAYERBUDGET_CACHE`. Takes as long as some 160
        decoding steps; `generate` never does it by itself.
        """
        self.prepare(model)
        return measured_step_costs(model)

    @overload
    def generate(
        self,
        model: PreTrainedModel,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        return_dict_in_generate: Literal[True],
        streamer: Any = None,
        **arguments: Any,
    ) -> Allocated: ...

    @overload
    def generate(
        self,
        model: PreTrainedModel,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        streamer: Any = None,
        **arguments: Any,
    ) -> torch.Tensor | Allocated: ...

    def generate(
        self,
        model: PreTrainedModel,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        streamer: Any = None,
        **arguments: Any,
    ) -> torch.Tensor | Allocated:
        """`model.generate(inputs, generation_config, **arguments)`, each prompt under its own plan, in one pass for
        all. Prompts are `inputs` or `input_ids=` [B, S], left-padded.

        Besides all stock arguments it takes `allocation_limit_ms`, `lossless` and `keep` (see `__call__`). With
        `return_dict_in_generate=True` the output is an `AllocatedOutput` or `AllocatedBeamOutput` with plans and times.
        `cache=` goes on under the plans that filled the cache. A streamer is ended also when an error is raised.

        Raises:
            UnsupportedGenerationError: a way of generating that no allocator can work with; the message names it.
            WrongModelError: another model than the one this allocator was made for.
        """
        loop = partial(self, streamer=streamer)
        output: torch.Tensor | Allocated = generate_by(loop, model, inputs, generation_config, streamer, arguments)
        return output

    def generate_many(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        *,
        raw: bool = False,
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda done: None,
        **options: Any,
    ) -> list[AllocatedText]:
        """Continue many prompts [N], each under its own plan: all are allocated first, then generated in batches.

        Args:
            model, tokenizer: what answers.
            prompts: texts or conversations, or a single one, which are put into the allocator's chat template: see
                `rendered`.
            raw: the texts are what the model is to continue, without the template.
            batch_size: prompts generated together, at most.
            advance: called with the number of prompts that were answered.
            options: arguments of `generate()`, in place of the decoding that the allocator was calibrated with.

        Returns:
            A text and its plan for each prompt, in their order.

        Raises:
            UnsupportedGenerationError: an option that would give other than one answer a prompt, or a prompt that
                cannot be rendered.
            WrongModelError: another model than the one this allocator was made for.
        """
        check_is_model(model)
        check_is_tokenizer(tokenizer)
        given, texts = [], dict[int, AllocatedText]()
        for number, prompt in enumerate(listed(prompts)):
            try:
                given.append(self.rendered(tokenizer, prompt, raw=raw))
            except ChatError as error:
                raise UnsupportedGenerationError(f"prompt {number}: {error}") from None
        for batch in finished_texts(self, model, tokenizer, given, batch_size=batch_size, **options):
            texts.update(batch)
            advance(len(batch))
        return [texts[index] for index in range(len(given))]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any = None,
        allocation_limit_ms: float | None = None,
        lossless: bool = False,
        keep: float | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | Allocated:
        """The decoding loop that `generate(custom_generate=allocator)` calls after preparing its inputs.

        Args:
            allocation_limit_ms: prompts whose plans are not known after this time run the full plan.
            lossless: give the full model's own answer; a plan of the menu only drafts it (see `runtime.lossless`). No
                plan is chosen for the prompt, and `plans` holds the plan that drafts, full where none does. Logits
                processors and stopping criteria see drafts too, so what they say may depend on the text alone.
            keep: another certified bound to run at, see `at`.
        """
        if keep is not None:
            own = (model, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            return self.at(keep)(*own, allocation_limit_ms, lossless, **model_kwargs)
        start, began = Moment(model.device), time.perf_counter()
        loop = loop_arguments(logits_processor, stopping_criteria, streamer)
        request = Request(model, input_ids, generation_config, model_kwargs, loop, self.prepare(model))
        if self.chat is not None and not request.goes_on:
            self.chat.warn_without(request.input_ids, request.kwargs.get("attention_mask"))
        if lossless:
            check_lossless(request)
            allocation_s = time.perf_counter() - began
            output, first_token_ms, plans = generate_losslessly(request, draft_plans(self), start)
        else:
            warn_of_other_decoding(self, request.decoding)
            plans, prefix = plans_of(request, self.menu, self.selector(allocation_limit_ms))
            request.check_plans(plans)
            allocation_s = time.perf_counter() - began
            output, first_token_ms = decode(request, plans, start, prefix)
        if isinstance(output, torch.Tensor):
            return output
        return allocated(
            output,
            plans=plans,
            share_of_decoder=share_of_decoder(plans, self.menu, model),
            allocation_s=allocation_s,
            first_token_s=first_token_ms / 1000,
            total_s=time.perf_counter() - began,
            drift=None if self.drift is None else self.drift.state,
        )
