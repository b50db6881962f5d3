"""What a model runner of vLLM does for plans: nothing, until a request of a step names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from layerbudget import ArtefactError, Healing
from layerbudget_vllm.admission import is_registered
from layerbudget_vllm.requests import LayerPlanError, plan_of
from layerbudget_vllm.row_subsets import AttentionContext, Bridges, Requests, SubsetPass, subset_layers

ALLOCATOR = "layerbudget_allocator"
"""Of `additional_config`: the folder of a saved allocator, whose bridges the shortened plans run with."""

HEALING_FILES = ("healing.safetensors", "stand_ins.safetensors")
"""The bridges' file in such a folder; the second is its name in older ones."""


class PlannedPasses:
    """Goes before a model runner of vLLM among the bases of a class.

    In a step whose requests name no plan the runner's own code runs, compiled or not. In any other the model runs
    uncompiled, its layers with the rows that want them.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if not is_registered():
            raise LayerPlanError(
                "nothing checks plans at the engine's door: let VLLM_PLUGINS name layerbudget, or unset it"
            )
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        network: nn.Module = self.get_model()  # type: ignore[attr-defined]
        decoder: Any = getattr(network, "model", None)
        self._planned_layers = dict(enumerate(getattr(decoder, "layers", ())))
        config = self.vllm_config  # type: ignore[attr-defined]
        self._bridges = bridges_of(config, next(network.parameters()))
        self._common: dict[int, CommonAttentionMetadata] = {}

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> Any:
        result = super().initialize_attn_backend(*args, **kwargs)  # type: ignore[misc]
        for group in self._attention_groups():
            group.build_metadata = self._noting(group, group.build_metadata)
        return result

    def _noting(self, group: Any, build: Callable[..., Any]) -> Callable[..., Any]:
        """A group's `build_metadata`, which notes what it was given for all requests."""

        def build_metadata(common: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
            self._common[id(group)] = common
            return build(common, *args, **kwargs)

        group.build_for_subset = build
        return build_metadata

    def _attention_groups(self) -> list[Any]:
        return [group for groups in self.attn_groups for group in groups]  # type: ignore[attr-defined]

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        n_layers = len(self._planned_layers)
        requests = [self.requests[name] for name in self.input_batch.req_ids]  # type: ignore[attr-defined]
        plans = [plan_of(request.sampling_params, n_layers) for request in requests]
        forward = partial(super()._model_forward, *args, **kwargs)  # type: ignore[misc]
        if not any(plans):
            return forward()
        context = get_forward_context()
        stock = (context.attn_metadata, context.slot_mapping)
        compiled = (context.skip_compiled, context.cudagraph_runtime_mode)

        def use(subset: AttentionContext | None) -> None:
            context.attn_metadata, context.slot_mapping = stock if subset is None else subset

        starts = self.query_start_loc.cpu[: len(plans) + 1]  # type: ignore[attr-defined]
        rows = SubsetPass(plans, starts, self._bridges, self._attention_context, use)
        context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
        try:
            with subset_layers(self._planned_layers, rows):
                return forward()
        finally:
            use(None)
            context.skip_compiled, context.cudagraph_runtime_mode = compiled

    def _attention_context(self, requests: Requests, tokens: torch.Tensor) -> AttentionContext:
        metadata, slots = {}, {}
        for group in self._attention_groups():
            common = cut(self._common[id(group)], requests, tokens)
            built = group.build_for_subset(common)
            metadata.update(dict.fromkeys(group.layer_names, built))
            slots.update(dict.fromkeys(group.layer_names, common.slot_mapping))
        return metadata, slots


def cut(common: CommonAttentionMetadata, requests: Requests, tokens: torch.Tensor) -> CommonAttentionMetadata:
    """What attention knows of all R requests, for some of them [r] and their tokens [t]."""
    places = torch.tensor(requests, device=common.seq_lens.device)
    on_host = places.cpu()
    lengths = common.query_start_loc_cpu.diff()[on_host].tolist()
    starts = torch.tensor([0, *accumulate(lengths)], dtype=common.query_start_loc_cpu.dtype)

    def rows(values: Any) -> Any:
        return None if values is None else values[places if values.device == places.device else on_host]

    longest = rows(common.seq_lens_cpu_upper_bound)
    return replace(
        common,
        query_start_loc=starts.to(common.query_start_loc.device),
        query_start_loc_cpu=starts,
        seq_lens=rows(common.seq_lens),
        seq_lens_cpu_upper_bound=longest,
        num_reqs=len(requests),
        num_actual_tokens=len(tokens),
        max_query_len=max(lengths),
        max_seq_len=common.max_seq_len if longest is None else int(longest.max()),
        block_table_tensor=rows(common.block_table_tensor),
        slot_mapping=common.slot_mapping.index_select(0, tokens),
        positions=None if common.positions is None else common.positions.index_select(0, tokens),
        is_prefilling=rows(common.is_prefilling),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def bridges_of(config: Any, like: torch.Tensor) -> Bridges:
    """The bridges of the allocator that an engine was started with, on the device and in the dtype of a tensor.

    Raises:
        ArtefactError: a file that holds none or those of another model, or healing parts with an adapter.
    """
    given = config.additional_config
    folder = given.get(ALLOCATOR) if isinstance(given, dict) else None
    if folder is None:
        return {}
    if not Path(str(folder)).is_dir():
        raise ArtefactError(f"{ALLOCATOR} should be the folder of a saved allocator, and {folder!r} is none")
    file = next((Path(folder) / name for name in HEALING_FILES if (Path(folder) / name).exists()), None)
    if file is None:
        return {}
    healing = Healing.load(file)
    if healing.adapter is not None:
        raise ArtefactError(
            f"{file} has an adapter, which changes weights for shortened plans; in vLLM plans run with bridges alone"
        )
    text = config.model_config.hf_text_config
    shape = f"{text.num_hidden_layers}x{text.hidden_size}"
    if f"-{shape}-" not in healing.fingerprint:
        raise ArtefactError(f"{file} was made for {healing.fingerprint}, the model served has the shape {shape}")
    return {
        plan: {first: bridge.to(like.device, like.dtype) for first, bridge in of_plan.items()}
        for plan, of_plan in healing.bridges.items()
    }
