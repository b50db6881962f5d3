import csv
import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from oracle.chat import Question
from oracle.prompt_sources import EXAMPLES, FOLDER, embedded_prompts
from oracle.prompts import Prompt, PromptError, load_prompts, questions_of

GOOD = {"id": "a", "task": "t", "prompt": "1 + 1 =", "reference": "2", "judge": "number"}
TURNS = [{"role": "system", "content": "be short"}, {"role": "user", "content": "so?"}]
LONG = '«ja», "nein"; or\nno\tmore | ' + "x" * 200_000
ROWS = [
    {"key": 7, "kind": "sum", "q": "2+2=", "a": "4", "by": "number", "of": 1},
    {"key": "7b", "q": LONG, "a": "ja", "raw": True},
    {"kind": "chat", "messages": TURNS, "a": "no", "of": "1"},
    {"q": "\u2028a\x85b", "a": "b", "by": "agreement"},
    {"q": "c", "by": "agreement"},
]
COLUMNS = {"id": "key", "task": "kind", "group": "of", "prompt": "q", "reference": "a", "judge": "by"}
BOTH = {**COLUMNS, "messages": "messages"}
WANTED = [
    Prompt("7", "sum", "2+2=", "4", "number", group="1"),
    Prompt("7b", "five", LONG, "ja", "exact", raw=True),
    Prompt("five-3", "chat", "", "no", "exact", Question.of(TURNS).messages, group="1"),
    Prompt("five-4", "five", "\u2028a\x85b", "b", "agreement"),
    Prompt("five-5", "five", "c", "", "agreement"),
]


