"""A kill at any moment leaves the old state or the new one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankleap.errors import DiskSpaceError, InputError
from rankleap.files import (
    append_jsonl,
    read_json,
    read_jsonl,
    require_space,
    write_aside,
    write_json,
    write_manifest,
    write_text,
)


class Killed(Exception):
    pass


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(Killed), write_aside(tmp_path / "a.txt") as aside:
        aside.write_text("half of the n")
        raise Killed
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_failed_write_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_text("old")
    with pytest.raises(Killed), write_aside(tmp_path / "d") as aside:
        aside.mkdir()
        (aside / "new").write_text("half of the n")
        raise Killed
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["old"]


def test_the_destination_is_untouched_until_the_write_is_done(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with write_aside(tmp_path / "a.txt") as aside:
        aside.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
        assert aside.name.startswith(".")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    for generation in ("first", "second"):
        with write_aside(tmp_path / "deep" / "d") as aside:
            (aside / "inner").mkdir(parents=True)
            (aside / "inner" / generation).write_text(generation)
    assert names(tmp_path / "deep") == ["d"]
    assert names(tmp_path / "deep" / "d" / "inner") == ["second"]


def test_nothing_written_aside_is_an_error_not_an_empty_result(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_aside(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


rows_of_json = st.lists(
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=8), max_size=3), max_size=5
)


@given(rows_of_json)
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("")
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows


@pytest.mark.parametrize("kept", range(1, len('{"step": 2}')))
def test_a_line_torn_by_a_kill_is_dropped_and_the_next_row_is_not_lost(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2}'[:kept])
    assert read_jsonl(path) == [{"step": 1}]
    append_jsonl(path, {"step": 3})
    append_jsonl(path, {"step": 4})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}, {"step": 4}]


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("after", ['{"a": 2}\n', ""])
def test_a_bad_whole_line_is_an_error_with_file_and_line(tmp_path: Path, after: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": \n' + after)
    with pytest.raises(InputError, match=r"m\.jsonl, line 2"):
        read_jsonl(path)


def test_a_line_separator_inside_a_string_does_not_split_the_line(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.jsonl"
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_jsonl(path) == rows


def test_half_written_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"steps": [1, 2')
    with pytest.raises(InputError, match=r"index\.json is not valid JSON"):
        read_json(tmp_path / "index.json")
    with pytest.raises(InputError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_never_holds_what_json_cannot(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"value": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        append_jsonl(tmp_path / "a.jsonl", {"value": value})
    assert read_jsonl(tmp_path / "a.jsonl") == []


def test_a_manifest_says_what_made_it_and_with_which_versions(tmp_path: Path) -> None:
    write_manifest(tmp_path, made_by="test", base="here")
    manifest = read_json(tmp_path / "manifest.json")
    assert (manifest["made_by"], manifest["base"]) == ("test", "here")
    assert {"python", "torch", "transformers"} <= set(manifest["versions"])


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match=r"needs .* MB, the disk has"):
        require_space(tmp_path / "not" / "there" / "yet", 10**18)
    require_space(tmp_path / "not" / "there" / "yet", 1)
    assert names(tmp_path) == []
