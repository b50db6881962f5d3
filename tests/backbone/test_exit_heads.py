"""Exit heads on models whose right head is known."""

from dataclasses import replace

import pytest
import torch
from tiny import OPTIONS, VOCABULARY, tiny_model

from backbone.execution.output_head import head_on, output_logits
from backbone.healing import exit_heads
from backbone.healing.exit_heads import HeadFitter, HeadSettings
from backbone.healing.exit_places import read_places
from backbone.healing.training_targets import Example


def examples_of(count: int, from_reference: bool = True, seed: int = 0) -> list[Example]:
    """Prompts of random tokens, each answered by its last token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 20, (count, 6), generator=generator).tolist()
    return [Example((*prompt, prompt[-1]), 1, from_reference) for prompt in prompts]


@pytest.mark.parametrize("family", sorted(OPTIONS))
def test_output_logits_are_the_models_own(family) -> None:
    model, ids = tiny_model(family), torch.randint(3, VOCABULARY, (5, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        places = read_places(model, [Example((*row, 2), 1) for row in ids.tolist()], [2])
        last = places.states[6][places.is_answer]
        torch.testing.assert_close(output_logits(model, last), expected, atol=1e-4, rtol=1e-3)
        some = torch.tensor([3, 5, 90])
        with head_on(model, some):
            torch.testing.assert_close(output_logits(model, last), expected[:, some], atol=1e-4, rtol=1e-3)


def test_places_are_those_that_predict_the_answer(model) -> None:
    examples = examples_of(7)
    places = read_places(model, examples, [3])
    assert places.following[places.is_answer].tolist() == [t for e in examples for t in e.tokens[-1:]]
    assert places.is_target.equal(places.is_answer)
    assert places.text.unique().tolist() == list(range(7))
    assert sorted(places.states) == [3, 6]
    own = read_places(model, examples_of(7, from_reference=False), [3])
    assert not own.is_target.any()


def test_a_head_learns_references_that_the_model_does_not_say(model) -> None:
    """The answer is the prompt's last token, which the random model does not say."""
    places = read_places(model, examples_of(400), [1, 5])
    fitter = HeadFitter(model, places, HeadSettings(learning_rate=1e-2))
    told, own = (fitter.fit([1], references)[1] for references in (0.7, 0.0))
    assert told.right > 0.9 > own.right + 0.3
    assert told.loss[1] < told.loss[0]


def test_a_head_on_the_models_own_distribution_brings_an_exit_nearer(model) -> None:
    places = read_places(model, examples_of(300, from_reference=False), [2, 5])
    fits = HeadFitter(model, places, HeadSettings(steps=60)).fit([2, 5], 0.0)
    assert 0 <= fits[5].loss[1] <= fits[5].loss[0]
    assert fits[5].loss[1] < fits[2].loss[1], "a later exit knows more"


def test_answers_that_no_fitted_text_has_are_said(model) -> None:
    """Held-out texts, every eighth, have the larger half of the answers, as names are that occur once."""
    prompts = [example.tokens[:-1] for example in examples_of(600)]
    with torch.no_grad():
        said = model(input_ids=torch.tensor(prompts)).logits[:, -1].argmax(-1).tolist()
    ordered = sorted(zip(said, prompts, strict=True))
    common, rare = ordered[:140], [one for one in ordered if one[0] > ordered[139][0]][:20]
    for place, one in enumerate(rare):
        common.insert(8 * place, one)
    examples = [Example((*prompt, answer), 1) for answer, prompt in common]
    fitter = HeadFitter(model, read_places(model, examples, [6]), HeadSettings(steps=20, vocabulary=1))
    assert fitter.fit([6], 0.0)[6].right > 0.7, "the full depth says its own answers"


def test_tokens_that_no_text_has_do_not_drown_the_answers(monkeypatch) -> None:
    """Each answer's token has a twin, a row of the output head like its own; unseen, twins win half of the answers."""
    monkeypatch.setattr(exit_heads, "DRAWN", 0)
    model = tiny_model("llama")
    rows = model.get_output_embeddings().weight.data
    noise = torch.randn(17, rows.shape[1], generator=torch.Generator().manual_seed(0))
    rows[60:77] = rows[3:20] + 0.8 * rows[3:20].std() * noise
    places = read_places(model, examples_of(400), [1])
    assert HeadFitter(model, places, HeadSettings(learning_rate=1e-2, vocabulary=1)).fit([1], 0.7)[1].right > 0.9


def test_a_head_learns_as_well_where_few_dimensions_are_large(model) -> None:
    places = read_places(model, examples_of(400), [1])
    sizes = torch.ones(places.states[1].shape[1])
    sizes[:2] = 1000.0
    large = replace(places, states={**places.states, 1: places.states[1] * sizes})
    small, scaled = (
        HeadFitter(model, given, HeadSettings(learning_rate=1e-2)).fit([1], 0.7)[1] for given in (places, large)
    )
    assert small.right > 0.9
    assert scaled.said == small.said


def test_heads_of_all_depths_are_those_fitted_alone(model) -> None:
    fitter = HeadFitter(model, read_places(model, examples_of(200), [1, 2, 5]), HeadSettings(steps=40))
    done: list[int] = []
    together = fitter.fit([1, 2, 5], 0.7, done.append)
    for depth in (1, 5):
        alone = fitter.fit([depth], 0.7)[depth]
        torch.testing.assert_close(together[depth].head.factors[0], alone.head.factors[0], atol=1e-3, rtol=1e-3)
        assert together[depth].said == alone.said
    assert sum(done) == 3
    assert set(together[1].said) == set(range(0, 200, 8))


def test_heads_of_a_model_in_half_precision_are_fitted() -> None:
    model = tiny_model("llama").bfloat16()
    places = read_places(model, examples_of(80), [2])
    assert places.states[2].dtype == torch.float32
    fit = HeadFitter(model, places, HeadSettings(steps=20)).fit([2], 0.7)[2]
    assert fit.loss[1] <= fit.loss[0]
    assert fit.head.bias.dtype == torch.float32
