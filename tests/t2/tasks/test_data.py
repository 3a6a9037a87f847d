from __future__ import annotations

import gzip

import pytest

from t2.tasks.base import Problem
from t2.tasks.data import HubDataset, hold_out, prompt_key, read_rows, read_split
from t2.weights.files import FileFormatError

HUB = HubDataset("some/set", ("main",))


def problem(text: str) -> Problem:
    return Problem(({"role": "user", "content": text},), text)


def test_rows_know_their_place(write):
    rows = read_rows(write([{"q": "a"}, {"q": "b"}], "train"))
    assert [row.text("q") for row in rows] == ["a", "b"]
    assert rows[1].where.endswith(("line 2", "row 2"))
    with pytest.raises(FileFormatError, match=r"train\..* 1: no field 'x'; its fields are q"):
        rows[0].text("x")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": 1}\n\n{"a": \n', r"x\.jsonl, line 3: not JSON"),
        ("[1]\n", r"x\.jsonl, line 1: expected a JSON object, got list"),
    ],
)
def test_damaged_lines_are_named(tmp_path, text, match):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(FileFormatError, match=match):
        read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.parquet", b"PAR1 no"),
        ("x.jsonl.gz", b"no gzip"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20]),
        ("x.jsonl", b'{"a": "\xff"}'),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=name):
        read_rows(tmp_path / name)


def test_files_of_other_kinds_and_missing_ones(tmp_path):
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"expected a file named \*\.jsonl, .*x\.csv"):
        read_rows(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no train\.jsonl.*there: x\.csv"):
        read_split(tmp_path, HUB, "train")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_split(tmp_path / "nowhere", HUB, "train")


@pytest.mark.parametrize("name", ["train", "main/train-00000-of-00001", "main/deep/train"])
def test_files_of_a_split_are_found_as_on_the_hub(write, tmp_path, name):
    write([{"q": "a"}], name)
    write([{"q": "b"}], name.replace("train", "test"))
    if "main" in name:
        write([{"q": "c"}], name.replace("main", "other"))
    assert [row.fields["q"] for row in read_split(tmp_path, HUB, "train")] == ["a"]


def test_files_by_split(write):
    path = write([{"q": "a"}], "mine")
    assert len(read_split({"train": path}, HUB, "train")) == 1
    with pytest.raises(ValueError, match="no file for split 'test', only for 'train'"):
        read_split({"train": path}, HUB, "test")
    with pytest.raises(ValueError, match="is one file; expected a folder"):
        read_split(path, HUB, "train")
    assert len(read_split(path, HubDataset("one", splits=("test",)), "test")) == 1


def test_the_hub_is_read_by_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"q": config}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_split(None, HubDataset("some/set", ("a", "b")), "test")
    assert asked == [("some/set", "a", "test"), ("some/set", "b", "test")]
    assert [row.text("q") for row in rows] == ["a", "b"] and rows[1].where == "some/set (b), test, row 1"

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"some/set \(main\), split train, cannot be loaded from the Hub: no route"):
        read_split(None, HUB, "train")


def test_held_out_problems_depend_on_the_prompts_alone():
    problems = [problem(str(i)) for i in range(50)]
    rest, held = hold_out(problems, 10, "size")
    other_rest, other_held = hold_out(problems[::-1], 10, "size")
    assert len(rest) == 40 and len(held) == 10
    assert {p.reference for p in held} == {p.reference for p in other_held}
    assert [p.reference for p in rest] == [p.reference for p in other_rest[::-1]]


def test_no_prompt_is_on_both_sides():
    problems = [problem(str(i % 10)) for i in range(40)]
    rest, held = hold_out(problems, 4, "size")
    assert len(held) == 4 and len(rest) == 24
    assert not {prompt_key(p) for p in rest} & {prompt_key(p) for p in held}


@pytest.mark.parametrize("size", [-1, 10, 1.5, True])
def test_sizes_that_leave_nothing(size):
    with pytest.raises(ValueError, match=r"size: expected an integer in \[0, 9\] for 10 prompts"):
        hold_out([problem(str(i)) for i in range(10)], size, "size")
