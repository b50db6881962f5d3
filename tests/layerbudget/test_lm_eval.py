"""lm-evaluation-harness: its tasks as prompts of a run, and an allocator as its model. Needs the extra `lm-eval`."""

import json
import re
import tomllib
from collections import Counter
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from command import layerbudget, refused
from tiny_allocator import make_allocator

from backbone.loading import load_backbone
from oracle import lm_eval_tasks
from oracle.prompts import PromptError, load_prompts
from pipelines.config import load_config
from runtime.generate_arguments import UncertifiedDecodingWarning

harness = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed: pip install 'layerbudget[lm-eval]'")

ROOT = Path(__file__).parents[2]
TRAIN, TEST = ([{"q": f"{word} {number}", "a": number % 3} for number in range(64)] for word in ("old", "new"))
CHOICES = ["abc", "de", "f g"]
GENERATED = {
    "dataset_path": "json",
    "training_split": "train",
    "test_split": "test",
    "description": "Say it.\n\n",
    "doc_to_text": "Q: {{q}}\nA:",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n", "Q:"], "max_gen_toks": 7},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_target": "a",
    "doc_to_choice": CHOICES,
    "generation_kwargs": None,
    "metric_list": [{"metric": "acc"}],
}


def numbers(pattern: str) -> list:
    return [{"name": "x", "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """`datasets` keeps what it reads; not in the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def task(tmp_path):
    """Writes a task with its data, and gives its name as `data.path` takes it; arguments replace its keys."""

    def write(name: str = "mine", count: int = 8, **keys: object) -> str:
        files = {}
        for split, rows in (("train", TRAIN), ("test", TEST)):
            files[split] = str(tmp_path / f"{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        settings = {**GENERATED, "task": name, "dataset_kwargs": {"data_files": files}, **keys}
        path = tmp_path / "tasks" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return f"lm_eval:{path}"

    return write


def test_task_gives_prompts_references_and_judge(task) -> None:
    read = load_prompts(task(), dataset_split="test")
    assert len(read) == 8
    assert (read[4].id, read[4].task, read[4].judge) == ("mine-test-4", "mine", "exact")
    assert (read[4].prompt, read[4].references) == ("Say it.\n\nQ: new 4\nA:", ("1",))
    assert load_prompts(task())[4].prompt == "Say it.\n\nQ: old 4\nA:", "data.split is train where nothing is said"


def test_task_asks_what_lm_eval_asks(task) -> None:
    """The prompts of the scored split, worked examples and all, are those that lm_eval gives a model."""
    from lm_eval.tasks import TaskManager

    source = task(num_fewshot=3, fewshot_split="train")
    theirs = TaskManager(include_defaults=False).load(source.removeprefix("lm_eval:"))["tasks"]["mine"]
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests()
    ours = [prompt.prompt for prompt in load_prompts(source, dataset_split="test")]
    assert ours == [request.args[0] for request in theirs.instances]


def test_no_prompt_shows_its_own_answer(task) -> None:
    """lm_eval leaves a document out of its own worked examples in the test split alone."""
    for keys in ({"fewshot_split": "train"}, {}):
        for prompt in load_prompts(task(num_fewshot=6, **keys)):
            asked = re.findall(r"Q: (.*)\n", prompt.prompt)
            assert len({*asked}) == len(asked) == 7
    tasks = lm_eval_tasks.tasks_of(source := task(num_fewshot=6))
    first, again = (lm_eval_tasks.read_task(source, "train", tasks).rows for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("keys", "judge", "reference"),
    [
        (CHOSEN, "exact", "de"),
        ({**CHOSEN, "doc_to_target": "{{['abc', 'de', 'f g'][a]}}"}, "exact", "de"),
        ({"filter_list": numbers(r"A: (-?[0-9.,]+)")}, "number", "1"),
        ({"filter_list": numbers(r"(\d+)")}, "number", "1"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "take_first"}]}]}, "exact", "1"),
        ({"metric_list": [{"metric": "bleu"}, {"metric": "exact_match"}]}, "exact", "1"),
        ({"doc_to_target": "{{[q, a|string]}}"}, "exact", "new 4"),
    ],
)
def test_metric_of_a_task_names_the_judge(task, keys, judge, reference) -> None:
    prompt = load_prompts(task(**keys), dataset_split="test")[4]
    assert (prompt.judge, prompt.reference) == (judge, reference)


