"""Exit heads: for each early exit a linear map from its state to the model's output, fitted where answers begin.

A head is a bridge over all layers behind the exit, followed by the model's own final norm and output head, as in the
tuned lens (Belrose et al. 2023, arXiv 2303.08112, section 2). It starts from a ridge regression and is trained on the
full model's next-token distributions and, where a target is known, on the target.

Shapes: `T` places, `D` hidden size, `L` layers, `v` tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from backbone.execution.output_head import head_on, output_logits
from backbone.healing.exit_places import Advance, Places
from backbone.healing.healing import Bridge

LOOKED_AT = 256
"""Places of answers at which the full model's likely tokens are taken into the vocabulary."""
AT_ONCE = 64
"""Places whose logits over the whole vocabulary are made together."""
SEARCHED = 64
"""Places at which a look at a head finds tokens of the whole vocabulary that the losses do not range over yet."""


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How heads are trained.

    Attributes:
        steps: of Adam, for each head.
        batch: places of a step; three in four of them predict an answer.
        learning_rate: at first, for inputs and outputs of deviation 1; half a cosine brings it down to nothing.
        weight_decay: of AdamW.
        vocabulary: tokens that the losses range over at first, at most. Others are drawn anew at each step, and those
            stay that a head says at a look: else a token that is in no text could become the likeliest unseen.
        held: every so many-th text is held out, to choose the ridge and which of the heads seen in training.
        look_every: steps between looks at the held-out texts, and at the whole vocabulary.
        seed: of everything random.
    """

    steps: int = 240
    batch: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    vocabulary: int = 2048
    held: int = 8
    look_every: int = 20
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HeadFit:
    """One fitted head.

    Attributes:
        head: in float32, on the CPU.
        loss: on held-out answer places, after the ridge regression and after training (nats a place).
        wrong: share of these places where the likeliest token is not the target's, before and after.
        steps: of training after which this head was seen; 0 for the ridge regression.
        said: number of each held-out text -> whether, of the whole vocabulary, the head says every token of the answer.
    """

    head: Bridge
    loss: tuple[float, float]
    wrong: tuple[float, float]
    steps: int
    said: Mapping[int, bool]

    @property
    def right(self) -> float:
        """Share of the held-out texts along which the head says the whole answer."""
        return sum(self.said.values()) / len(self.said)


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge strengths tried, as shares of the mean square of the inputs."""
DRAWN = 512
"""Tokens of the vocabulary that are drawn anew at each step."""


