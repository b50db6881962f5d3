"""Bridges of a saved allocator stand in for the layers that a plan leaves out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import N_LAYERS, saved_model
from engines import closing_engine, greedy
from layerbudget_vllm.runner import ALLOCATOR, bridges_of
from transformers import AutoModelForCausalLM

from backbone.healing.healing import Adapter, Bridge
from layerbudget import ArtefactError, Healing, LayerPlan

PROMPT = list(range(3, 33))
TEXTS = ("0-4", "0-2,6-7")


def save_healing(folder: Path, width: int, *, with_adapter: bool = False) -> Healing:
    draw = torch.Generator().manual_seed(0)
    bridges = {}
    for text in TEXTS:
        plan = LayerPlan.parse(text, N_LAYERS)
        bridge = Bridge((torch.randn(width, width, generator=draw) * 0.1,), torch.randn(width, generator=draw))
        bridges[plan] = {plan.gaps[0].start: bridge}
    adapter = Adapter({"weight": (torch.ones(2, 1), torch.ones(1, 2))}) if with_adapter else None
    made = Healing(f"tiny-{N_LAYERS}x{width}-0123456789ab", bridges, adapter)
    folder.mkdir(exist_ok=True)
    made.save(folder / "healing.safetensors")
    return made


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_plans_run_with_the_allocators_bridges(family: str, tmp_path: Path) -> None:
    folder = saved_model(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = save_healing(tmp_path / "allocator", model.config.hidden_size)
    with closing_engine(folder, additional_config={ALLOCATOR: str(tmp_path / "allocator")}) as llm:
        found = greedy(llm, [PROMPT] * 3, [*TEXTS, None])
        assert greedy(llm, [PROMPT], [TEXTS[1]]) == [found[1]]
    for text, answer in zip([*TEXTS, f"0-{N_LAYERS - 1}"], found, strict=True):
        assert _by_transformers(folder, LayerPlan.parse(text, N_LAYERS), made) == answer


def _by_transformers(folder: Path, plan: LayerPlan, made: Healing) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for index in plan.skipped_layers:
        bridge = made.bridges.get(plan, {}).get(index, lambda states: states)
        model.model.layers[index].forward = lambda states, *args, bridge=bridge, **kwargs: bridge(states)
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def config(folder: Path, width: int = 64) -> SimpleNamespace:
    shape = SimpleNamespace(num_hidden_layers=N_LAYERS, hidden_size=width)
    return SimpleNamespace(
        additional_config={ALLOCATOR: str(folder)}, model_config=SimpleNamespace(hf_text_config=shape)
    )


def test_an_allocator_with_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    save_healing(tmp_path, 64, with_adapter=True)
    with pytest.raises(ArtefactError, match="has an adapter"):
        bridges_of(config(tmp_path), torch.zeros(1))


def test_healing_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_healing(tmp_path, 64)
    with pytest.raises(ArtefactError, match="the model served has the shape 8x96"):
        bridges_of(config(tmp_path, 96), torch.zeros(1))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="folder of a saved allocator"):
        bridges_of(config(tmp_path / "none"), torch.zeros(1))


def test_an_allocator_without_healing_has_no_bridges(tmp_path: Path) -> None:
    assert bridges_of(config(tmp_path), torch.zeros(1)) == {}
