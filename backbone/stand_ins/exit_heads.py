"""Exit heads: for each early exit a linear map from its state to the model's output, fitted where answers begin.

A head is a bridge over all layers behind the exit, followed by the model's own final norm and output head, as in the
tuned lens (Belrose et al. 2023, arXiv 2303.08112, section 2). It starts from a ridge regression and is trained on the
full model's next-token distributions and, where a target is known, on the target.

Shapes: `T` places, `D` hidden size, `L` layers, `v` tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from backbone.execution.live_changes import captured
from backbone.execution.output_head import head_on, output_logits
from backbone.families import decoder_layers, decoder_of
from backbone.left_padding import by_tokens, padded_inputs
from backbone.stand_ins.bridges import Bridge
from backbone.stand_ins.training_targets import Example

Advance = Callable[[int], None]

PROMPT_PLACES = 8
"""Places of a prompt, beside those that predict its answer, at which a head follows the full model."""
BATCH_TOKENS = 4096
AT_ONCE = 64
"""Places whose logits over the whole vocabulary are made together."""


@dataclass(frozen=True, eq=False)
class Places:
    """T places of some texts, each predicting the token that follows.

    Attributes:
        states: by depth, before that layer [T, D]; before layer L means after the last. On the CPU.
        following: the token that follows in the text [T].
        is_answer: whether that token belongs to the answer [T].
        is_target: whether that token is a reference's, which is the target itself [T].
        text: number of the text [T].
    """

    states: Mapping[int, torch.Tensor]
    following: torch.Tensor
    is_answer: torch.Tensor
    is_target: torch.Tensor
    text: torch.Tensor

    def __len__(self) -> int:
        return len(self.text)

    def of(self, picked: torch.Tensor) -> Places:
        """Some of the places; `picked` are numbers or a mask."""
        states = {depth: state[picked] for depth, state in self.states.items()}
        return Places(states, self.following[picked], self.is_answer[picked], self.is_target[picked], self.text[picked])


@torch.no_grad()
def read_places(
    model: PreTrainedModel,
    examples: Sequence[Example],
    depths: Sequence[int],
    *,
    seed: int = 0,
    advance: Advance = lambda done: None,
) -> Places:
    """States at the places that predict the answers, and at a few others, from one pass over each text.

    Args:
        model: runs in full.
        examples: prompts with answers of at least one token.
        depths: layers before which states are kept; those after the last are kept too.
        seed: of the draw of the other places.
        advance: called with the number of texts that were run.
    """
    layers, generator = decoder_layers(model), torch.Generator().manual_seed(seed)
    wanted = sorted({*depths, len(layers)})
    found: dict[int, tuple[list[int], dict[int, torch.Tensor]]] = {}
    for batch in by_tokens(list(enumerate(examples)), [len(one.tokens) for one in examples], BATCH_TOKENS):
        with captured(layers, wanted) as states:
            decoder_of(model)(**padded_inputs(model, [one.tokens[:-1] for _, one in batch]), use_cache=False)
        for row, (number, one) in enumerate(batch):
            size = len(one.tokens) - 1
            asked = size - one.answer + 1
            others = torch.randperm(max(asked - 1, 0), generator=generator)[:PROMPT_PLACES]
            places = sorted(others.tolist()) + list(range(asked - 1, size))
            own = {depth: state[row, -size:][places].cpu() for depth, state in states.items()}
            found[number] = (places, own)
        advance(len(batch))
    rows = [(number, one, *found[number]) for number, one in enumerate(examples)]
    is_answer = [
        torch.tensor([place >= len(one.tokens) - 1 - one.answer for place in places]) for _, one, places, _ in rows
    ]
    return Places(
        {depth: torch.cat([own[depth] for *_, own in rows]) for depth in wanted},
        torch.cat([torch.tensor([one.tokens[place + 1] for place in places]) for _, one, places, _ in rows]),
        torch.cat(is_answer),
        torch.cat([mask & one.from_reference for mask, (_, one, *_) in zip(is_answer, rows, strict=True)]),
        torch.cat([torch.full((len(places),), number) for number, _, places, _ in rows]),
    )


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How heads are trained.

    Attributes:
        references: weight of the cross-entropy where the target is known; the divergence from the full model has the
            rest, and all of the weight elsewhere.
        steps: of Adam, for each head, at most.
        batch: places of a step; three in four of them predict an answer.
        learning_rate: at first; half a cosine brings it down to nothing.
        vocabulary: tokens that the losses range over, at most, beside those that are drawn anew at each step.
        held: every so many-th text is held out, to choose the ridge and when to stop.
        look_every: steps between looks at the held-out texts.
        patience: looks without a smaller loss after which training ends.
        seed: of everything random.
    """

    references: float = 0.7
    steps: int = 240
    batch: int = 256
    learning_rate: float = 2e-4
    vocabulary: int = 2048
    held: int = 8
    look_every: int = 20
    patience: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HeadFit:
    """One fitted head.

    Attributes:
        head: in float32, on the CPU.
        loss: on held-out answer places, after the ridge regression and after training (nats a place).
        right: share of the held-out texts along which the head says every token of the answer.
    """

    head: Bridge
    loss: tuple[float, float]
    right: float


def fit_exit_heads(
    model: PreTrainedModel,
    places: Places,
    depths: Sequence[int],
    settings: HeadSettings,
    advance: Advance = lambda done: None,
) -> dict[int, HeadFit]:
    """A head for each of some depths; `advance` is called with the number of heads that were fitted."""
    is_held = places.text % settings.held == 0
    fitted, held = places.of(~is_held), places.of(is_held & places.is_answer)
    kept = _vocabulary(model, fitted, settings.vocabulary)
    found = {}
    for depth in depths:
        found[depth] = _Fitting(model, depth, fitted, held, kept, settings).fit()
        advance(1)
    return found


RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge strengths tried, as shares of the mean square of the inputs."""


class _Fitting:
    """Fits the head of one depth."""

    def __init__(
        self,
        model: PreTrainedModel,
        depth: int,
        fitted: Places,
        held: Places,
        kept: torch.Tensor,
        settings: HeadSettings,
    ) -> None:
        self._model, self._settings, self._kept = model, settings, kept
        n_layers = len(decoder_layers(model))
        self._fitted, self._held = fitted, held
        self._x, self._y = fitted.states[depth].float(), fitted.states[n_layers].float()
        self._held_x, self._held_y = held.states[depth].float(), held.states[n_layers].float()
        self._generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad(), head_on(model, kept):
            self._held_target = _logs(model, self._held_y)

    def fit(self) -> HeadFit:
        starts = [self._ridge(strength) for strength in RIDGES]
        losses = [self._held_loss(start) for start in starts]
        first = best = min(losses)
        kept = start = starts[losses.index(first)]
        parts = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors().items()}
        optimizer = torch.optim.Adam(parts.values(), lr=self._settings.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._settings.steps)
        since = 0
        for step in range(1, self._settings.steps + 1):
            with torch.enable_grad():
                loss = self._loss(Bridge.from_tensors(parts))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % self._settings.look_every == 0 or step == self._settings.steps:
                now = Bridge.from_tensors({name: part.detach().clone() for name, part in parts.items()})
                if (found := self._held_loss(now)) < best:
                    best, kept, since = found, now, 0
                elif (since := since + 1) >= self._settings.patience:
                    break
        return HeadFit(kept, (first, best), self._held_right(kept))

    def _ridge(self, strength: float) -> Bridge:
        """From states of size 1 to final states of size 1: a final norm sees no other difference."""
        x, y = (each / each.pow(2).mean(-1, keepdim=True).sqrt() for each in (self._x, self._y))
        weight = torch.where(self._fitted.is_answer, 1.0, 0.25)[:, None]
        mean_x, mean_y = ((each * weight).sum(0) / weight.sum() for each in (x, y))
        x, y = x - mean_x, y - mean_y
        inner, cross = (x * weight).T @ x, (x * weight).T @ y
        inner.diagonal().add_(strength * float(inner.diagonal().mean()))
        solution = torch.linalg.solve(inner, cross)
        size = float(self._x.pow(2).mean(-1).sqrt().mean())
        return Bridge((solution - torch.eye(len(solution)),), (mean_y - mean_x @ solution) * size)

    def _loss(self, head: Bridge) -> torch.Tensor:
        rows = self._drawn()
        drawn = torch.randint(self._model.config.get_text_config().vocab_size, (512,), generator=self._generator)
        kept = torch.unique(torch.cat([self._kept, drawn]))
        with head_on(self._model, kept):
            with torch.no_grad():
                target = _logs(self._model, self._y[rows])
            logs = _logs(self._model, head(self._x[rows]))
        following, is_target = self._fitted.following[rows], self._fitted.is_target[rows]
        return self._mixed(logs, target, kept, following, is_target).mean()

    def _drawn(self) -> torch.Tensor:
        """Places of a step."""
        answers = self._fitted.is_answer.nonzero()[:, 0]
        others = (~self._fitted.is_answer).nonzero()[:, 0]
        size = self._settings.batch
        n_others = size // 4 if len(others) else 0
        parts = [(answers, size - n_others), (others, n_others)]
        return torch.cat([p[torch.randint(len(p), (count,), generator=self._generator)] for p, count in parts if count])

    def _mixed(
        self,
        logs: torch.Tensor,
        target: torch.Tensor,
        kept: torch.Tensor,
        following: torch.Tensor,
        is_target: torch.Tensor,
    ) -> torch.Tensor:
        """The loss at each place [T], of log-probabilities [T, v] of the head and of the full model."""
        divergence, share = (target.exp() * (target - logs)).sum(-1), self._settings.references
        index = torch.searchsorted(kept, following).clamp(max=len(kept) - 1)
        surprise = -logs.gather(-1, index[:, None])[:, 0]
        return torch.where(is_target & (share > 0), share * surprise + (1 - share) * divergence, divergence)

    @torch.no_grad()
    def _held_loss(self, head: Bridge) -> float:
        with head_on(self._model, self._kept):
            logs = _logs(self._model, head(self._held_x))
        held = self._held
        return float(self._mixed(logs, self._held_target, self._kept, held.following, held.is_target).mean())

    @torch.no_grad()
    def _held_right(self, head: Bridge) -> float:
        with head_on(self._model, self._kept):
            said = self._kept[output_logits(self._model, head(self._held_x)).argmax(-1)]
        wrong = torch.unique(self._held.text[said != self._held.following])
        return 1 - len(wrong) / len(torch.unique(self._held.text))


def _logs(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    return output_logits(model, states).float().log_softmax(-1)


@torch.no_grad()
def _vocabulary(model: PreTrainedModel, places: Places, size: int) -> torch.Tensor:
    """[v], ascending: the tokens that follow, the commonest first, and the likely ones where answers begin."""
    answers = places.is_answer.nonzero()[:, 0]
    some = answers[:: max(1, len(answers) // 512)]
    states = places.states[max(places.states)][some]
    likely = torch.cat(
        [output_logits(model, part).topk(8).indices for part in torch.split(states.float(), AT_ONCE)]
    ).flatten()
    said = places.following[places.is_answer]
    tokens, counts = torch.unique(torch.cat([said, likely, places.following]), return_counts=True)
    commonest: torch.Tensor = tokens[counts.argsort(descending=True)[:size]]
    kept: torch.Tensor = torch.unique(torch.cat([said, commonest]))
    return kept
