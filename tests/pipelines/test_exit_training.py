"""Bridges of early exits that are trained further: nearer to the full model, other plans untouched, part of a run."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from command import layerbudget
from tiny import N_LAYERS, tiny_model

from backbone.plan import LayerPlan, PlanMenu
from backbone.stand_ins.fit_bridges import bridges_of, fit_bridges
from pipelines import exit_training, rehearsal
from pipelines.config_sections import AdaptSection
from pipelines.exit_training import exits_of, train_exits
from pipelines.rehearsal import exit_seconds

EXIT, GAP = LayerPlan.exiting(N_LAYERS, 1), LayerPlan.skipping(N_LAYERS, {2, 3})


@pytest.fixture(scope="module")
def fitted():
    """A model, texts with its own answers, and closed-form bridges of an exit and of a gap."""
    model = tiny_model("llama", layer_scale=2.0)
    prompts = torch.randint(3, 97, (24, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        texts = model.generate(input_ids=prompts, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
    return model, texts, bridges_of(fit_bridges(model, texts, [EXIT, GAP]))


def test_only_plans_that_end_early_are_exits() -> None:
    half = LayerPlan.exiting(N_LAYERS, 3).without(mlp={2})
    assert exits_of([EXIT, GAP, half, LayerPlan.skipping(N_LAYERS, {1, *range(3, N_LAYERS)})]) == {EXIT: 1}


def test_trained_exits_are_nearer_and_gaps_as_they_were(fitted) -> None:
    model, texts, bridges = fitted
    kept = bridges[EXIT][1].factors[0].clone()
    trained, losses = train_exits(model, texts, bridges, 60)
    before, after = losses[str(EXIT)]
    assert after < before
    assert set(losses) == {str(EXIT)}
    assert trained[GAP][2] is bridges[GAP][2]
    assert torch.equal(bridges[EXIT][1].factors[0], kept)
    assert not torch.equal(trained[EXIT][1].factors[0], kept)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "falcon", "phi", "cohere2"])
def test_exits_of_every_family_are_trained(family) -> None:
    """Their final norms have other names than Llama's, or their logits a scale."""
    model = tiny_model(family, layer_scale=2.0)
    texts = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(3)).tolist()
    _, losses = train_exits(model, texts, bridges_of(fit_bridges(model, texts, [EXIT])), 20)
    before, after = losses[str(EXIT)]
    assert 0 < after <= before


def test_long_texts_are_thinned_out_evenly(fitted, monkeypatch) -> None:
    model, texts, bridges = fitted
    monkeypatch.setattr(exit_training, "TOKENS", sum(map(len, texts)) // 3)
    seen: dict[str, list[int]] = {}

    @contextmanager
    def progress(description, total):
        seen[description] = [total]
        yield seen[description].append

    monkeypatch.setattr(exit_training, "progress", progress)
    train_exits(model, texts, bridges, 4)
    assert seen == {
        "sequences for exits": [len(texts) / 3, *[pytest.approx(8)] * (len(texts) // 24)],
        "training steps of exits": [4, 1, 1, 1, 1],
    }


@pytest.mark.parametrize("method", ["bridges", "both"])
def test_a_run_trains_its_exits_if_asked(config_file, method) -> None:
    menu = {"method": "given", "given": ["0-2", "0-3"], "probe_depth": 2}
    path = config_file(menu=menu, adapt={"method": method, "prompts": 40, "exit_steps": 20, "epochs": 0.1})
    done = layerbudget("menu", path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = layerbudget("adapt", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "closed form and trained" in done.stdout
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    divergence = json.loads((folder / "adapt.json").read_text())["exits"]["divergence"]
    assert set(divergence) == {"0-2", "0-3"}
    assert all(after <= before for before, after in divergence.values())


@pytest.mark.parametrize("method", ["none", "adapter"])
def test_without_bridges_there_is_nothing_to_train(method) -> None:
    with pytest.raises(ValueError, match=f"the method '{method}' makes none"):
        AdaptSection(method=method, exit_steps=5)


def test_a_rehearsal_counts_the_training_by_exits_and_steps(fitted, monkeypatch) -> None:
    model, texts, _ = fitted
    menu = PlanMenu((EXIT, GAP, LayerPlan.full(N_LAYERS)), (0.2, 0.7, 1.0), 1)
    monkeypatch.setattr(rehearsal, "timed", lambda work: float(work.args[-1]))  # a second a step
    assert exit_seconds(model, texts, menu, AdaptSection(exit_steps=300)) == pytest.approx(300)
    assert exit_seconds(model, texts, menu, AdaptSection()) == 0
