"""What the papers on token exits found, replayed on the full model's own answers of a run, token by token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from exit_material import Material
from exit_observation import confidences, mean_depth, observe, train_bridges

from backbone.execution.live_changes import replaced
from backbone.families import decoder_layers, decoder_of
from backbone.left_padding import padded_inputs
from token_exits.gates import Oracle
from token_exits.heads import ExitHeads
from token_exits.thresholds import agreement, exits_at, threshold_for

WANTED = 0.95
TRAINED_STEPS = 150


def findings(material: Material) -> dict[str, Any]:
    """Oracle against each gate, frozen, with bridges and with trained bridges; words and their continuations; halves of
    layers."""
    bridges, losses = train_bridges(
        material.bridged, observe(material.model, material.for_heads, material.depths), steps=TRAINED_STEPS
    )
    trained = ExitHeads(material.model, bridges, material.bridged.shortlist)
    kinds = {"frozen": material.frozen, "bridged": material.bridged, "trained": trained}
    shortlist = material.shortlist
    return {
        "tokens": len(material.held_out.following),
        "depths": list(material.depths),
        "n_layers": material.n_layers,
        "shortlist": {"size": len(shortlist), "covers": _covered(material, shortlist)},
        "training": losses,
        "heads": {name: _of_heads(material, heads) for name, heads in kinds.items()},
        "words": words(material),
        "halves": halves(material),
    }


def _covered(material: Material, shortlist: torch.Tensor) -> float:
    return float(torch.isin(material.held_out.following, shortlist).float().mean())


def _of_heads(material: Material, heads: ExitHeads) -> dict[str, Any]:
    agrees, depths, n_layers = material.judged(heads), material.depths, material.n_layers
    right = [float(each.float().mean()) for each in agrees]
    found: dict[str, Any] = {"agreement": dict(zip(map(str, depths), right, strict=True))}
    oracle = confidences(Oracle(), heads, material.held_out, depths)
    found["oracle_layers"] = mean_depth(oracle, depths, n_layers, 0.5)
    found["gates"] = {}
    half = torch.arange(len(material.held_out.following)) % 2 == 0
    for name in material.gates:
        confidence = material.confidence(name, heads)
        threshold = threshold_for(confidence[:, half], agrees[:, half], WANTED)  # set on one half, told of the other
        found["gates"][name] = {
            "area": mean_area(confidence, agrees),
            "layers": mean_depth(confidence[:, ~half], depths, n_layers, threshold),
            "kept": agreement(confidence[:, ~half], agrees[:, ~half], threshold),
        }
    return found


def risk_coverage_area(confidence: torch.Tensor, agrees: torch.Tensor) -> float:
    """Mean, over all shares of tokens let go, surest first, of the share of these that should not have been (Geifman et
    al. 2019, arXiv 1805.08206, section 3).

    Tokens of equal confidence count as if their order were drawn at random.

    Args:
        confidence, agrees: of T tokens at one layer.
    """
    order = confidence.argsort(descending=True, stable=True)
    _, sizes = confidence[order].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    wrong = (~agrees[order]).double()
    means = torch.stack(
        [part.mean() for part in torch.tensor_split(wrong, sizes.cumsum(0)[:-1].tolist())]
    ).repeat_interleave(sizes)
    return float((means.cumsum(0) / torch.arange(1, len(means) + 1)).mean())


def mean_area(confidence: torch.Tensor, agrees: torch.Tensor) -> float:
    """The area, on average over the candidate layers [C, T]."""
    return sum(risk_coverage_area(c, a) for c, a in zip(confidence, agrees, strict=True)) / len(confidence)


def words(material: Material) -> dict[str, Any]:
    """The oracle's mean exit layer, with bridges, where the next token begins a word and where it goes on with one."""
    tokenizer = material.workspace.model.tokenizer
    observed, depths = material.held_out, torch.tensor([*material.depths, material.n_layers])
    layers = depths[exits_at(confidences(Oracle(), material.bridged, observed, material.depths), 0.5)].float()
    groups: dict[str, list[float]] = defaultdict(list)
    for token, place, layer in zip(observed.following.tolist(), observed.place.tolist(), layers.tolist(), strict=True):
        piece = tokenizer.convert_ids_to_tokens(token)
        begins = piece[:1] in ("▁", "Ġ") or not piece[:1].isalnum()
        part = "tokens 2 to 4" if place <= 3 else "later"
        groups[f"{'begins a word or mark' if begins else 'continues a word'}, {part}"].append(layer)
    return {name: {"layers": sum(own) / len(own), "tokens": len(own)} for name, own in sorted(groups.items())}


@torch.no_grad()
def halves(material: Material) -> dict[str, Any]:
    """Agreement of the model's own head with the full model's next token, behind attention and behind the whole layer,
    for the last third of the layers."""
    model, examples = material.model, material.for_classifier
    layers, n_layers = decoder_layers(model), material.n_layers
    names = ("pre_feedforward_layernorm", "post_attention_layernorm")  # the first where a family has both
    norms = [getattr(layer, next(name for name in names if hasattr(layer, name))) for layer in layers]
    seen: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    following: list[torch.Tensor] = []
    current: dict[tuple[int, str], torch.Tensor] = {}

    def noting(key: tuple[int, str], forward: Any) -> Any:
        def run(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            current[key] = states
            return forward(states, *args, **kwargs)

        return run

    wanted = range(2 * n_layers // 3, n_layers)
    changes = [(norms[i], "forward", noting((i, "attention"), norms[i].forward)) for i in wanted]
    changes += [(layers[i], "forward", noting((i - 1, "layer"), layers[i].forward)) for i in wanted if i > wanted[0]]
    for example in (each for each in examples if each.answer > 1):
        with replaced(changes):
            decoder_of(model)(**padded_inputs(model, [example.tokens]), use_cache=False)
        span = slice(-example.answer, -1)
        following.append(torch.tensor(example.tokens[span.start + 1 :]))
        for key, states in current.items():
            seen[key].append(states[0, span].clone())
    truth, heads = torch.cat(following), material.frozen
    return {
        f"{part} {index}": float((heads.predictions(torch.cat(states)) == truth).float().mean())
        for (index, part), states in sorted(seen.items())
    }
