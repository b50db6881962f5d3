"""A run on a model with a chat template: every stage reads the same text, and its results name the template."""

import shutil

import pytest
from chat_templates import WITH_BEGIN, WITH_SYSTEM, chat_tokenizer
from command import ran, refused
from tiny import tiny_model
from tiny_run import change_prompts

from backbone.loading import load_backbone
from oracle.chat import ChatTemplate, tokens_of
from pipelines.config import load_config
from pipelines.run.runner import run_all
from pipelines.run.state import BY_NAME, RunState
from pipelines.run.workspace import Workspace
from runtime.allocator import Allocator
from runtime.saving.allocator_checks import optional_parts


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", layer_scale=0.5).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(config_file, chat_model, prompts_file):
    """A configuration of a run on the model with a template; every second prompt is a conversation."""

    def conversation(number, row):
        if number % 2:
            return row
        turns = [("user", "abc"), ("assistant", "de"), ("user", row.pop("prompt"))]
        return row | {"messages": [{"role": role, "content": content} for role, content in turns]}

    change_prompts(prompts_file, conversation)

    def write(chat_template="auto", **sections):
        data = {"path": str(prompts_file), "chat_template": chat_template}
        model = {"source": str(chat_model), "device": "cpu"}
        return config_file(model=model, data=data, **sections)

    return write


def test_a_run_renders_every_prompt_once_and_says_with_what(settings, chat_model) -> None:
    file = settings()
    config = load_config(file)
    run_all(config)
    model, tokenizer = load_backbone(str(chat_model), device="cpu")
    template = ChatTemplate.of_tokenizer(tokenizer)
    workspace = Workspace(config)
    assert {prompt.template for prompt in workspace.prompts.rendered} == {template.hash}
    allocator = Allocator.from_pretrained(config.folder / "allocator")
    assert allocator.chat is not None
    assert (allocator.chat.hash, allocator.chat.template(tokenizer)) == (template.hash, template)
    assert len(allocator.chat.head) == 4
    assert allocator.certificate.chat_template == template.hash
    assert {"drift.safetensors", "chat.json"} <= {*allocator.certificate.assumes} == {*optional_parts(allocator)}
    assert f"another chat template than {template.hash}, or none" in allocator.certificate.does_not_cover[0]
    labels = workspace.labels.labels(workspace.menu().plans[-1], workspace.prompts.labelled())
    for prompt in workspace.prompts.labelled()[:4]:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
        label = labels[prompt.hash, "agreement"]
        assert label.prompt_tokens == inputs["input_ids"].shape[1] == len(tokens_of(tokenizer, prompt.prompt))
        assert list(label.answer_ids) == output[0, label.prompt_tokens :].tolist()
    again = ran("run", file)
    assert again.count("done before") == 9
    assert "abcabc\n" in again, "try_prompts show what was asked"


def test_raw_prompts_alone_leave_an_allocator_without_a_template(settings, prompts_file) -> None:
    file = settings(tuning={"trials": 1, "components": [6], "folds": 2, "controllers": ["logistic"]})

    def raw(number, row):
        turns = row.pop("messages", [{"content": row.get("prompt")}])
        return row | {"prompt": turns[-1]["content"], "raw": True}

    change_prompts(prompts_file, raw)
    for stage in ("menu", "adapt", "label", "features", "tune", "train", "calibrate"):
        ran(stage, file)
    allocator = Allocator.from_pretrained(load_config(file).folder / "allocator")
    assert allocator.chat is None
    assert allocator.certificate.chat_template == ""


def keys(config) -> list[str]:
    return [RunState(Workspace(config)).key(BY_NAME[name]) for name in ("menu", "label")]


def test_another_template_makes_stages_undone(settings, tmp_path, chat_model, monkeypatch) -> None:
    file, path = settings(), tmp_path / "chat.jinja"
    ran("menu", file)
    path.write_text(WITH_SYSTEM)
    own = keys(load_config(file))
    assert own == keys(load_config(file))
    other = keys(load_config(file, [f"data.chat_template={path}"]))
    path.write_text(WITH_SYSTEM + " ")
    changed = keys(load_config(file, [f"data.chat_template={path}"]))
    assert len({*own, *other, *changed}) == 6
    rendered = Workspace(load_config(file, [f"data.chat_template={path}"])).prompts.rendered
    assert rendered[0].prompt == f"<system>be kind;<user>abc;<assistant>de;<user>{rendered[0].shown[-20:]};<assistant> "


def test_a_model_whose_template_has_changed_is_another_one(settings, tmp_path, chat_model) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(chat_model, folder)
    file = settings()
    source = ("--set", f"model.source={folder}")
    ran("menu", file, *source)
    chat_tokenizer(WITH_BEGIN + " ").save_pretrained(folder)
    assert "was made with the chat template" in refused("menu", file, *source)


def test_what_cannot_be_rendered_is_refused_in_one_sentence(settings, tmp_path) -> None:
    assert "messages need a chat template" in refused("menu", settings("never"))
    assert not (tmp_path / "runs").exists(), "known before anything is loaded"
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no') }}")
    assert "cannot render it: no" in refused("menu", settings(str(tmp_path / "bad.jinja")))