def test_metric_without_a_judge_is_named_with_the_remedy(task) -> None:
    for keys, metric in (
        ({"metric_list": [{"metric": "bleu"}]}, "bleu"),
        ({"filter_list": numbers("answer is ([A-D])")}, "exact_match"),
    ):
        source = task(**keys)
        said = f"the task 'mine' is scored by {metric}, for which there is no judge: set data.judge to rouge_l, exact, "
        with pytest.raises(PromptError, match=re.escape(said)):
            load_prompts(source)
        assert load_prompts(source, judge="contains")[0].judge == "contains"
        assert load_prompts(source, force_judge="agreement")[0].judge == "agreement"


@pytest.mark.parametrize(
    ("source", "keys", "message"),
    [
        ("lm_eval:no/such.yaml", None, "there is no task file no/such.yaml"),
        ("", {"training_split": None}, "the task 'mine' has no split 'train'; it has test: set data.split"),
        ("", {"output_type": "loglikelihood", "metric_list": None}, "is of the type loglikelihood, which asks for no"),
        ("", {**CHOSEN, "doc_to_text": "{{a}}"}, "the task 'mine' puts its choices into the question"),
        ("", {"dataset_kwargs": {"data_files": "no.jsonl"}}, "mine.yaml' cannot be loaded: FileNotFoundError"),
        ("", {**CHOSEN, "doc_to_choice": ["abc", "de"]}, "document 2: PromptError"),
        ("", {"doc_to_text": "{{q.x.y}}"}, "cannot be loaded: UndefinedError"),
    ],
)
def test_task_that_cannot_be_read_is_refused(task, source, keys, message) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(source or task(**keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_task_is_found_by_its_name(task, tmp_path, monkeypatch) -> None:
    task()
    monkeypatch.setattr(lm_eval_tasks, "_index", lambda _: OwnTasks(include_path=str(tmp_path / "tasks")))
    assert len(load_prompts("lm_eval:mine")) == 8
    with pytest.raises(PromptError, match="lm_eval knows no task 'mime'; the nearest is 'mine'"):
        load_prompts("lm_eval:mime")


def test_group_gives_the_prompts_of_its_tasks(task, tmp_path, monkeypatch) -> None:
    for name in ("one", "two"):
        task(name)
    (tmp_path / "tasks" / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    monkeypatch.setattr(lm_eval_tasks, "_index", lambda _: OwnTasks(include_path=str(tmp_path / "tasks")))
    read = load_prompts("lm_eval:both")
    assert Counter(prompt.task for prompt in read) == {"one": 8, "two": 8}


def test_decoding_is_the_tasks_where_nothing_is_given(task, config_file) -> None:
    data, given = {"path": task()}, {"max_new_tokens": 3}
    found = load_config(config_file(data=data, decoding={})).decoding
    assert (found.stop, found.max_new_tokens) == (["\n", "Q:"], 7)
    mixed = load_config(config_file(data=data, decoding=given)).decoding
    assert (mixed.stop, mixed.max_new_tokens) == (["\n", "Q:"], 3)
    own = load_config(config_file(data=data, decoding={**given, "stop": []})).decoding
    assert (own.stop, own.max_new_tokens) == ([], 3)
    chosen = load_config(config_file(data={"path": task(**CHOSEN)}, decoding={})).decoding
    assert (chosen.stop, chosen.max_new_tokens) == (["\n"], 32), "choices name no length"


def test_check_and_init_take_a_task(task, config_file, model_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = task(count=64, training_split=None)
    done = layerbudget("check", config_file(data={"path": source, "split": "test", "limit": 60}))
    assert done.returncode == 0, done.stderr
    assert "60 of 1 kinds, judged by exact" in done.stdout
    load, loads = harness.TaskManager.load, []
    monkeypatch.setattr(harness.TaskManager, "load", lambda *given: loads.append(1) or load(*given))
    done = layerbudget("init", model_folder, source, "--out", "mine-run.yaml")
    assert done.returncode == 0, done.stderr
    assert len(loads) == 2, "one for the proposal, one for the check of what is written"
    written = yaml.safe_load(Path("mine-run.yaml").read_text())
    assert written["data"]["split"] == "test"
    assert written["decoding"]["stop"] == ["\n", "Q:"]


@pytest.fixture
def allocator(model_folder, tmp_path) -> Path:
    """A saved allocator that knows where its model is."""
    model, _ = load_backbone(str(model_folder))
    replace(make_allocator(model), model_source=str(model_folder)).save_pretrained(tmp_path / "allocator")
    return tmp_path / "allocator"


def scored(allocator: Path, task: str, *more: str, arguments: str = "") -> tuple:
    """A command that scores an allocator on a task of one's own, on the CPU."""
    folder = str(Path(task.removeprefix("lm_eval:")).parent)
    model = ("--model", "layerbudget", "--model_args", f"allocator={allocator}{arguments}")
    return ("lm-eval", *model, "--include_path", folder, "--tasks", "mine", *more)


def test_lm_eval_scores_what_the_allocator_answers(allocator, task, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "TaskManager", OwnTasks)
    out = tmp_path / "out"
    command = scored(allocator, task(), "--limit", "8", "--batch_size", "3", "--log_samples", "--output_path", str(out))
    done = layerbudget(*command)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout
    (results,), (samples,) = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
    config = json.loads(results.read_text())["config"]
    assert 0 < config["share_of_decoder"] <= 1
    assert 2 <= config["layers"] <= 6
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert answers == by_ourselves(allocator, [f"Say it.\n\nQ: new {number}\nA:" for number in range(8)])


def test_answers_of_a_cache_have_no_layers(allocator) -> None:
    from layerbudget.lm_eval_model import LayerbudgetLM

    model = LayerbudgetLM(str(allocator))
    assert model.generate_until([]) == []
    assert "layers" not in model.get_model_info()


class OwnTasks(harness.TaskManager):
    """Does not list the 14,000 tasks of lm_eval, which takes seconds."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **{**options, "include_defaults": False})


def by_ourselves(folder: Path, prompts: list[str]) -> list[str]:
    """The answers of `allocator.generate`, one prompt at a time, up to where the task ends them."""
    from layerbudget import Allocator

    allocator = Allocator.from_pretrained(folder)
    model, tokenizer = load_backbone(allocator.model_source)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = allocator.generate(model, **inputs, max_new_tokens=7, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        answers.append(re.split("\n|Q:|<eos>", text)[0])
    return answers


def test_certify_reads_the_split_that_is_named(allocator, task) -> None:
    source = task(training_split=None)
    assert "it has test: set data.split or --split" in refused("certify", allocator, "--prompts", source)
    assert "there are 8 prompts" in refused("certify", allocator, "--prompts", source, "--split", "test")


@pytest.mark.filterwarnings("ignore::layerbudget.UncertifiedDecodingWarning")
def test_lm_eval_model_refuses_what_no_certificate_covers(allocator, task, monkeypatch) -> None:
    monkeypatch.setattr(harness, "TaskManager", OwnTasks)
    said = refused(*scored(allocator, task(**CHOSEN), "--limit", "2"))
    assert "the task 'mine' asks for likelihoods of texts" in said
    assert "or score the full model with --model hf" in said
    assert "needs an allocator" in refused(*scored("", task(), "--limit", "2"))
    assert "takes no 'revision'" in refused(*scored(allocator, task(), "--limit", "2", arguments=",revision=main"))
    assert "keep=0.5 is not certified" in refused(*scored(allocator, task(), "--limit", "2", arguments=",keep=0.5"))


def test_longer_answers_than_certified_are_warned_of(allocator, task, monkeypatch) -> None:
    monkeypatch.setattr(harness, "TaskManager", OwnTasks)
    with pytest.warns(UncertifiedDecodingWarning, match=r"max_new_tokens=7, stop_strings=\['\\n', 'Q:'\]"):
        layerbudget(*scored(allocator, task(), "--limit", "2"))


def test_entry_point_names_the_model() -> None:
    """What follows lm_eval 0.4.13 finds models by entry points of this group."""
    from lm_eval.api.registry import get_model

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert {name: EntryPoint(name, at, "lm_eval.models").load() for name, at in points.items()} == {
        "layerbudget": get_model("layerbudget")
    }


def test_example_task_is_read(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    read = load_prompts("lm_eval:examples/lm_eval/reviews.yaml", dataset_split="test")
    assert len(read) == 40
    assert {prompt.judge for prompt in read} == {"exact"}
    assert {prompt.reference for prompt in read} == {"positive", "negative"}
