"""Token exits for `generate()`: `exits.generate(...)` and `custom_generate=exits`, on the model's decoding loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from backbone.errors import UnsupportedGenerationError
from backbone.execution.apply_plan import apply_plan
from backbone.families import decoder_layers
from backbone.healing.healing import Healing, ready
from backbone.plan import LayerPlan
from runtime.generate_arguments import generate_by
from runtime.request import Request, loop_arguments
from token_exits.driver import token_exits
from token_exits.heads import TokenExitsError
from token_exits.kv_projection import check_projections
from token_exits.kv_strategies import PropagatedKV
from token_exits.settings import ExitSettings

Output = torch.Tensor | GenerateDecoderOnlyOutput


@dataclass(frozen=True)
class TokenExits:
    """Generates with tokens that leave the layers early.

    Use `exits.generate(model, **inputs, ...)`, or pass it to the model: `model.generate(**inputs,
    custom_generate=exits, ...)`. Both take and return what stock `generate()` does, greedy or sampling. A streamer
    works with the first alone, since transformers hands none on. Prompts run in full.

    Attributes:
        settings: gate, threshold, candidate layers, heads, strategy.
    """

    settings: ExitSettings

    def generate(
        self,
        model: PreTrainedModel,
        inputs: Any = None,
        generation_config: Any = None,
        *,
        streamer: Any = None,
        plan: LayerPlan | None = None,
        healing: Healing | None = None,
        **arguments: Any,
    ) -> Output:
        """`model.generate(inputs, generation_config, **arguments)`, each new token leaving where the gate is confident.

        With `return_dict_in_generate=True` the output has `layers_run` [R, new tokens], the number of layers that each
        token ran, also after a row's end. With the strategy `recompute` the output has no cache, whose deferred tokens
        would be missing.

        Args:
            model: its tokens leave.
            inputs, generation_config, streamer, arguments: as those of stock `generate()`.
            plan: for all rows, prompt and answer alike, below which tokens leave; None for all layers.
            healing: what the plan runs with.

        Raises:
            TokenExitsError: heads of another model, or a plan or text that the strategy cannot be used with.
            UnsupportedGenerationError: a way of generating that no token exit can work with; the message names it.
            UnsupportedModelError: a model that tokens cannot leave exactly.
        """
        loop = partial(self, streamer=streamer, plan=plan, healing=healing)
        output: Output = generate_by(loop, model, inputs, generation_config, streamer, arguments)
        return output

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        streamer: Any = None,
        plan: LayerPlan | None = None,
        healing: Healing | None = None,
        **model_kwargs: Any,
    ) -> Output:
        """The decoding loop that `generate(custom_generate=exits)` calls after preparing its inputs."""
        loop = loop_arguments(logits_processor, stopping_criteria, streamer)
        _check_mode(generation_config)
        request = Request(model, input_ids, generation_config, model_kwargs, loop, ready(healing, model))
        plan = LayerPlan.full(len(decoder_layers(model))) if plan is None else plan
        self._check(request, plan)
        return self._decode(request, plan)

    def _decode(self, request: Request, plan: LayerPlan) -> Output:
        model, steps = request.model, request.max_new_tokens
        with apply_plan(model, plan, request.healing), token_exits(model, self.settings, plan, steps) as driver:
            output: Output = request.decoding_loop(
                request.input_ids, generation_config=request.config, **request.loop, **request.kwargs
            )
        if not isinstance(output, torch.Tensor):
            new_tokens = output.sequences.shape[1] - request.input_ids.shape[1]
            output["layers_run"] = torch.tensor(driver.layers_run[:new_tokens]).T.contiguous()
            if self.settings.strategy == "recompute":
                output["cache"] = None
        return output

    def _check(self, request: Request, plan: LayerPlan) -> None:
        settings, model = self.settings, request.model
        if settings.heads.model is not model:
            raise TokenExitsError(
                f"these exit heads were made for another {type(settings.heads.model).__name__} than the model given; "
                "make them for this one"
            )
        plan.check_fits(len(decoder_layers(model)))
        check_projections(model)
        _check_cache(request)
        if settings.strategy == "share":
            first = PropagatedKV(model, plan, shares=True).first_shared()
            if settings.depths[0] < first:
                raise TokenExitsError(
                    "the strategy 'share' copies keys and values from a layer of the same kind, and this model's first "
                    f"of each kind lie before layer {first}: let tokens leave from there on, not before layer "
                    f"{settings.depths[0]}"
                )
        if settings.strategy == "recompute":
            _check_recompute(request, plan)


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedGenerationError(f"token exits work with greedy decoding and sampling, not with {mode.value}")
    if config.output_attentions or config.output_hidden_states:
        raise UnsupportedGenerationError(
            "output_attentions and output_hidden_states need every layer of every token, which token exits leave out"
        )
    if config.prefill_chunk_size is not None:
        raise UnsupportedGenerationError(
            "token exits take the first pass for the whole prompt; leave out prefill_chunk_size"
        )


def _check_cache(request: Request) -> None:
    cache = request.cache
    if type(cache) is not DynamicCache:
        kind = "no cache" if cache is None else f"a {type(cache).__name__}"
        raise UnsupportedGenerationError(
            f"token exits need the dynamic cache that generate() makes by default, got {kind}; leave out use_cache and "
            "cache_implementation"
        )
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if other := [type(layer).__name__ for layer in cache.layers if type(layer) not in known]:
        raise UnsupportedGenerationError(
            f"token exits cannot keep tokens in the {other[0]} of this cache; start with a new cache"
        )


def _check_recompute(request: Request, plan: LayerPlan) -> None:
    if not plan.is_full:
        raise TokenExitsError("the strategy 'recompute' takes no plan, since deferred tokens would miss its bridges")
    if getattr(request.cache, "_is_user_defined", False) or request.kwargs["cache"].get_seq_length():
        raise TokenExitsError("the strategy 'recompute' keeps a cache with gaps, so it takes none from outside")
    longest = int(request.config.max_length or 0)
    windows = [layer.sliding_window for layer in request.kwargs["cache"].layers if layer.is_sliding]
    if windows and longest >= min(windows):
        raise TokenExitsError(
            f"the strategy 'recompute' cannot go back behind a sliding window: prompt and answer may have {longest} "
            f"tokens, the window {min(windows)}; use 'propagate', or fewer tokens"
        )
