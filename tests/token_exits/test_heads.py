"""Exit heads: what they say is what the model would say; fitted and trained they say more of it."""

import pytest
import torch
from exit_observation import agreements, confidences, observe, train_bridges
from tiny import N_LAYERS, OPTIONS, UNDECLARED, padded_batch, tiny_model

from backbone.execution.live_changes import captured
from backbone.families import decoder_layers, final_norm
from backbone.healing.training_targets import Example
from token_exits.gates import Oracle, Saturation
from token_exits.heads import ExitHeads, TokenExitsError, fit_exit_bridges, shortlist_of

DEPTHS = (2, 4)


@pytest.fixture(scope="module")
def answered():
    """A model, and texts with its own answers of 12 tokens."""
    model = tiny_model("llama", layer_scale=0.6)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(3, 97, (24, 6), generator=generator)
    with torch.no_grad():
        texts = model.generate(input_ids=prompts, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return model, [Example(tuple(row), 12) for row in texts.tolist()]


BEHIND_THE_HEAD = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere2": {"logit_scale": 0.3},
}


@pytest.mark.parametrize("family", [*OPTIONS, *UNDECLARED])
def test_logits_at_full_depth_are_the_model_s(family: str) -> None:
    model, shortlist = tiny_model(family, **BEHIND_THE_HEAD.get(family, {})), torch.tensor([5, 96, 3])
    batch = padded_batch()
    with torch.no_grad(), captured(decoder_layers(model), [N_LAYERS]) as states:
        expected = model(**batch).logits[:, -1]
    for tokens, heads in ((slice(None), ExitHeads(model)), (shortlist, ExitHeads(model, {}, shortlist))):
        found = heads.logits(states[N_LAYERS][:, -1])
        torch.testing.assert_close(found, expected[:, tokens])
        assert torch.equal(heads.predictions(states[N_LAYERS][:, -1]), expected.argmax(-1))


def test_model_that_ends_otherwise_is_refused() -> None:
    unnormed = tiny_model("opt", do_layer_norm_before=False)
    assert final_norm(unnormed) is None
    ExitHeads(unnormed)
    projected = tiny_model("opt", word_embed_proj_dim=16)
    with pytest.raises(TokenExitsError, match="opt: its head does not take what its final norm gives"):
        ExitHeads(projected)
    odd = tiny_model("llama")
    odd.lm_head.register_forward_hook(lambda head, states, logits: logits * 1.5)
    with pytest.raises(TokenExitsError, match=r"llama: final norm and head differ by 33\.3% from the model's own"):
        ExitHeads(odd)


def test_shortlist_is_the_commonest_tokens() -> None:
    assert shortlist_of([[7, 7, 5], [5, 7, 9, 4]], 3).tolist() == [7, 5, 4]
    assert shortlist_of([[1]], 10).tolist() == [1]


def test_observed_tokens_are_those_of_decoding(answered) -> None:
    model, examples = answered
    observed = observe(model, examples[:3], DEPTHS)
    assert observed.place.tolist() == [*range(1, 12)] * 3
    assert observed.text.tolist() == [i for i in range(3) for _ in range(11)]
    assert observed.following.tolist() == [token for example in examples[:3] for token in example.tokens[-11:]]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([examples[1].tokens]), output_hidden_states=True)
    for depth in (1, 2, 3, 4):
        torch.testing.assert_close(observed.states[depth][11:22], output.hidden_states[depth][0, -12:-1])
    assert agreements(ExitHeads(model), observed, [N_LAYERS]).float().mean() > 0.95  # eos is forbidden in answers


def test_bridges_agree_more_often_than_the_bare_head(answered) -> None:
    model, examples = answered
    observed = observe(model, examples, DEPTHS)
    bridges = fit_exit_bridges(model, [example.tokens[:-1] for example in examples], DEPTHS)
    frozen, bridged = (agreements(ExitHeads(model, own), observed, DEPTHS).float().mean() for own in ({}, bridges))
    assert bridged > frozen


def test_training_never_makes_bridges_worse(answered) -> None:
    model, examples = answered
    observed = observe(model, examples, DEPTHS)
    bridges = fit_exit_bridges(model, [example.tokens[:-1] for example in examples], DEPTHS)
    heads = ExitHeads(model, bridges, torch.arange(97))
    before = {depth: bridge.factors[0].clone() for depth, bridge in heads.bridges.items()}
    trained, losses = train_bridges(heads, observed, steps=60, learning_rate=1e-3)
    assert all(after <= first for first, after in losses.values())
    assert any(after < first for first, after in losses.values())
    assert all(torch.equal(before[depth], bridge.factors[0]) for depth, bridge in heads.bridges.items())
    assert set(trained) == set(DEPTHS)


def test_confidences_in_parts_are_those_of_all(answered, monkeypatch) -> None:
    model, examples = answered
    observed, heads = observe(model, examples[:4], DEPTHS), ExitHeads(model)
    whole = confidences(Saturation(), heads, observed, DEPTHS)
    monkeypatch.setattr("exit_observation.BATCH", 1)
    assert torch.equal(confidences(Saturation(), heads, observed, DEPTHS), whole)
    oracle = confidences(Oracle(), heads, observed, DEPTHS)
    assert torch.equal(oracle.bool(), agreements(heads, observed, DEPTHS))
