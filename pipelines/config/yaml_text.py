"""YAML as configurations use it: what could be meant otherwise, or could grow without bound, is refused."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml


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


def parse(content: bytes | str) -> Any:
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
        raise NotYAMLError(
            f"the byte {error.object[error.start]:#04x} is not UTF-8; save it in that encoding"
        ) from None
    except UnicodeEncodeError as error:
        raise NotYAMLError(f"it holds half a character, {error.object[error.start]!r}") from None
    except RecursionError:
        raise NotYAMLError("its values are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a number or a date that Python does not have
        raise NotYAMLError(" ".join(str(error).split())) from None
    return value
