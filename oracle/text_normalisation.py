"""What judges compare of two texts: folded letters, words of any script, numbers."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from functools import lru_cache
from typing import Any

_CLOSING = r"\s.,;:!?…。．，、；：！？؟،؛।"
_AT_THE_END = re.compile(f"[{_CLOSING}]+$")

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Letters of scripts that are written without spaces: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""


def folded(text: str) -> str:
    """The text without case; composed and decomposed characters are equal (Unicode's canonical caseless form)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


def plain(text: str) -> str:
    """The folded text without outer space and closing marks (`. , ; : ! ?` and their like in other scripts).

    A text of marks alone keeps them.
    """
    text = folded(text).strip()
    return _AT_THE_END.sub("", text) or text


def may_become_plain(begun: str, wanted: str) -> bool:
    """Whether a text that begins like this can still have the `plain` form `wanted`."""
    so_far, whole = (unicodedata.normalize("NFD", text) for text in (folded(begun).strip(), wanted))
    while so_far and unicodedata.combining(so_far[-1]):  # the next mark may be sorted before these
        so_far = so_far[:-1]
    return whole.startswith(so_far) or (so_far.startswith(whole) and not _AT_THE_END.sub("", so_far[len(whole) :]))


def words(text: str) -> list[str]:
    """Words in the sense of ROUGE: of ASCII letters and digits as `rouge-score` has them, stemmed; others unstemmed.

    A script without spaces gives one word for each letter.
    """
    found = [""]
    for letter in folded(text):
        kind = unicodedata.category(letter)[0]
        is_alone = bool(_UNSPACED.match(letter))
        if kind == "M" and found[-1]:
            found[-1] += letter
        elif kind not in "LN":
            found.append("")
        elif is_alone or _UNSPACED.match(found[-1]):
            found.append(letter)
        else:
            found[-1] += letter
    stem = _rouge_tokenizer().tokenize
    return [part for word in found if word for part in (stem(word) if word.isascii() else [word])]


@lru_cache
def _rouge_tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


_NUMERAL = r"(?:\d+(?:[.,]\d+)*|(?<![\w.])\.\d+)(?:[eE][-+−]?\d{1,4}(?![\w]))?"
_MINUS, _JOINT, _CURRENCY = "[-−–]", "[-−–—/:^]", "[$€£¥]?"
_UNITS = re.compile("[$€£¥%]")
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]%]){_MINUS}{_CURRENCY})?(?:\d{{1,3}} (?=\d+/\d+(?![/\d])))?{_NUMERAL}"
    rf"(?:%?{_JOINT}{_CURRENCY}{_NUMERAL})*"
)
_GROUP_MARK = re.compile(r"(?<=\d)['’_\u00a0\u202f](?=\d{3}(?!\d))")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_COMMAS = re.compile(r"(?!0)\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?")
_DOTS = re.compile(r"(?!0)\d{1,3}(?:(?:\.\d{3}){2,}|(?:\.\d{3})+,\d+)")
_ONE_MARK = re.compile(r"\d*[.,]?\d+")


def last_number(text: str) -> tuple[Decimal, ...] | None:
    """The last number of a text; what is joined without a space is one: `3-5` and `10:30` are pairs.

    `3/4` and `1 3/4` are fractions. A comma or several dots before groups of three digits mark thousands
    (`1,234`, `1.234.567`, `1.234,5`, India's `1,23,456`), other single commas the decimals (`1,5`); a single dot
    always does. A minus is a sign unless a letter, a digit or a closing bracket stands before it.
    """
    text = _VULGAR.sub(lambda one: " " + unicodedata.normalize("NFKC", one[0]).replace("⁄", "/"), text)
    found = [match[0] for match in _NUMBER.finditer(_GROUP_MARK.sub("", text))]
    return _values(found[-1]) if found else None


def _values(number: str) -> tuple[Decimal, ...]:
    sign = Decimal(-1 if re.match(_MINUS, number) else 1)
    bare = _UNITS.sub("", number[1:] if sign < 0 else number)
    whole, _, joined = bare.rpartition(" ")
    numerals = re.split(rf"(?<![eE]){_JOINT}", joined)  # the minus of an exponent joins nothing
    parts = [value for numeral in numerals for value in _decimals(numeral)]
    if len(parts) == 2 and "/" in joined and parts[1]:
        parts = [(Decimal(whole or 0) * parts[1] + parts[0]) / parts[1]]
    return (sign * parts[0], *parts[1:])


def _decimals(numeral: str) -> list[Decimal]:
    digits, mark, exponent = numeral.replace("−", "-").lower().partition("e")
    if _COMMAS.fullmatch(digits):
        digits = digits.replace(",", "")
    elif _DOTS.fullmatch(digits):
        digits = digits.replace(".", "")
    elif not _ONE_MARK.fullmatch(digits):
        return [Decimal(part) for part in re.split("[.,]", digits)]
    return [Decimal(digits.replace(",", ".") + mark + exponent)]
