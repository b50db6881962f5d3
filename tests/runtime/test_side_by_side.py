"""`layerbudget compare`, and `--stop` of both commands that answer."""

import json
import re
from dataclasses import replace

import pytest
from command import layerbudget, ran, refused
from tiny import padded_batch, tiny_tokenizer
from tiny_allocator import make_allocator

from backbone.loading import load_backbone
from backbone.plan import LayerPlan
from oracle.decoding import Decoding
from runtime import side_by_side
from runtime.side_by_side import ENTRIES, compare_file, summary

LINE = {**dict.fromkeys(["id", *ENTRIES], ""), "full_ms": 10.0, "allocated_ms": 5.0, "layers": 4.0}


@pytest.fixture(scope="module")
def saved(model_folder, tmp_path_factory):
    """A saved allocator of the saved tiny model."""
    model, _ = load_backbone(str(model_folder))
    folder = tmp_path_factory.mktemp("allocator")
    allocator = replace(make_allocator(model), decoding=Decoding(4), model_source=str(model_folder))
    allocator.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    ids = [row[mask.bool()] for row, mask in zip(*padded_batch().values(), strict=True)]
    rows = [{"id": f"p{i}", "prompt": tiny_tokenizer().decode(row)} for i, row in enumerate(ids)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_answers_stand_side_by_side(saved, prompts, model_folder, tmp_path) -> None:
    out, command = tmp_path / "out.jsonl", ("compare", "--allocator", saved, "--prompts", prompts)
    assert "4 prompts: " in ran(*command, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.keys() for line in lines] == [ENTRIES.keys() | {"id", "prompt"}] * 4
    model, tokenizer = load_backbone(str(model_folder))
    for line in lines:
        inputs = tokenizer([line["prompt"]], return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert line["full"] == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert LayerPlan.parse(line["plan"], 6).layers == line["layers"]
        assert line["full"] == line["allocated"] or line["layers"] < 6
        assert min(line["full_ms"], line["allocated_ms"]) > 0
    assert len({line["plan"] for line in lines}) > 1
    assert not out.with_name("out.jsonl.partial").exists()
    assert "exists already" in refused(*command, "--out", out)
    shown = ran(*command)
    assert "full model" in shown
    assert all(f"{line['layers']:g} layers" in shown for line in lines)


def test_a_comparison_that_was_stopped_goes_on(model, prompts, tmp_path, monkeypatch) -> None:
    allocator, out, asked = replace(make_allocator(model), decoding=Decoding(2)), tmp_path / "out.jsonl", []

    def stopping(allocator, model, tokenizer, text, first):
        asked.append(text)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {name: value for name, value in LINE.items() if name != "id"}

    monkeypatch.setattr(side_by_side, "_compared", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare_file(allocator, model, tiny_tokenizer(), prompts, out)
    assert not out.exists()
    assert len(compare_file(allocator, model, tiny_tokenizer(), prompts, out)) == 4
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert asked == [texts[i] for i in (0, 0, 1, 2, 2, 2, 3)], "the first of each time warms up"


def test_the_summary_says_layers_and_times() -> None:
    said = summary([{**LINE, "full": "a", "layers": 6.0}, LINE], 6, 0.81)
    assert said.startswith(
        "2 prompts: 1 answers are the full model's, 5.00 of 6 layers on average (81.0% of the decoder), "
        "5 ms a prompt instead"
    )
    assert said.endswith("2.00x)")


def test_stop_strings_end_answers(saved, prompts, tmp_path) -> None:
    def answers(*options: object) -> list[str]:
        out = tmp_path / f"{len(options)}.jsonl"
        done = layerbudget("generate", "--allocator", saved, "--prompts", prompts, "--out", out, *options)
        assert done.returncode == 0, done.stderr
        said = done.stderr.splitlines()[-1]
        assert re.fullmatch(r"\d+ prompts: \d\.\d\d of 6 layers on average, [\d.]+% of the decoder, [\d.]+ s", said)
        return [json.loads(line)["answer"] for line in out.read_text().splitlines()]

    whole = answers()
    letter = next(text for text in whole if len(text) > 1)[1]
    assert answers("--stop", letter) == [text.split(letter)[0].strip() for text in whole]
    assert answers("--stop", letter, "--stop", whole[0][0])[0] == ""
    bad = layerbudget("generate", "--allocator", saved, "abc", "--stop", "")
    assert bad.returncode == 2
    assert "not empty" in bad.stderr
