from pathlib import Path

import configuration
import pytest

from pipelines.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_says_its_command(path) -> None:
    config = load_config(path)
    assert path.stem == config.name
    first_lines = path.read_text().splitlines()[:3]
    assert any(f"layerbudget run configs/{path.name}" in line for line in first_lines)


DEMO = ROOT / "configs/demo.yaml"


def test_settings_go_over_the_file_over_the_defaults() -> None:
    config = load_config(DEMO, ["data.limit=64", "name=mixed", "decoding.stop=[]", "label.tolerance=0.1"])
    assert (config.data.limit, config.name, config.decoding.stop, config.label.tolerance) == (64, "mixed", [], 0.1)
    assert config.menu.method == "heads", "what the file says and the command line does not"
    assert config.tuning.components == [12, 24, 48, 96]


def test_a_dumped_config_is_the_same_run(tmp_path) -> None:
    config = load_config(DEMO, ["data.limit=64"])
    (tmp_path / "demo.yaml").write_text(config.dump())
    assert load_config(tmp_path / "demo.yaml").model_dump() == config.model_dump()


def test_a_run_of_an_earlier_version_is_read_by_its_new_keys(tmp_path) -> None:
    saved = load_config(ROOT / "configs/demo.yaml", ["label.verify=false"]).dump().replace("verify:", "shortcut:")
    (tmp_path / "config.yaml").write_text(saved)
    with pytest.raises(ConfigError, match=r"'label.shortcut'; 'label.verify' does that"):
        load_config(tmp_path / "config.yaml")
    (tmp_path / "run.json").write_text("{}")
    assert not load_config(tmp_path / "config.yaml").label.verify


