"""Files of a saved allocator that fit their SHA-256 and hold what they should not: one sentence each, when loaded."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import padded_batch, tiny_model
from tiny_allocator import GREEDY, make_allocator, resigned, with_healing

from backbone.errors import ArtefactError
from controller.models.logistic import LogisticController
from runtime.allocator import Allocator

HUGE = 10**12
LAST = -1


def check_refused(allocator, folder, name, change, message) -> None:
    """With the content of one file changed."""
    allocator.save_pretrained(folder)
    (edited_json if name.endswith("json") else edited_tensors)(folder, name, change)
    resigned(folder)
    with pytest.raises(ArtefactError, match=message) as error:
        Allocator.from_pretrained(folder)
    assert "\n" not in str(error.value)


def edited_json(folder, name, change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def edited_tensors(folder, name, change) -> None:
    with safe_open(folder / name, "pt") as file:
        metadata = file.metadata()
    tensors = change(load_file(folder / name))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(n_layers=HUGE), "a model has from 1 to 10000 layers"),
        (lambda m: m["plans"][0].update(runs=f"0-{HUGE}"), "cannot read '0-1000000000000'"),
        (lambda m: m["plans"][0].update(runs=["0-5"]), "a plan is a text"),
        (lambda m: m["plans"][0].update(budget=float("nan")), "holds NaN"),
        (lambda m: m["plans"][LAST].update(budget="1"), "a share above 0 and at most 1, got '1'"),
        (lambda m: m["plans"][0].pop("budget"), "each plan of a menu holds runs and budget"),
        (lambda m: m.update(plans={}), "a list of plans"),
        (lambda m: m.update(probe_depth=True), "probe_depth is a number of layers, got True"),
        (lambda m: m.pop("probe_depth"), "a menu holds n_layers, probe_depth"),
    ],
)
def test_a_menu_that_says_something_odd_is_refused(plain, tmp_path, change, message) -> None:
    check_refused(plain, tmp_path, "menu.json", change, message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", "x"), ("tolerance", "x"), ("price", 0), ("per_task", {"a": {"n": 1}}), ("risk", ["loss"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_certificate_that_says_something_odd_is_refused(plain, tmp_path, name, value) -> None:
    """What else is refused stands in the table of forgeries; here the sentence names the field."""
    message = rf"is not a certificate .*\({name} is "
    check_refused(plain, tmp_path, "certificate.json", lambda data: data.update({name: value}), message)


CONTROLLER_DAMAGE = [
    (lambda t: {**t, "other": torch.zeros(1)}, "holds no controller of this kind"),
    (lambda t: {name: t[name] for name in list(t)[1:]}, "holds no controller of this kind"),
    (lambda t: {name: tensor[:1] for name, tensor in t.items()}, "not a number for each of 3 plans|of this kind"),
    (lambda t: {name: tensor.double() for name, tensor in t.items()}, "not finite, or not float32"),
    (lambda t: {**t, "bias": t["bias"] * float("inf")}, "not finite, or not float32"),
]


@pytest.mark.parametrize(("change", "message"), CONTROLLER_DAMAGE)
@pytest.mark.parametrize("name", ["mlp", "logistic"])
def test_tensors_that_are_no_controller_are_refused(model, tmp_path, name, change, message) -> None:
    allocator = make_allocator(model, controller=LogisticController() if name == "logistic" else None, name=name)
    check_refused(allocator, tmp_path, "controller.safetensors", change, message)


def of_bridges(part: str, tensor: torch.Tensor):
    def change(tensors):
        return {name: tensor if name.startswith("bridge") and part in name else old for name, old in tensors.items()}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_bridges("bias", torch.zeros(3)), "has parts of shapes"),
        (of_bridges("factor_0", torch.zeros(32, 7)), "has parts of shapes"),
        (of_bridges("", torch.tensor(0.0)), "has parts of shapes"),
        (lambda t: {name: tensor for name, tensor in t.items() if "bias" not in name}, "has parts of shapes"),
        (lambda t: {name.replace("|bias", "|bies"): tensor for name, tensor in t.items()}, "has parts of shapes"),
        (lambda t: {name: tensor * float("nan") for name, tensor in t.items()}, "not finite"),
        (lambda t: {name: tensor.long() for name, tensor in t.items()}, "no fractions"),
        (lambda t: {**t, "what|x|0": torch.zeros(1)}, "is no name of a tensor of healing parts"),
        (lambda t: {**t, "change": torch.zeros(1)}, "is no name of a tensor of healing parts"),
        (lambda t: {**t, f"bridge|{HUGE}|0-{HUGE}|4|bias": torch.zeros(1)}, "a model has from 1 to"),
        (lambda t: {name.replace("|3|", "|5|"): tensor for name, tensor in t.items()}, "has no gap"),
        (lambda t: {name: tensor for name, tensor in t.items() if name[-2:] != "|1"}, "two matrices"),
        (lambda t: {**t, "change|a.b|0": torch.zeros(2, 3), "change|a.b|1": torch.zeros(2, 3)}, "two matrices"),
    ],
)
def test_tensors_that_are_no_healing_are_refused(tmp_path, change, message) -> None:
    allocator = with_healing(tiny_model("llama"))
    check_refused(allocator, tmp_path, "healing.safetensors", change, message)


def test_healing_for_states_of_another_size_are_refused_by_the_model(tmp_path) -> None:
    model = tiny_model("llama")
    with_healing(model).save_pretrained(tmp_path)
    small = {"bias": torch.zeros(16), "factor_0": torch.zeros(16, 16)}

    def change(tensors):
        return {name: small.get(name.rpartition("|")[2], tensor) for name, tensor in tensors.items()}

    edited_tensors(tmp_path, "healing.safetensors", change)
    resigned(tmp_path)
    loaded = Allocator.from_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="for states of 16 numbers, those of this model have 32"):
        loaded.generate(model, **padded_batch(), **GREEDY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rates: rates.popitem(), "acceptance.json should hold a rate for each plan of the menu"),
        (lambda rates: rates.update({"0-1": 0.5}), "acceptance.json should hold a rate for each plan of the menu"),
        (lambda rates: rates.update({"0-5": 1.5}), "a share from 0 to 1, got 1.5"),
        (lambda rates: rates.update({"0-5": float("nan")}), "holds NaN"),
    ],
)
def test_odd_rates_of_acceptance_are_refused(plain, tmp_path, change, message) -> None:
    allocator = replace(plain, acceptance=(0.5, 0.75, 1.0))
    check_refused(allocator, tmp_path, "acceptance.json", change, message)


def test_rates_of_acceptance_are_saved_and_may_be_missing(plain, tmp_path) -> None:
    for name, rates in (("with", (0.5, 0.75, 1.0)), ("without", None)):
        replace(plain, acceptance=rates).save_pretrained(tmp_path / name)
        assert Allocator.from_pretrained(tmp_path / name).acceptance == rates
