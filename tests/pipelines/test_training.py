"""`layerbudget.train`: an allocator for a model in memory."""

import random

import pytest
import torch
from datasets import Dataset
from tiny import padded_batch, tiny_model, tiny_tokenizer

from backbone.errors import InputError
from layerbudget import train

DRAW = random.Random(0)
PROMPTS = [
    {"id": number, "prompt": "".join(DRAW.choices("abcdefgh", k=DRAW.randint(5, 20))), "reference": "ab"}
    for number in range(120)
]
SETTINGS = ("evaluation.speed_rounds=1", "evaluation.speed_prompts=2", "calibration.delta=0.3")
"""MLflow keeps the database of a URI open, so that each folder needs a URI of its own."""


def shares_letters(answer: str, reference: str, full_answer: str) -> float:
    """A judge that any answer wins something by."""
    return len({*answer} & {*full_answer}) / max(1, len({*answer} | {*full_answer}))


@pytest.fixture
def project(tmp_path, monkeypatch, give_store):
    give_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_makes_an_allocator_and_goes_on(project, capsys) -> None:
    model, tokenizer = tiny_model("llama", layer_scale=0.5).train(), tiny_tokenizer()
    tokenizer.padding_side = "right"
    options = {"judge": shares_letters, "keep": 0.7, "folder": "runs/mine"}
    options["settings"] = [*SETTINGS, f"tracking.uri=sqlite:///{project}/mlruns/mlflow.db"]
    allocator = train(model, tokenizer, PROMPTS, **options)
    assert allocator.certificate.keep == 0.7
    assert model.training
    assert tokenizer.padding_side == "right", "the caller's tokenizer is unchanged"
    assert (project / "runs/mine/report.html").is_file()
    with torch.no_grad():
        output = allocator.generate(model.eval(), **padded_batch(), max_new_tokens=3)
    assert output.shape == (4, 14)

    capsys.readouterr()
    again = train(model, tokenizer, Dataset.from_list(PROMPTS), **options)
    assert again.fingerprint == allocator.fingerprint
    assert capsys.readouterr().out.count("done before") == 9

    with pytest.raises(InputError, match="was made with the model"):
        train(tiny_model("llama", seed=1), tokenizer, PROMPTS[:100], **options)


REFUSED = {
    "rows": ({"prompts": ["abc"]}, "prompt 1 should be a dict with prompt or messages, got 'abc'"),
    "values": ({"prompts": [{"prompt": object()}]}, "prompt 1 holds what is neither text nor number"),
    "few": ({"prompts": PROMPTS[:9]}, "holds 9 prompts, and a run needs 64"),
    "lambda": ({"judge": lambda *texts: 1.0}, "is not found under its name in a module"),
    "judge": ({"judge": "exat"}, "unknown judge 'exat'; did you mean 'exact'"),
    "keep": ({"keep": 0.999}, "calibration.keep=0.999 at its 0.09 of delta takes"),
    "setting": ({"settings": ["tuning.trails=2"]}, "the nearest valid key is 'tuning.trials'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_train_refuses_in_one_sentence(name, project) -> None:
    changed, sentence = REFUSED[name]
    given = {"prompts": PROMPTS, "folder": "runs/mine", **changed}
    with pytest.raises(InputError) as caught:
        train(tiny_model("llama"), tiny_tokenizer(), **given)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
