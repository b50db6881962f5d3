"""YAML as configurations use it, and what somebody may have meant by a key that a configuration does not have."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from difflib import get_close_matches
from typing import Any

import yaml

NEAR = 0.7
"""How alike two spellings are, of 1, to be taken for the same word."""

_MEANT = {
    "model.source": "model.name model.path model.id model.model model.folder model.repo model_name",
    "model.dtype": "model.torch_dtype model.precision",
    "data.path": "data.file data.source data.name data.dataset data.prompts prompts dataset",
    "data.chat_template": "data.template model.chat_template chat_template",
    "data.shares": "data.splits splits",
    "decoding.max_new_tokens": "decoding.max_tokens decoding.max_length max_tokens generation",
    "decoding.stop": "decoding.stop_strings decoding.stop_words",
    "adapt.learning_rate": "adapt.lr",
    "adapt.method: heads": "adapt.exit_steps",
    "label.verify": "label.shortcut",
    "menu.cheapest_budget": "menu.budget menu.min_budget",
    "menu.probe_depth": "menu.depth features.depth features.layers",
    "tuning.controllers": "tuning.models tuning.controller controller",
    "calibration.keep": "calibration.epsilon calibration.loss calibration.bound",
    "tracking.uri": "mlflow mlflow.uri tracking.url",
    "runs": "output output_dir folder",
}
_ALIASES = {alias: key for key, aliases in _MEANT.items() for alias in aliases.split()}
_TEMPLATE = "put the prompts into that template yourself, and give them to `layerbudget compare`"
_GONE = {
    "token_exits": "token exits are compared on a finished run: `python benchmarks/exits.py comparison --run RUN`",
    "evaluation.own_judges": "rescoring a finished run by the prompts' own judges is now benchmarks/own_judges.py",
    "evaluation.frozen": "plans with and without healing parts are now compared by benchmarks/adapt.py",
    "evaluation.control_trials": "controls have default settings; benchmarks/redraws.py searches the task's",
    "evaluation.template": _TEMPLATE,
    "evaluation.template_prompts": _TEMPLATE,
}
"""Keys of earlier versions, and where to find now what they asked for."""
_LOSSES = ("calibration.alpha", "evaluation.alphas")
"""Keys of earlier versions, which named losses."""
_RENAMED = {"label": {"shortcut": "verify"}}
"""For each section the keys of earlier versions and their names now."""


def renamed(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a run's folder, which an earlier version may have saved, with the keys' names of now."""
    return {
        section: {_RENAMED.get(section, {}).get(key, key): value for key, value in own.items()}
        if isinstance(own, dict)
        else own
        for section, own in data.items()
    }


def hint_of(key: str, known: Sequence[str], value: object = None) -> str:
    """A clause: the key that was meant, where one is near, or the keys that there are in its section.

    Args:
        key: unknown; with a full stop at its end where a section holds no keys.
        known: every key of a configuration, sections too.
        value: of the key.
    """
    if key in _LOSSES:
        losses = value if isinstance(value, list) else [value]
        kept = [f"{1 - loss:.9g}" for loss in losses if isinstance(loss, int | float)]
        written = f"[{', '.join(kept)}]" if isinstance(value, list) else "".join(kept)
        return f"it is now calibration.keep, what answers keep at least: {written or '1 less the loss'}"
    if key in _GONE:
        return _GONE[key]
    section, _, name = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    if key in _ALIASES:
        return f"{_ALIASES[key]!r} does that"
    if nearest := get_close_matches(name, siblings, n=1, cutoff=NEAR):
        return f"the nearest valid key is {f'{section}.{nearest[0]}'.lstrip('.')!r}"
    if elsewhere := [other for other in known if other.rpartition(".")[2] == name]:
        return f"that name has {', '.join(map(repr, elsewhere))}"
    if not siblings:
        return f"{section!r} takes no such key"
    return f"the keys {f'of {section!r} ' if section else ''}are {', '.join(siblings)}"


class NotYAMLError(ValueError):
    """A text that is not YAML, or not the YAML of a configuration; the message says why."""


class _Loader(yaml.SafeLoader):
    """Refuses keys that come twice and aliases, through which a few lines stand for any number of values."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise NotYAMLError(f"line {line}: aliases (*name) have no use here; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known: set[str] = set()
        for key, _ in node.value:
            place = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise NotYAMLError(
                    f"{place}: the key {getattr(key, 'value', None)!r} is not a text; put quotes around it"
                )
            if key.value in known:
                raise NotYAMLError(f"{place}: the key {key.value!r} comes twice")
            known.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(content: bytes | str) -> Any:
    """The value of a YAML text in UTF-8.

    Raises:
        NotYAMLError: also for keys that come twice or are no texts, aliases, and characters that no file takes.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = yaml.load(text, _Loader)
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except NotYAMLError:
        raise
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise NotYAMLError(f"the byte {byte:#04x} is not UTF-8; save it in that encoding") from None
    except UnicodeEncodeError as error:
        raise NotYAMLError(f"contains an unpaired surrogate, {error.object[error.start]!r}") from None
    except RecursionError:
        raise NotYAMLError("its values are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a number or a date that Python does not have
        raise NotYAMLError(" ".join(str(error).split())) from None
    return value
