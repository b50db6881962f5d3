import json

import pytest

from backbone.strict_json import NotJSONError, parse


@pytest.mark.parametrize(
    "value", [{"a": [1, 2.5, None, True]}, "ab\u2028c\x85", "\U0001f600", 10**400, {"a": {"a": 1}}, [[[]]], -0.0]
)
def test_what_is_json_is_read_as_the_library_reads_it(value) -> None:
    for ascii_only in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{oops", "Expecting property name enclosed in double quotes at column 2"),
        ('{\n"a": }', "Expecting value at line 2, column 6"),
        ("[NaN]", "it holds NaN, which JSON does not have"),
        ("-Infinity", "it holds -Infinity"),
        ("1e999", "it holds the number 1e999, which is too large"),
        ("9" * 5000, "too many digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        (r'"\ud800"', r"it contains an unpaired surrogate, '\\ud800'"),
        (r'{"\udfff": 1}', "an unpaired surrogate"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' comes twice"),
    ],
)
def test_what_is_not_json_is_named(text, reason) -> None:
    with pytest.raises(NotJSONError, match=reason):
        parse(text)
