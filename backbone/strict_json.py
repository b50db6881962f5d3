"""JSON by the book: what `json.loads` lets through or dies of is refused with a reason."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

LONGEST_NAME = 200
"""Characters of a name in a file that may come from anybody."""


class NotJSONError(ValueError):
    """A text that is not JSON; the message says why in a few words."""


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        NotJSONError: also for NaN and Infinity, numbers that no float or `int()` holds, a key that comes twice, halves
            of a character (surrogates), which no tokenizer and no file takes, and values nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise NotJSONError(f"{error.msg} at {line}column {error.colno}") from None
    except UnicodeEncodeError as error:
        raise NotJSONError(f"it contains an unpaired surrogate, {error.object[error.start]!r}") from None
    except RecursionError:
        raise NotJSONError("its values are nested too deeply") from None
    except NotJSONError:
        raise
    except ValueError:
        raise NotJSONError("it holds a number with too many digits") from None
    return value


def _refuse(constant: str) -> NoReturn:
    raise NotJSONError(f"it holds {constant}, which JSON does not have")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise NotJSONError(f"it holds the number {number[:20]}, which is too large")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotJSONError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found