def lines(rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def table(rows, delimiter) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, [*COLUMNS.values(), "messages", "raw"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({**row, "messages": json.dumps(row["messages"]) if "messages" in row else ""} for row in rows)
    return file.getvalue()


FILES = {
    "five.jsonl": lines(ROWS),
    "five.ndjson": lines(ROWS).replace("\n", "\r\n"),
    "five.json": json.dumps(ROWS),
    "five.csv": table(ROWS, ","),
    "five.CSV": table(ROWS, ";"),
    "five.tsv": table(ROWS, "\t"),
}


def written(folder: Path, name: str, rows: list | str) -> str:
    """Path of a file, or of a data set where the name has no ending, with these rows or this text."""
    path = folder / name
    if not path.suffix:
        path.mkdir()
        Dataset.from_list(rows).to_parquet(str(path / "data.parquet"))
    elif isinstance(rows, str):
        path.write_text(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines(rows))
    return str(path)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_prompts(tmp_path, monkeypatch, name, ending) -> None:
    content = b"\xef\xbb\xbf" + FILES[name].encode()
    (tmp_path / (name + ending)).write_bytes(gzip.compress(content) if ending else content)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(tmp_path / (name + ending)), "~/" + name + ending):
        assert load_prompts(source, columns=BOTH, judge="exact") == WANTED


def test_a_data_set_gives_the_same_prompts(tmp_path, monkeypatch) -> None:
    rows = [{**dict.fromkeys([*BOTH.values(), "raw"]), **row} for row in ROWS]
    rows = [{**row, "key": row["key"] and str(row["key"]), "of": row["of"] and 1} for row in rows]  # a column, a type
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (written(tmp_path, "five", rows), "~/five"):
        assert load_prompts(source, columns=BOTH, judge="exact") == WANTED


@pytest.mark.parametrize(("name", "four"), [("p.jsonl", 4.0), ("p.json", 4.0), ("set", "4.0")])
def test_references_are_one_or_several_right_answers(tmp_path, name, four) -> None:
    rows = [{**GOOD, "reference": ["4", "four", four]}, {**GOOD, "id": "b", "reference": ["5"]}]
    first, second = load_prompts(written(tmp_path, name, rows), force_judge="exact")
    assert (first.reference, first.references, second.references) == ("4", ("4", "four", "4.0"), ("5",))
    assert first.hash != second.hash != Prompt("x", "t", GOOD["prompt"], "4", "exact").hash


def csv_of(*fields: str) -> str:
    return "id,prompt,reference,raw,messages\n" + "\n".join(fields) + "\n"


def one(**fields) -> list[dict]:
    return [GOOD, {**GOOD, "id": "b", **fields}]


REFUSED = [
    ("p.jsonl", [GOOD, "{oops"], "p.jsonl, line 2: not JSON"),
    ("p.jsonl", [GOOD, "[1]"], "line 2: expected an object, got list"),
    ("p.jsonl", [GOOD, ""], "line 2: not JSON"),
    ("p.jsonl", [GOOD, '{"id": NaN}'], "line 2: not JSON (it holds NaN"),
    ("p.jsonl", [], "p.jsonl holds no prompts"),
    ("p.jsonl", one(prompt="  "), "line 2: the prompt is empty"),
    ("p.jsonl", one(id="a"), "line 2: the id 'a' was used before, at line 1; ids must differ"),
    ("p.jsonl", [{**GOOD, "id": 1}, {**GOOD, "id": "1"}], "line 2: the id '1' was used before, at line 1"),
    ("p.jsonl", [{**GOOD, "id": "p-2"}, {**GOOD, "id": None}], "line 2: the id 'p-2' was used before, at line 1"),
    ("p.jsonl", one(id=True), "line 2: the field 'id' should be a text or a number, got True"),
    (
        "p.jsonl",
        one(task="t" * 201),
        "line 2: the task 'ttttttttttttttttttttttttttttttttttttttt has 201 characters; at most 200 are right",
    ),
    ("p.jsonl", one(group=[1]), "line 2: the field 'group' should be a text or a number, got [1]"),
    ("p.jsonl", one(reference={"a": 1}), "line 2: the field 'reference' should be a text or a number, got {'a': 1}"),
    ("p.jsonl", one(reference=["1", None]), "line 2: the list of references holds null"),
    ("p.jsonl", one(reference=[]), "line 2: the reference is missing, and the judge 'number' needs one"),
    ("p.jsonl", one(reference=["1", "no"]), "line 2: the reference 'no' holds no number; the judge 'number' needs one"),
    ("p.jsonl", one(reference=" ", judge="contains"), "line 2: the reference ' ' holds no letter or sign"),
    ("p.jsonl", one(reference="👍", judge="rouge_l"), "line 2: the reference '👍' holds no word"),
    ("p.jsonl", one(judge="exakt"), "line 2: unknown judge 'exakt'; did you mean 'exact'?"),
    ("p.jsonl", one(judge=3), "line 2: the judge should be a text, got 3"),
    ("p.jsonl", one(judge=None), "line 2: the judge is missing; name one in the field 'judge', or for"),
    ("p.jsonl", one(messages=TURNS), "line 2: prompt and messages are both given"),
    ("p.jsonl", [{"q": "a"}], "p.jsonl has no column 'prompt' or 'messages'; it has q: set data.columns"),
    ("p.json", '{"prompt": "1"}', "p.json should hold a list of objects"),
    ("p.json", '{"q": "1"}\n{"q": "2"}', "one object a line belong into a .jsonl file"),
    ("p.json", "[1]", "p.json, prompt 1: expected an object, got int"),
    ("p.json", "[]", "p.json holds no prompts"),
    ("p.csv", "prompt,a\n1,2,3\n", "p.csv, line 2: 3 values for 2 columns"),
    ("p.csv", 'prompt,a\n"1,2\n', "p.csv, line 2: not CSV"),
    ("p.csv", "prompt,prompt\n1,2\n", "p.csv: two columns have one name, 'prompt'"),
    ("p.csv", "", "p.csv holds no prompts"),
    ("p.csv", "prompt\n", "p.csv holds no prompts"),
    ("p.csv", "q;a\n1;2\n", "p.csv has no column 'prompt' or 'messages'; it has q, a: set data.columns"),
    ("p.csv", csv_of("a,b,1,maybe,"), "p.csv, line 2: raw should be true or false, got 'maybe'"),
    ("p.csv", csv_of("a,b,1,,[{]"), "p.csv, line 2: messages should be a list of turns, got '[{]', which is not JSON"),
    ("p.csv", csv_of("a,,1,,"), "p.csv, line 2: the prompt is empty"),
    ("p.tsv", "prompt\ta\n1\t2\t3\n", "p.tsv, line 2: 3 values for 2 columns"),
    ("p.csv", csv_of("a,b,,,"), "p.csv, line 2: the judge is missing"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_cannot_be_used_is_named_in_one_sentence(tmp_path, name, content, message) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(written(tmp_path, name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"id": "\xe9"}\n', "p.jsonl, line 2: the byte 0xe9 is not UTF-8"),
        ("p.csv", "prompt\na".encode("utf-16"), "p.csv, line 1: the byte 0xff is not UTF-8"),
        ("p.jsonl.gz", b"{}", "p.jsonl.gz cannot be unpacked"),
        ("p.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "p.jsonl.gz cannot be unpacked"),
        ("p.txt", b"abc", "it is neither a file that ends in .jsonl, .ndjson, .json, .csv, .tsv"),
        ("p.csv", None, "no prompts file"),
        ("nothing", None, "nor a data set"),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=re.escape(message)):
        load_prompts(str(tmp_path / name))


def test_all_problems_come_at_once_with_their_lines(tmp_path) -> None:
    rows = [GOOD, "{", {**GOOD, "judge": "no.such:judge"}, *({**GOOD, "id": i, "prompt": ""} for i in range(20))]
    with pytest.raises(PromptError) as caught:
        load_prompts(written(tmp_path, "p.jsonl", rows))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/p.jsonl has 22 problems: line 2: not JSON")
    assert [int(number) for number in re.findall(r"line (\d+):", said)] == list(range(2, 12))
    assert said.endswith("line 11: the prompt is empty; and 12 more")


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.json", "set"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, name) -> None:
    source = written(tmp_path, name, "q,x\na,b\n" if name == "p.csv" else [{"q": "a", "x": "b"}])
    with pytest.raises(PromptError, match=re.escape(f"{name} has no column 'y'; it has q, x: set data.columns")):
        load_prompts(source, columns={"prompt": "q", "reference": "y"}, judge="exact")


def test_judges_come_from_the_row_or_the_configuration(tmp_path) -> None:
    source = written(tmp_path, "p.jsonl", [{**GOOD, "judge": None}, {**GOOD, "id": "b"}])
    assert [prompt.judge for prompt in load_prompts(source, judge="contains")] == ["contains", "number"]
    source = written(tmp_path, "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "judge": "taste", "reference": ""}])
    for judge in ("agreement", "kl"):
        assert [(p.judge, p.reference) for p in load_prompts(source, force_judge=judge)] == [(judge, "")] * 2


def test_questions_of_a_file_need_no_judge_and_have_ids_of_one_kind(tmp_path) -> None:
    rows = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": None}, {"prompt": "c"}]
    source = Path(written(tmp_path, "p.txt", rows))  # `generate` has always read any name as JSONL
    assert questions_of(source) == [("1", Question("a")), ("p-2", Question("b")), ("p-3", Question("c"))]
    written(tmp_path, "p.txt", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}])
    with pytest.raises(PromptError, match="line 2: the id '1' was used before, at line 1"):
        questions_of(source)


def test_a_larger_limit_only_adds_prompts() -> None:
    small, large = load_prompts("embedded", limit=50), load_prompts("embedded", limit=120)
    assert len(small) == 50
    assert {p.id for p in small} < {p.id for p in large}
    assert len({p.task for p in large}) >= 12


def test_embedded_prompts_are_many_varied_and_unlike() -> None:
    rows = embedded_prompts()
    assert len(rows) >= 2500
    assert len({row["task"] for row in rows}) >= 12
    assert len({row["id"] for row in rows}) == len({row["prompt"].rpartition("\n\n")[2] for row in rows}) == len(rows)
    assert rows == embedded_prompts()
    assert not [row for row in rows if row["prompt"] != row["prompt"].rstrip() or not row["reference"].strip()]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.tsv")), ids=lambda path: path.stem)
def test_embedded_tables_show_every_answer_and_no_query(path) -> None:
    rows = [line.split("\t") for line in path.read_text().splitlines()[2:]]
    assert len({text.casefold() for text, _ in rows}) == len(rows)
    answers = Counter(answer for _, answer in rows)
    if len(answers) > 12:  # an extraction: the answer stands in the text
        assert not [row for row in rows if row[1] not in row[0]]
    else:
        assert max(answers.values()) <= 1.6 * min(answers.values())
    sets = {row["prompt"].rpartition("\n\n")[0] for row in embedded_prompts() if row["task"] == path.stem}
    assert sorted(text.count("\n\n") for text in sets) == list(EXAMPLES)
