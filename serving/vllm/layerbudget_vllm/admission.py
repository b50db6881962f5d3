"""At the engine's door: a request's plan is checked, and keys and values of one plan are never reused by another.

vLLM's prefix cache knows a block of keys and values by the tokens that it was made from and a salt. Two requests with
one prompt and different plans would share blocks, and the second would silently answer wrongly: in the layers that the
first one skipped there are no keys and values of its prompt. So each plan is a salt of its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from layerbudget_vllm.requests import KEY, LayerPlanError, check_engine, plan_of


def register() -> None:
    """Called by vLLM in each of its processes. Requests without a plan pass as they came."""
    if is_registered():
        return
    stock = InputProcessor.process_inputs
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def process_inputs(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        processor, params = given.arguments["self"], given.arguments["params"]
        if (getattr(params, "extra_args", None) or {}).get(KEY) is not None:
            given.arguments["prompt"] = admitted(processor.vllm_config, given.arguments["prompt"], params)
        return stock(*given.args, **given.kwargs)

    InputProcessor.process_inputs = process_inputs


def is_registered() -> bool:
    """Whether vLLM has loaded this plugin in this process."""
    return hasattr(InputProcessor.process_inputs, "__wrapped__")


def admitted(config: Any, prompt: Any, params: Any) -> Any:
    """The prompt, salted with the plan that its parameters name.

    Args:
        config: the engine's `VllmConfig`.
        prompt, params: as `InputProcessor.process_inputs` takes them.

    Raises:
        VLLMValidationError: a plan that this engine cannot run; the server answers with status 400.
    """
    try:
        plan = plan_of(params, config.model_config.hf_text_config.num_hidden_layers)
        check_engine(config)
    except LayerPlanError as error:
        raise VLLMValidationError(str(error), parameter=KEY, value=params.extra_args[KEY]) from None
    if plan is None:
        return prompt
    as_dict = (
        prompt if isinstance(prompt, dict) else {("prompt" if isinstance(prompt, str) else "prompt_token_ids"): prompt}
    )
    salts = [f"{KEY}={plan}", *filter(None, [as_dict.get("cache_salt")])]
    return {**as_dict, "cache_salt": "|".join(salts)}
