"""What `init` decides, and from what."""

import json
from types import SimpleNamespace

import pytest
import yaml

from backbone.errors import InputError
from pipelines.config import checked_config
from pipelines.proposal import Decision, ProposalError, propose
from pipelines.trial import Pace, settings_for


class Model:
    """Stands for a model of some layers whose tokens are words."""

    source = "some/model"

    def __init__(self, n_layers: int = 18, template: bool = False, answer: str = "yes") -> None:
        self.n_layers, self._answer = n_layers, answer
        self.template = SimpleNamespace(render=lambda messages: messages[-1].content) if template else None

    def count(self, text: str) -> int:
        return len(text.split())

    def answers(self, texts) -> list[str]:
        return [self._answer] * len(texts)


LONG = "the weather in the north was cold and there was a lot of snow on most of the roads"
CASES = {
    "short references": (
        {"question": "is it so {}?", "answer": "yes"},
        Model(),
        {
            "data.columns": {"prompt": "question", "reference": "answer"},
            "data.judge": "exact",
            "data.chat_template": "never",
            "decoding.max_new_tokens": 3,
            "decoding.stop": ["\n"],
            "menu.method": "heads",
            "menu.probe_depth": 3,
            "adapt.method": "heads",
            "adapt.targets": "references",
            "adapt.prompts": 128,
            "calibration.keep": 0.97,
        },
    ),
    "numbers": ({"Prompt": "count {}", "target": "4,200"}, Model(), {"data.judge": "number", "adapt.method": "heads"}),
    "numbers in a conversation": (
        {"prompt": "count {}", "reference": "42"},
        Model(template=True, answer=LONG),
        {"data.judge": "number", "data.chat_template": "auto", "decoding.stop": [], "menu.method": "covering"},
    ),
    "long references": (
        {"prompt": "tell {}", "reference": LONG},
        Model(28),
        {
            "data.judge": "rouge_l",
            "menu.method": "covering",
            "menu.probe_depth": 7,
            "adapt.method": "bridges",
            "decoding.max_new_tokens": 30,
        },
    ),
    "many long ones": ({"prompt": "t {}", "reference": LONG, "n": 2400}, Model(), {"adapt.method": "both"}),
    "none": (
        {"prompt": "tell {}"},
        Model(answer=f"two words\n{LONG}"),
        {
            "data.judge": "agreement",
            "menu.method": "heads",
            "menu.probe_depth": 3,
            "adapt.targets": "own",
            "decoding.max_new_tokens": 5,
        },
    ),
    "judges in the file": (
        {"prompt": "tell {}", "reference": "a", "judge": "contains"},
        Model(),
        {"data.judge": None, "adapt.targets": "references"},
    ),
    "worked examples": (
        {"prompt": "Text: a\nKind: b\n\nText: {}\nKind:", "reference": "b"},
        Model(template=True),
        {"data.chat_template": "never", "decoding.stop": ["\n\n", "\n"]},
    ),
    "several lines": ({"prompt": "tell {}", "reference": "a\nb"}, Model(), {"decoding.stop": []}),
    "few prompts": ({"prompt": "tell {}", "reference": "a", "n": 64}, Model(), {"calibration.keep": 0.8}),
    "few layers": (
        {"prompt": "tell {}", "reference": "a"},
        Model(2),
        {"menu.method": "heads", "menu.probe_depth": 1},
    ),
}


@pytest.fixture
def proposed(tmp_path):
    def make(row: dict, model: Model, **options):
        path, row = tmp_path / "my prompts.jsonl", dict(row)
        count = row.pop("n", 400)
        rows = [{key: value.replace("{}", str(n)) for key, value in row.items()} for n in range(count)]
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return propose(model, str(path), **options)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("name", CASES)
def test_decisions_follow_prompts_and_model(name, proposed) -> None:
    row, model, wanted = CASES[name]
    found = proposed(row, model)
    decided = {decision.key: decision.value for decision in found.decisions}
    assert {key: decided.get(key) for key in wanted} == wanted
    assert decided["name"] == "my-prompts"
    assert all(decision.why for decision in found.decisions)
    text = found.yaml("layerbudget run x.yaml")
    assert yaml.safe_load(text) == found.values
    checked_config(found.values)
    assert 15 <= len(found.decisions) <= 22


def test_what_is_asked_for_is_taken(proposed) -> None:
    found = proposed({"q": "tell {}", "a": "1"}, Model(), columns={"prompt": "q"}, judge="kl", keep=0.9, name="mine")
    decided = {decision.key: decision.value for decision in found.decisions}
    assert (decided["name"], decided["data.judge"], decided["calibration.keep"]) == ("mine", "kl", 0.9)
    with pytest.raises(ProposalError, match="names the field 'question'; the fields are id, task"):
        proposed({"q": "{}"}, Model(), columns={"question": "q"})


def test_the_embedded_prompts_can_be_proposed() -> None:
    decided = {decision.key: decision.value for decision in propose(Model(), "embedded").decisions}
    assert (decided["data.path"], decided["adapt.targets"]) == ("embedded", "references")
    assert "data.judge" not in decided or decided["data.judge"] is None


@pytest.mark.parametrize("value", ["yes", "a: b", "x.jsonl", "package:name", "", "né", ["\n\n", "a'b\""], 0.97, None])
def test_values_are_read_back(value) -> None:
    text = Decision("data.path", value, "why").text
    assert "\n" not in text
    assert yaml.safe_load(f"key: {text}  # why") == {"key": value}


PACES = {
    "fast": (
        Pace(0.6, 0.4),
        10,
        3000,
        {"data.limit=874", "calibration.keep=[0.97, 0.9]", "evaluation.speed_prompts=2"},
    ),
    "all": (
        Pace(0.01, 0.01),
        10,
        900,
        {"data.limit=900", "calibration.keep=[0.97, 0.9]", "evaluation.speed_prompts=8"},
    ),
    "slow": (Pace(2.0, 1.2), 12, 3000, {"calibration.keep=[0.6, 0.97]", "tuning.trials=4"}),
}


@pytest.mark.parametrize("name", PACES)
def test_trial_takes_as_many_prompts_as_fit(name, proposed) -> None:
    config = checked_config(proposed({"prompt": "tell {}", "reference": "a", "n": 3000}, Model()).values)
    pace, minutes, prompts, wanted = PACES[name]
    found = settings_for(config, pace, minutes, prompts)
    assert wanted <= {*found}, found
    assert not any(setting.startswith("menu") for setting in found)
    with pytest.raises(InputError, match=r"prompts fit into 1 minutes .* give --minutes \d+"):
        settings_for(config, pace, 1, prompts)


def test_trial_of_long_answers_searches_no_plans(proposed) -> None:
    config = checked_config(proposed({"prompt": "tell {}", "reference": LONG, "n": 3000}, Model()).values)
    found = settings_for(config, Pace(0.6, 0.4), 30, 3000)
    assert {"menu.method=gaps", "adapt.method=bridges"} <= {*found}
