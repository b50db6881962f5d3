"""Settings of token exits that a model cannot have, as far as its configuration tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.exit_comparison.material import default_depths
from pipelines.learning_sections import TokenExitsSection
from runtime.token_exits.filling import check_first
from runtime.token_exits.keys_values import check_family
from runtime.token_exits.settings import check_depths
from runtime.token_exits.token_exits import check_window


def check_exits(settings: TokenExitsSection, model: Mapping[str, Any], n_layers: int, longest: int) -> None:
    """Raises TokenExitsError or UnsupportedModelError for what the stage `evaluate` would refuse.

    Args:
        settings: of the run.
        model: the content of `config.json`.
        n_layers: of the model.
        longest: tokens of the longest prompt and its answer; 0 where they are not known.
    """
    depths, kinds = tuple(settings.depths or default_depths(n_layers)), model.get("layer_types") or []
    check_depths(depths, n_layers)
    check_family(str(model.get("model_type")))
    if settings.strategy == "share" and kinds:
        check_first(max(map(kinds.index, kinds)) + 1, depths)
    if settings.strategy == "recompute" and "sliding_attention" in kinds:
        check_window(longest, [model.get("sliding_window") or longest + 1])
