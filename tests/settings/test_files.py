"""Settings files: plain values with their lines, and every trap of YAML said rather than fallen into."""

import json
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bertpair.errors import ConfigError
from bertpair.settings.files import MAX_BYTES, Layer, read_settings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def read(path: Path, content: str | bytes) -> Layer:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_settings(path)


def refusal(path: Path, content: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, content)
    return str(caught.value)


def test_values_and_lines(path: Path) -> None:
    found = read(
        path, "\ufeff# note\nseed: 3\nlearning_rate: 2e-5\nx: {a: 1.5, b: -2}\nlabels: [b, 'yes', \"3\"]\n"
    )
    assert found.values == {
        "seed": 3,
        "learning_rate": "2e-5",
        "x": {"a": 1.5, "b": -2},
        "labels": ["b", "yes", "3"],
    }
    lines = [("seed", 2), ("learning_rate", 3), ("x", 4), ("labels", 5)]
    inside = {f"x.{name}": f"{path}:4: x" for name in ("a", "b")}
    assert found.where == {name: f"{path}:{line}: {name}" for name, line in lines} | inside
    assert not found.faults


def test_a_setting_stands_where_its_name_stands(path: Path) -> None:
    found = read(path, "labels:\n  - a\n  - b\nseed:\n  3\ncompare: [a,\n  b]\ndevice: cpu\n")
    lines = {name: where.removeprefix(f"{path}:").split(":")[0] for name, where in found.where.items()}
    assert lines == {"labels": "1", "seed": "4", "compare": "6", "device": "8"}


@pytest.mark.parametrize("text", ["", "# only notes\n", "null\n", "---\n"])
def test_an_empty_file_sets_nothing(path: Path, text: str) -> None:
    assert read(path, text).values == {}


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "No",
        "on",
        "OFF",
        "true",
        "null",
        "~",
        "3",
        "-7",
        "0",
        "1.5",
        "-2.5",
        "2020-01-01",
        "a b",
        "2e-5",
    ],
)
def test_plain_scalars_read_as_pyyaml_reads_them(path: Path, text: str) -> None:
    expected = text if text == "2020-01-01" else yaml.safe_load(text)
    assert read(path, f"a: {text}").values == {"a": expected}


@pytest.mark.parametrize("text", ["010", "0x1F", "1_000", "1:30", "0b11", "1:30.5", ".inf", ".nan", "9" * 30])
def test_numbers_that_are_not_what_they_look_like_are_refused(path: Path, text: str) -> None:
    found = read(path, f"a: 1\nb: [x, {text}]\nc: 2\n")
    assert found.values == {"a": 1, "c": 2}
    (fault,) = found.faults
    assert fault.startswith(f"{path}:2: found '") and "quote it" in fault
    assert read(path, f"b: '{text}'").values == {"b": text}


def test_all_faults_of_a_file_at_once(path: Path) -> None:
    found = read(path, "a: 1\na: 2\nyes: 3\nb: 010\nc: !!set {x}\nd: {e: 1, e: 2}\nf: !ours 1\n? [g]\n: 1\n")
    starts = [
        ":2: a is given twice",
        ":3: expected a name, found true",
        ":4: found '010'",
        ":5: found the tag",
        ":6: 'e' is given twice",
        ":7: found",
        ":8: expected a name, found a list",
    ]
    for fault, start in zip(found.faults, starts, strict=True):
        assert fault.startswith(f"{path}{start}"), fault
    assert found.values == {"a": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, 2\nb: 3\n", ":2: not YAML that can be read"),
        ("a: 1\n\tb: 2\n", ":2: not YAML that can be read"),
        ("- a\n- b\n", ":1: expected lines of `name: value`"),
        ("just text", ":1: expected lines of `name: value`"),
        ("a: 1\n---\nb: 2\n", "not YAML that can be read"),
        ("x: &a [1]\ny: *a\n", ":2: not YAML that can be read: aliases"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "aliases (*name) are not allowed"),
        ("a: b\x00c", "not YAML that can be read"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_not_flat_yaml_is_refused_with_its_line(path: Path, text: str, said: str) -> None:
    message = refusal(path, text)
    assert message.startswith(str(path)) and said in message and "\n" not in message


def test_an_alias_bomb_is_refused_at_once(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    start = time.process_time()
    assert "aliases" in refusal(path, "\n".join(lines))
    assert time.process_time() - start < 2


def test_python_objects_are_not_made(path: Path) -> None:
    (fault,) = read(path, "a: !!python/object/apply:os.system ['touch pwned']\n").faults
    assert "found the tag tag:yaml.org,2002:python/object/apply:os.system" in fault


def test_files_that_cannot_be_read(tmp_path: Path, path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file"):
        read_settings(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_settings(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings("a\0b")
    assert f"{path}:2: found bytes that are not UTF-8" in refusal(path, b"a: 1\nb: \xff\xfe\n")
    assert "more than 256 KiB" in refusal(path, b"#" * (MAX_BYTES + 1))


def test_json_is_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "args.json"
    values = {"learning_rate": 2e-5, "labels": ["😀", "\t"], "fp16": False, "x": None}
    path.write_text(json.dumps(values, indent="\t"))
    assert read_settings(path).values == values
    for text, said in [
        ('{"a": 1,\n "a": 2}', "the key 'a' stands there twice"),
        ("{\n1}", "not usable JSON .*line 2"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_settings(path)
    path.write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(ConfigError, match="not usable JSON"):
        read_settings(path)


yaml_like = st.text(st.sampled_from("ab:-?,[]{}&*!|>'\"%@`#<=~ \n\t01.e_+yn"), max_size=40).map(str.encode)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=1000)
@given(st.binary(max_size=60) | yaml_like, st.sampled_from(["c.yaml", "c.json"]))
@example(b"a: !!bool x", "c.yaml")
@example(b"a: !!int x\nb: !!float x\nc: !!binary x\nd: !!timestamp x", "c.yaml")
@example(b"? !!seq a\n: 1", "c.yaml")
@example(b"a: !!seq {}", "c.yaml")
@example(b'{"a": NaN, "b": 1e999}', "c.json")
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    try:
        found = read(tmp_path / name, content)
    except ConfigError as error:
        assert str(error).startswith(str(tmp_path / name))
    else:
        assert all(isinstance(key, str) for key in found.values)
