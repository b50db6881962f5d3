"""What the files of a model say about a run: family, chat template and tokens. Loads neither torch nor weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbone.errors import LoadError, reason_of
from backbone.model_source import check_supported, local_file, local_settings, look_at
from oracle.chat import ChatTemplate, template_text
from oracle.prompts import check_context

if TYPE_CHECKING:
    from pipelines.run.model import Loaded

TOGETHER = 256
"""Prompts that are turned into tokens at once."""


class ModelFiles:
    """A folder's files, or those of a repository in the hub's cache; of any other source nothing is known.

    Args:
        loaded: the model, where it is loaded already, and its tokenizer.

    Attributes:
        source: as `backbone.loading.load_backbone` takes it.
        config: of `config.json`; empty where that is not on this machine.

    Raises:
        LoadError: there cannot be a model, or one of quantised weights.
        UnsupportedModelError: see `backbone.model_source.check_supported`.
    """

    def __init__(self, source: str, loaded: Loaded | None = None) -> None:
        self.source, self.config = source, loaded[0].config.to_dict() if loaded else look_at(source) or {}
        if self.config:
            check_supported(self.config)
        if self.config.get("quantization_config"):
            raise LoadError(f"the weights of {source!r} are quantised; name floating-point weights or a GGUF file")

    @property
    def n_layers(self) -> int | None:
        found = self.config.get("num_hidden_layers", self.config.get("n_layer"))
        return found if isinstance(found, int) else None

    @cached_property
    def _tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`; None where the files of one are not here."""
        if (path := local_file(self.source, "tokenizer.json")) is None:
            return None
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise LoadError(f"{path} is damaged: {reason_of(error)}") from None

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def template(self, wanted: str) -> ChatTemplate | None:
        """What `data.chat_template` names. Raises ChatError for a file that cannot be used."""
        if wanted == "never":
            return None
        settings = local_settings(self.source, "tokenizer_config.json")
        named = {name: value for name, value in settings.items() if name.endswith("_token")}
        texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
        tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
        if wanted != "auto":
            return ChatTemplate.of_file(Path(wanted), tokens)
        path, own = local_file(self.source, "chat_template.jinja"), settings.get("chat_template")
        if path is not None:
            own = template_text(path)
        if isinstance(own, list):
            own = {each.get("name"): each.get("template") for each in own}.get("default")
        return ChatTemplate(own, tokens) if isinstance(own, str) else None

    def check_vocabulary(self) -> None:
        """As `backbone.loading` checks it: raises LoadError for tokens that the embedding has no rows for.

        Placeholders of images, sounds and films may lie behind the rows: text does not contain them (Gemma 3).
        """
        rows, tokenizer = self.config.get("vocab_size"), self._tokenizer
        if tokenizer is None or not isinstance(rows, int):
            return
        settings = local_settings(self.source, "tokenizer_config.json")
        placeholders = {settings.get(f"{kind}_token") for kind in ("image", "audio", "video")}
        beyond = {token for token, place in tokenizer.get_vocab().items() if place >= rows} - placeholders
        if beyond:
            raise LoadError(
                f"the tokenizer of {self.source!r} has {tokenizer.get_vocab_size():,} tokens, and the embedding of the "
                f"model {rows:,} rows (vocab_size); use the tokenizer that the model was trained with"
            )

    def checked_lengths(self, prompts: Iterable[tuple[str, str]], new_tokens: int) -> list[int]:
        """Tokens of some prompts (id, text), without those that the tokenizer adds.

        Raises:
            PromptError: one that leaves no room for its answer.
            LoadError: one with a token that the embedding lacks.
        """
        limit = self.config.get("max_position_embeddings", self.config.get("n_positions"))
        rows, lengths = self.config.get("vocab_size"), []
        for name, ids in self._token_ids(prompts):
            if isinstance(rows, int) and max(ids, default=0) >= rows:
                raise LoadError(
                    f"the prompt {name!r:.80} holds token {max(ids)}, and the model's embedding has {rows:,} rows "
                    "(vocab_size): placeholders, such as those of images, cannot be read as text"
                )
            check_context(name, len(ids), new_tokens, limit)
            lengths.append(len(ids))
        return lengths

    def _token_ids(self, prompts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[int]]]:
        left = iter(prompts)
        while batch := list(islice(left, TOGETHER)):
            texts = [text.encode(errors="replace").decode() for _, text in batch]
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            yield from ((name, each.ids) for (name, _), each in zip(batch, found, strict=True))
