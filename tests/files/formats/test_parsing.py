"""What JSON and YAML of other people may hold, and that they are read in one place only."""

import re
from pathlib import Path

import pytest

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import (
    DEEPEST,
    MOST_DIGITS,
    dump_yaml,
    parse_json,
    parse_yaml,
    read_json,
    read_lines,
    read_yaml,
    whole_characters,
)

ROOT = Path(__file__).parents[3]


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (nested(100_000), "nested deeper"),
        (nested(DEEPEST + 1), "nested deeper"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper"),
        ('{"a": ' + "1" * (MOST_DIGITS + 1) + "}", "digits"),
        ('{"a": ' + "1" * 1_000_000 + "}", "digits"),
        ('{"a": [0, NaN]}', "NaN is no JSON number"),
        ('{"a": [0, -Infinity]}', "-Infinity is no JSON number"),
        ('{"a": [0, 1e999]}', "'a[1]' is no finite"),
        ('{"a": {"b": ["\\ud83d"]}}', "'a.b[0]' holds half a character"),
        ('{"\\uDC00": 1}', "a key holds half a character"),
        ('{"a": 1', "is not JSON: Expecting ',' delimiter at column 8"),
        ('{"a":\n1', "at line 2, column 2"),
        (b'{"a": "\xff"}', "byte 7 is 0xff"),
        (b"[" + b" " * (64 << 20) + b"]", "too large"),
    ],
)
def test_json_out_of_bounds_is_refused_by_name(text, said):
    with pytest.raises(UsageError) as refused:
        parse_json(text, "some.json", error=UsageError)
    assert refused.value.message.startswith("some.json")
    assert said in refused.value.message


def test_json_within_the_bounds_is_what_it_was():
    assert parse_json(nested(DEEPEST), "some.json") is not None
    assert parse_json("9" * MOST_DIGITS, "some.json") == int("9" * MOST_DIGITS)
    assert parse_json('["\\ud83d\\ude00", 1e308, "1e999"]', "some.json") == ["😀", 1e308, "1e999"]
    assert str(parse_json("NaN", "some.json", nan=True)) == "nan"
    assert parse_json('{"a\\ud83d": ["b\\ude00c"]}', "some.json", halves=True) == {"a\ufffd": ["b\ufffdc"]}


ALIAS_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIAS_BOMB, "line 2: YAML aliases (*a0) are not read"),
        ("a: &a\n  b: *a\n", "line 2: YAML aliases"),
        ("a:\n  <<: *none\n", "YAML aliases"),
        ("[" * 100_000, "nested deeper"),
        ("{a: " * 100_000, "nested deeper"),
        ("- " * (DEEPEST + 2) + "a", "nested deeper"),
        ("a: " + "1" * (MOST_DIGITS + 1), "line 1: a number has more"),
        ("a: 0x" + "f" * 500, "too many digits"),
        ("a: 1:" + "59:" * 200 + "1", "too many digits"),
        ("a: .inf", "'a' is no finite"),
        ("a: [1.0e+999]", "'a[0]' is no finite"),
        ("a: !!python/object/apply:os.system [true]", "line 1: tag:yaml.org,2002:python"),
        ("a: !Evil {}", "line 1: !Evil runs code"),
        ("a: !!int seven", "is not YAML"),
        ("a: !!timestamp [1]", "a date that is no scalar"),
        ('a: "\\ud83d"', "'a' holds half a character"),
        ("? [1]\n: 2", "unhashable"),
        ("a: [", "line 1"),
        ("a: \x00", "is not YAML"),
        ("a" * (1 << 20) + ": 1", "too large"),
    ],
)
def test_yaml_out_of_bounds_is_refused_by_name(text, said):
    with pytest.raises(CheckpointError) as refused:
        parse_yaml(text, "some.yaml")
    assert refused.value.message.startswith("some.yaml")
    assert said in refused.value.message


def test_yaml_dates_are_text_and_the_rest_is_what_it_was():
    found = parse_yaml(
        "a: 2024-02-31\nb: 2024-02-29\nc: !!timestamp 2024-13-01\nd: [1_000, 1.5, yes, ~, x]\n'1': 07", "f"
    )
    assert found == {"a": "2024-02-31", "b": "2024-02-29", "c": "2024-13-01", "d": [1000, 1.5, True, None, "x"], "1": 7}
    assert parse_yaml("", "f") is None
    assert parse_yaml("a: '" + "1" * 1000 + "'", "f") == {"a": "1" * 1000}


def test_files_that_cannot_be_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff")
    for path, said in (
        ("none", "is missing"),
        ("pipe", "no regular file"),
        ("list.json", "must hold a JSON object, got list"),
    ):
        with pytest.raises(UsageError, match=said):
            read_json(tmp_path / path, error=UsageError)
    with pytest.raises(CheckpointError, match="byte 3 is 0xff"):
        read_yaml(tmp_path / "bad.yaml")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_yaml(tmp_path)


def test_halves_of_characters_are_replaced_one_by_one():
    assert whole_characters("plain 😀") == "plain 😀"
    assert whole_characters("\ud83da\ude00\ud83d\ude00") == "\ufffda\ufffd😀"


def test_a_log_ends_at_the_line_that_was_cut_off(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": NaN}\n{"a": "x\u2028y"}\n{"a":')
    assert [str(line["a"]) for line in read_lines(tmp_path / "log.jsonl")] == ["1", "nan", "x\u2028y"]


def test_what_is_written_as_yaml_can_be_read(tmp_path):
    shared = {"name": "zero", "date": "2024-02-31", "text": "a: *b"}
    content = {"one": shared, "two": shared, "list": [shared]}  # PyYAML would write references
    assert parse_yaml(dump_yaml(content), "f") == content


# Workers run in an engine's own Python and import nothing of upcycle; what they read is what upcycle wrote.
OWN_READERS = ("upcycle/files/formats/parsing.py", "upcycle/verification/engines/workers/")


def test_nothing_else_parses_json_or_yaml():
    asks = re.compile(r"json\.loads?\(|from json import|yaml\.(?:safe_|full_|unsafe_)?(?:load|parse|scan|compose)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("upcycle", "kernels", "trainers", "splitters")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(OWN_READERS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line)
    ]
    assert not found