def test_the_reference_shows_every_key() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    assert configuration.page() == page, "run `python benchmarks/configuration.py`"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modle.source=x", "unknown key 'modle'; the nearest valid key is 'model'"),
        ("data.limt=3", "unknown key 'data.limt'; the nearest valid key is 'data.limit'"),
        ("tuning.trails=3", "the nearest valid key is 'tuning.trials'"),
        ("model.name=gpt2", "unknown key 'model.name'; 'model.source' does that"),
        ("model.paht=gpt2", "unknown key 'model.paht'; the keys of 'model' are source, dtype, device"),
        ("data.file=p.jsonl", "unknown key 'data.file'; 'data.path' does that"),
        ("label.shortcut=false", "unknown key 'label.shortcut'; 'label.verify' does that"),
        ("mlflow.uri=x", "unknown key 'mlflow'; 'tracking.uri' does that"),
        ("judge=exact", "unknown key 'judge'; that name has 'data.judge'"),
        ("batch_size=8", "that name has 'label.batch_size', 'features.batch_size'"),
        ("token_exits.enabled=true", "finished run: `python benchmarks/exits.py comparison --run RUN`"),
        ("tuning.given={mlp: {sets: [length], component: 3}}", "component'; 'tuning.given.mlp' takes no"),
        ("zeal=1", "unknown key 'zeal'; the keys are name, runs, model, data, decoding"),
        ("model=gpt2", "model should hold keys of its own, got 'gpt2'; the keys of 'model' are source, dtype, device"),
        ("calibration.keep=20", "calibration.keep.0: Input should be less than 10, got 20"),
        ("calibration.keep=[]", "calibration.keep: List should have at least 1 item"),
        ("calibration.keep=[1, 1]", "keep names a value twice, got [1.0, 1.0]"),
        ("calibration={keep: 1, risk: score_lost}", "keep must be below 1 for the risk 'score_lost'"),
        (
            "calibration.alpha=0.03",
            "unknown key 'calibration.alpha'; it is now calibration.keep, what answers keep at least: 0.97",
        ),
        ("evaluation.alphas=[0.01, 0.1]", "it is now calibration.keep, what answers keep at least: [0.99, 0.9]"),
        ("tuning.controllers=[forest]", "'forest' is not among the controllers, known are lightgbm, mlp"),
        ("features.sets=[length, moods]", "features: unknown features 'moods'; known are length"),
        ("features.sets=[length, states]", "features: sets must hold 'embedding', which the report's controls need"),
        ("tuning.feature_sets=[[length, lens]]", "tuning.feature_sets names 'lens', which features.sets does not hold"),
        (
            "tuning.given={mlps: {sets: [length], components: 3}}",
            "given holds settings of 'mlps', which is not among tuning.controllers",
        ),
        (
            "tuning.given={mlp: {sets: [length, lens], components: 3}}",
            "tuning.given.mlp.sets names 'lens', which features.sets does not hold",
        ),
        ("adapt={method: best, where: nowhere}", "adapt: where is 'nowhere', and the method 'best' trains an adapter"),
        ("decoding.options={do_sample: true}", "options cannot hold 'do_sample': answers are greedy"),
        ("decoding.options={repetition: 2}", "options holds 'repetition', which is no argument of generate()"),
        ("tuning.objectives=[decision_ms]", "unknown key 'tuning.objectives'"),
        ("data.shares={adapt: -0.5, train: 0.9, tune: 0.1, calibrate: 0.25, test: 0.25}", "sum to 1, got"),
        (
            "calibration.risk=doubt",
            "calibration.risk: Input should be 'mean_score', 'score_lost' or 'insufficient', got 'doubt'",
        ),
        ("adapt.exit_steps=5", "unknown key 'adapt.exit_steps'; 'adapt.method: heads' does that"),
        (
            "menu.method=magic",
            "menu.method: 'magic' is not among the menus, known are given, exits, heads, gaps, evenly,",
        ),
        ("menu.given=[0-5]", "the method 'given' and a list of plans in menu.given go together, got 'heads'"),
        ("adapt.method=bridges", "menu.method=heads chooses exits by the heads that adapt.method=heads fits"),
        ("data.shares={train: 1.0}", "data: shares must name adapt, train, tune, calibrate, test"),
        (f"name={'a' * 300}", "name: String should have at most 200 characters"),
        ("name=a.", "name: String should match pattern"),
        ("decoding.stop=['']", "decoding.stop.0: String should have at least 1 character"),
        ("adapt.epochs=.inf", "adapt.epochs: Input should be a finite number"),
        ("data.columns={promt: x}", "columns names the field 'promt'; the fields of a prompt are id, task"),
        ("evaluation.own_judges=4", "unknown key 'evaluation.own_judges'; rescoring a finished run by"),
        ("evaluation.frozen=true", "plans with and without healing parts are now compared by benchmarks/adapt.py"),
        ("evaluation.control_trials=4", "controls have default settings; benchmarks/redraws.py searches"),
        ("evaluation.template=x", "yourself, and give them to `layerbudget compare`"),
        ("evaluation.template_prompts=8", "yourself, and give them to `layerbudget compare`"),
        ("tuning.controllers=[mlp, mlp]", "controllers names one twice"),
        ("name=a/b", "name: String should match pattern"),
        ("data.limit", "--set takes key=value, got 'data.limit'"),
        ("name.first=x", "'name' has no keys of its own"),
        ("data.limit=[1", "cannot read the value"),
    ],
)
def test_wrong_settings_are_named(setting, message) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, [setting])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "should hold keys and values, got list"),
        ("a: [", "is not YAML"),
        ("name: x\n", "the key 'model' is missing"),
        ("name: x\nname: y\n", "line 2: the key 'name' comes twice"),
        ("1: x\n", "line 1: the key '1' is not a text; put quotes around it"),
        ("a: &a [x]\nb: *a\n", "line 2: aliases"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: 2001-99-99\n", "month must be in 1..12"),
        ('a: "\\ud800"\n', "unpaired surrogate"),
        ("a: \udcff\n", "the byte 0xff is not UTF-8"),
    ],
)
def test_wrong_files_are_named(tmp_path, text, message) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_a_single_value_is_a_list_of_one() -> None:
    for setting in ("try_prompts=what is this", "try_prompts=[what is this]"):
        assert load_config(DEMO, [setting]).try_prompts == ["what is this"]
    for setting, keep in (("calibration.keep=1.05", [1.05]), ("calibration.keep=[0.97, 1, 1.05]", [0.97, 1.0, 1.05])):
        assert load_config(DEMO, [setting]).calibration.keep == keep


def test_a_head_at_full_depth_needs_fitted_heads() -> None:
    menu = "menu={method: given, given: [0-9, 0-17h]}"
    with pytest.raises(ConfigError, match=r"the full depth with an exit head, and adapt\.method=bridges fits none"):
        load_config(DEMO, [menu, "adapt={method: bridges}"])
    assert load_config(DEMO, [menu, "adapt={method: heads}"]).menu.given == ["0-9", "0-17h"]