class HeadFitter:
    """Fits the heads of some depths at once, which share a step's draws, targets and output head.

    Args:
        model: whose final norm and output head run behind every head.
        places: of texts with answers.
        settings: how heads are trained.
    """

    def __init__(self, model: PreTrainedModel, places: Places, settings: HeadSettings) -> None:
        self._model, self._settings = model, settings
        is_held = places.text % settings.held == 0
        self._fitted, self._held = places.of(~is_held), places.of(is_held & places.is_answer)
        self._kept = _vocabulary(model, places, settings.vocabulary)
        self._last = max(places.states)
        self._answers, self._others = (
            mask.nonzero()[:, 0] for mask in (self._fitted.is_answer, ~self._fitted.is_answer)
        )

    def fit(
        self, depths: Sequence[int], references: float, advance: Advance = lambda done: None, steps: int | None = None
    ) -> dict[int, HeadFit]:
        """A head for each of some depths.

        Args:
            depths: see `Places.states`.
            references: weight of the cross-entropy where the target is known; the divergence from the full model has
                the rest, and all of the weight elsewhere.
            advance: called with the number of heads that were fitted.
            steps: in place of those of the settings.
        """
        settings = self._settings if steps is None else replace(self._settings, steps=steps)
        generator = torch.Generator().manual_seed(settings.seed)
        heads = {depth: self._start(depth, references, settings) for depth in depths}
        for step in range(1, settings.steps + 1):
            with torch.enable_grad():
                now = {depth: head.now for depth, head in heads.items()}
                losses, _ = self._losses(now, self._drawn(generator), references, generator)
                losses.sum().backward()  # type: ignore[no-untyped-call]
            for head in heads.values():
                head.step()
            if step % settings.look_every == 0 or step == settings.steps:
                now = {depth: head.now for depth, head in heads.items()}
                self._learn_tokens(now, generator)
                best = self._held_out({depth: head.best for depth, head in heads.items()}, references)
                found = self._held_out(now, references)
                for head, least, score in zip(heads.values(), best, found, strict=True):
                    head.note(least, score, step)
            advance(len(heads) * step // settings.steps - len(heads) * (step - 1) // settings.steps)
        return {depth: head.fit(self._said(head.best(self._held.states[depth]))) for depth, head in heads.items()}

    def _start(self, depth: int, references: float, settings: HeadSettings) -> _Head:
        """The ridge regression that is best on the held-out texts."""
        x, y = self._fitted.states[depth], self._fitted.states[self._last]
        y = y / y.pow(2).mean(-1, keepdim=True).sqrt()  # a final norm sees no other difference
        weight = torch.where(self._fitted.is_answer, 1.0, 0.25)[:, None]
        units = _Units.of(x, y, weight)
        x, y = (x - units.x_mean) / units.x_size, (y - units.y_mean) / units.y_size
        inner, cross, eye = (x * weight).T @ x, (x * weight).T @ y, torch.eye(x.shape[1])
        scale = float(inner.diagonal().mean())
        solved = [torch.linalg.solve(inner + strength * scale * eye, cross) for strength in RIDGES]
        found = [self._held_out({depth: units.bridge(each)}, references)[0] for each in solved]
        best = found.index(min(found))
        return _Head(solved[best], units, found[best], settings)

    def _drawn(self, generator: torch.Generator) -> Places:
        """Places of a step."""
        size = self._settings.batch
        n_others = size // 4 if len(self._others) else 0
        parts = [(self._answers, size - n_others), (self._others, n_others)]
        return self._fitted.of(
            torch.cat([p[torch.randint(len(p), (count,), generator=generator)] for p, count in parts if count])
        )

    def _losses(
        self, heads: Mapping[int, Bridge], places: Places, references: float, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of each head over some places, and its share of wrong tokens; with a generator over more tokens."""
        kept = self._kept
        if generator is not None:
            drawn = torch.randint(self._model.config.get_text_config().vocab_size, (DRAWN,), generator=generator)
            kept = torch.unique(torch.cat([kept, drawn]))
        index = torch.searchsorted(kept, places.following).clamp(max=len(kept) - 1)
        with head_on(self._model, kept):
            with torch.no_grad():
                target = _logs(self._model, places.states[self._last])
            states = [head(places.states[depth]) for depth, head in heads.items()]
            logs = _logs(self._model, torch.cat(states)).view(len(heads), *target.shape)
        is_target = places.is_target & (references > 0)
        divergence = (target.exp() * (target - logs)).sum(-1)
        surprise = -logs.gather(-1, index[:, None].expand(len(heads), -1, -1))[..., 0]
        mixed = references * surprise + (1 - references) * divergence
        wrong = logs.argmax(-1) != torch.where(is_target, index, target.argmax(-1))
        return torch.where(is_target, mixed, divergence).mean(-1), wrong.float().mean(-1)

    @torch.no_grad()
    def _learn_tokens(self, heads: Mapping[int, Bridge], generator: torch.Generator) -> None:
        """Let the losses range over what heads say at some fitted places too."""
        some = self._answers[torch.randint(len(self._answers), (SEARCHED,), generator=generator)]
        said = [_likeliest(self._model, head(self._fitted.states[depth][some])) for depth, head in heads.items()]
        self._kept = torch.unique(torch.cat([self._kept, *said]))

    @torch.no_grad()
    def _held_out(self, heads: Mapping[int, Bridge], references: float) -> list[Score]:
        losses, wrong = self._losses(heads, self._held, references)
        return [*zip(wrong.tolist(), losses.tolist(), strict=True)]

    @torch.no_grad()
    def _said(self, states: torch.Tensor) -> dict[int, bool]:
        """Of final states at the held-out places [T, D]."""
        said = _likeliest(self._model, states)
        wrong = set(self._held.text[said != self._held.following].tolist())
        return {text: text not in wrong for text in sorted(set(self._held.text.tolist()))}


@dataclass(frozen=True, slots=True)
class _Units:
    """What one dimension of the inputs [D] and of the outputs [D] is measured in.

    Some dimensions of a decoder's states are a thousand times as large as others, and a step of Adam is as large in
    all; in units of their deviations it means the same everywhere.
    """

    x_mean: torch.Tensor
    x_size: torch.Tensor
    y_mean: torch.Tensor
    y_size: torch.Tensor
    size: float

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> _Units:
        (x_mean, x_size), (y_mean, y_size) = (_moments(each, weight) for each in (x, y))
        return cls(x_mean, x_size, y_mean, y_size, float(x.pow(2).mean(-1).sqrt().mean()))

    def bridge(self, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> Bridge:
        """The map of given weight [D, D] and bias [D] in these units, in the model's own, sized like its inputs."""
        whole = weight * (self.size * self.y_size / self.x_size[:, None])
        offset = self.size * (bias * self.y_size + self.y_mean) - self.x_mean @ whole
        return Bridge((whole - torch.eye(len(whole)),), offset)


def _moments(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = (values * weight).sum(0) / weight.sum()
    size = (((values - mean) ** 2 * weight).sum(0) / weight.sum()).sqrt()
    return mean, size.clamp(min=1e-6 * float(size.max().clamp(min=1e-30)))


Score = tuple[float, float]
"""Of held-out places: the share of wrong tokens, and the loss, which decides between equal shares."""


class _Head:
    """A head in training: its weight [D, D] in some units at first, and what was found of that on held-out texts."""

    def __init__(self, weight: torch.Tensor, units: _Units, found: Score, settings: HeadSettings) -> None:
        self._parts = [weight.clone().requires_grad_(), torch.zeros(len(weight), requires_grad=True)]
        self._units = units
        rate, decay = settings.learning_rate, settings.weight_decay
        self._optimizer = torch.optim.AdamW(self._parts, lr=rate, weight_decay=decay, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, settings.steps)
        self._first, self._least, self._steps = found, found, 0
        self.best = units.bridge(weight)

    @property
    def now(self) -> Bridge:
        return self._units.bridge(*self._parts)

    def step(self) -> None:
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()

    def note(self, best: Score, found: Score, step: int) -> None:
        """Keep the head as it is now, after so many steps, if it scores below the best one on the held-out texts."""
        self._least = min(best, found)
        if found < best:
            self.best = self._units.bridge(*(part.detach().clone() for part in self._parts))
            self._steps = step

    def fit(self, said: Mapping[int, bool]) -> HeadFit:
        (wrong, loss), (least_wrong, least_loss) = self._first, self._least
        return HeadFit(self.best, (loss, least_loss), (wrong, least_wrong), self._steps, said)


def _logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Of states on the CPU, where the model is."""
    return output_logits(model, states.to(model.device, model.dtype))


def _likeliest(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """The likeliest token of the whole vocabulary [T], of states [T, D] on the CPU."""
    return torch.cat([_logits(model, some).argmax(-1).cpu() for some in torch.split(states, AT_ONCE)])


def _logs(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Log-probabilities on the CPU, of states on the CPU."""
    return _logits(model, states).float().log_softmax(-1).cpu()


@torch.no_grad()
def _vocabulary(model: PreTrainedModel, places: Places, size: int) -> torch.Tensor:
    """[v], ascending: the tokens that follow, the commonest first, and the likely ones where answers begin."""
    answers = places.is_answer.nonzero()[:, 0]
    states = places.states[max(places.states)][answers[:: max(1, len(answers) // LOOKED_AT)]]
    likely = torch.cat([_logs(model, part).topk(8).indices for part in torch.split(states, AT_ONCE)]).flatten()
    said = places.following[places.is_answer]
    tokens, counts = torch.unique(torch.cat([said, likely, places.following]), return_counts=True)
    commonest: torch.Tensor = tokens[counts.argsort(descending=True)[:size]]
    kept: torch.Tensor = torch.unique(torch.cat([said, commonest]))
    return kept
