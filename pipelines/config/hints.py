"""What somebody may have meant by a key that a configuration does not have."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

NEAR = 0.7
"""How alike two spellings are, of 1, to be taken for the same word."""

_MEANT = {
    "model.source": ("model.name", "model.path", "model.id", "model.model", "model.folder", "model.repo", "model_name"),
    "model.dtype": ("model.torch_dtype", "model.precision"),
    "data.path": ("data.file", "data.source", "data.name", "data.dataset", "data.prompts", "prompts", "dataset"),
    "data.chat_template": ("data.template", "model.chat_template", "chat_template"),
    "data.shares": ("data.splits", "splits"),
    "decoding.max_new_tokens": ("decoding.max_tokens", "decoding.max_length", "max_tokens", "generation"),
    "decoding.stop": ("decoding.stop_strings", "decoding.stop_words"),
    "adapt.learning_rate": ("adapt.lr",),
    "adapt.method: heads": ("adapt.exit_steps",),
    "menu.cheapest_budget": ("menu.budget", "menu.min_budget"),
    "menu.probe_depth": ("menu.depth", "features.depth", "features.layers"),
    "tuning.controllers": ("tuning.models", "tuning.controller", "controller"),
    "calibration.keep": ("calibration.epsilon", "calibration.loss", "calibration.bound"),
    "tracking.uri": ("mlflow", "mlflow.uri", "tracking.url"),
    "runs": ("output", "output_dir", "folder"),
}
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
_ALIASES = {alias: key for key, aliases in _MEANT.items() for alias in aliases}


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
