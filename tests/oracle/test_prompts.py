import csv
import json
import re

import pytest
from datasets import Dataset

from oracle.embedded_prompts import embedded_prompts
from oracle.prompts import PromptError, load_prompts, split_of

GOOD = {"id": "a", "task": "t", "prompt": "1 + 1 =", "reference": "2", "judge": "number"}
SHARES = {"adapt": 0.15, "train": 0.3, "tune": 0.1, "calibrate": 0.25, "test": 0.2}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{oops"], r"line 2: not JSON"),
        ([GOOD, "[1]"], r"line 2: expected an object, got list"),
        ([GOOD, {**GOOD, "id": "b", "prompt": "  "}], r"line 2: the prompt is empty"),
        ([GOOD, GOOD], r"line 2: the id 'a' was used before, at .*line 1"),
        ([{**GOOD, "judge": "exakt"}], r"line 1: unknown judge 'exakt'; did you mean 'exact'\?"),
        ([{k: v for k, v in GOOD.items() if k != "reference"}], r"line 1: the field 'reference' is missing"),
        ([], "there are no prompts"),
        (['{"id": "a", "prompt": "\\ud800"}'], r"line 1: not JSON \(it holds half a character"),
        ([GOOD, "[" * 100_000], r"line 2: not JSON \(its values are nested too deeply\)"),
        ([GOOD, '{"id": NaN}'], r"line 2: not JSON \(it holds NaN"),
        ([GOOD, '{"id": "b", "id": "c"}'], r"line 2: not JSON \(the key 'id' comes twice\)"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, message) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(write(tmp_path / "prompts.jsonl", rows))


def test_only_a_newline_ends_a_line(tmp_path) -> None:
    text = "one\u2028two\x85three\u2029four"
    rows = [{**GOOD, "prompt": text}, {**GOOD, "id": "b"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [prompt.prompt for prompt in load_prompts(str(path))] == [text, GOOD["prompt"]]


def test_a_byte_that_is_no_text_is_named_with_its_line(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xe9"}\n')
    with pytest.raises(PromptError, match="line 2: the byte 0xe9 is not UTF-8"):
        load_prompts(str(path))


def test_a_table_with_gaps_is_refused(tmp_path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,reference,judge\na,b,exact\n,b,exact\n")
    with pytest.raises(PromptError, match="row 1: the prompt is missing"):
        load_prompts(str(tmp_path))


def test_missing_sources_are_named(tmp_path) -> None:
    with pytest.raises(PromptError, match="no prompts file"):
        load_prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(PromptError, match=r"neither a .jsonl file nor a data set"):
        load_prompts(str(tmp_path / "nothing"))


def test_a_default_judge_fills_in(tmp_path) -> None:
    row = {k: v for k, v in GOOD.items() if k != "judge"}
    (prompt,) = load_prompts(write(tmp_path / "prompts.jsonl", [row]), judge="contains")
    assert prompt.judge == "contains"


def test_a_data_set_with_other_column_names(tmp_path) -> None:
    folder = tmp_path / "questions"
    folder.mkdir()
    Dataset.from_dict({"question": ["1+1", "2+2"], "answer": ["2", "4"]}).to_parquet(str(folder / "data.parquet"))
    prompts = load_prompts(str(folder), columns={"prompt": "question", "reference": "answer"}, judge="number")
    assert [(p.id, p.prompt, p.reference, p.judge) for p in prompts] == [
        ("train-0", "1+1", "2", "number"),
        ("train-1", "2+2", "4", "number"),
    ]
    with pytest.raises(PromptError, match="has no column 'prompt' or 'messages'; it has question, answer"):
        load_prompts(str(folder), judge="number")


def test_a_larger_limit_only_adds_prompts() -> None:
    small, large = load_prompts("embedded", limit=50), load_prompts("embedded", limit=120)
    assert len(small) == 50
    assert {p.id for p in small} < {p.id for p in large}
    assert len({p.task for p in large}) == 12


def test_splits_are_stable_and_near_their_shares() -> None:
    prompts = load_prompts("embedded")
    counts = {split: sum(split_of(p, SHARES) == split for p in prompts) / len(prompts) for split in SHARES}
    assert all(abs(counts[split] - share) < 0.04 for split, share in SHARES.items())
    kept = load_prompts("embedded", limit=100)
    assert {p.id: split_of(p, SHARES) for p in kept}.items() <= {p.id: split_of(p, SHARES) for p in prompts}.items()


def test_embedded_prompts_are_many_varied_and_unlike() -> None:
    rows = embedded_prompts()
    assert len(rows) >= 960
    assert len({row["task"] for row in rows}) >= 8
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    assert rows == embedded_prompts()
    assert not [row for row in rows if row["prompt"] != row["prompt"].rstrip() or not row["reference"].strip()]


TABLE = [{"q": "2+2=", "a": 4, "kind": "sum"}, {"q": 'Say «ja», "nein"\nand no more', "a": "ja", "kind": "word"}]
COLUMNS = {"prompt": "q", "reference": "a", "task": "kind"}


def test_a_single_csv_or_json_file_is_a_source(tmp_path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(TABLE))
    with (tmp_path / "mine.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["q", "a", "kind"])
        writer.writeheader()
        writer.writerows(TABLE)
    for name in ("mine.json", "mine.csv"):
        found = load_prompts(str(tmp_path / name), columns=COLUMNS, judge="exact")
        assert [prompt.prompt for prompt in found] == [row["q"] for row in TABLE]
        assert [(p.id, p.reference, p.task) for p in found] == [("mine-1", "4", "sum"), ("mine-2", "ja", "word")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "q,a\n1,2,3\n", "line 2: 3 values for 2 columns"),
        ("x.csv", 'q,a\n"1,2\n', "not CSV"),
        ("x.csv", "q,q\n1,2\n", "two columns have one name, 'q'"),
        ("x.csv", "", "has no column"),
        ("x.csv", "a,b\n1,2\n", "has no column 'q'; it has a, b: set data.columns"),
        ("x.json", '{"q": "1"}', "should hold a list of objects"),
        ("x.json", '{"q": "1"}\n{"q": "2"}', "one object a line belong into a .jsonl file"),
        ("x.json", "[1]", "should hold a list of objects"),
        ("x.json", '[{"q": null}]', "x.json, prompt 1: the field 'reference' is missing"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=re.escape(message)):
        load_prompts(str(tmp_path / name), columns={"prompt": "q", "reference": "q"}, judge="exact")
    with pytest.raises(PromptError, match="no prompts file"):
        load_prompts(str(tmp_path / "missing") + name[1:], judge="exact")
