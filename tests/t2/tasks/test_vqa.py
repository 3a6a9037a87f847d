from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from t2.tasks import Problem, get
from t2.tasks.data import hold_out, prompt_key
from t2.tasks.images import StoredImage, open_image
from t2.tasks.vqa import accuracy, normalise
from t2.weights.files import FileFormatError
from tests.t2.tasks.vqa_files import ANSWERS, COLOURS, jpeg, okvqa_files, textvqa_files


def leave_one_out(answer: str, references: list[str]) -> float:
    """The definition of VQA's accuracy, word for word."""
    scores = []
    for left_out in range(len(references)):
        others = [reference for i, reference in enumerate(references) if i != left_out]
        scores.append(min(1, others.count(answer) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_is_the_average_over_annotators_left_out(same: int, expected: float):
    references = ["yes"] * same + [f"no{i}" for i in range(10 - same)]
    assert accuracy("yes", references) == pytest.approx(expected) == pytest.approx(leave_one_out("yes", references))


def test_accuracy_of_fewer_people():
    for people in range(2, 9):
        for same in range(people + 1):
            references = ["yes"] * same + ["no"] * (people - same)
            assert accuracy("yes", references) == pytest.approx(leave_one_out("yes", references))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red Car.", "red car"),
        ("two dogs and an apple", "2 dogs and apple"),
        ("None", "0"),
        ("Ten\n", "10"),
        ("dont youre couldn'tve couldnt've", "don't you're couldn't've couldn't've"),
        ("twas 'ow'sat yall'll maam", "'twas 'ow's'at y'all'll ma'am"),
        ("somebody'd", "somebodyd"),
        ("shes lets well", "shes lets well"),  # not in the published list
        ("red/white", "red white"),
        ("red, white", "red white"),
        ("well - done", "well done"),
        ("1,000", "1000"),
        ("1,000/2", "10002"),  # a number with a comma drops all punctuation
        ("3.5", "3.5"),
        ("5 p.m.", "5 pm"),
        ("what?", "what"),
        ("men's room", "men's room"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_published(answer: str, expected: str):
    assert normalise(answer) == expected


def test_okvqa_compares_as_is_where_all_people_agree(tmp_path: Path):
    task = get("okvqa", data=okvqa_files(tmp_path))
    assert task.score(["1,000"] * 10, "1000") == 0 and task.score(["1,000"] * 10, " 1,000\n") == 1
    assert task.score(["1,000"] * 9 + ["many"], "1000") == 1
    assert task.score(["The Zoo"] * 10, "the zoo") == 1 and task.score(["The Zoo"] * 10, "zoo") == 0


def test_textvqa_always_normalises(tmp_path: Path):
    task = get("textvqa", data=textvqa_files(tmp_path))
    assert task.score(["1,000"] * 10, "1000") == 1
    assert task.score(["men's"] * 10, "men 's") == 1
    assert task.score(["stop"] * 10, "The stop?") == 1


def test_rewards_are_1_for_what_two_people_said(tmp_path: Path):
    task = get("textvqa", data=textvqa_files(tmp_path))
    (problem, *_) = task.problems("test")
    answers = ["red", "A red", "2", "blue", ""]
    assert problem.reference == tuple(ANSWERS["red"]) and problem.solution == "red"
    assert task.scores([problem] * 5, answers) == pytest.approx([1, 1, 0.3, 0, 0])
    assert task.rewards([problem] * 5, answers) == [1, 1, -1, -1, -1]
    graded = get("textvqa", data=tmp_path, graded_reward=True)
    assert graded.rewards([problem] * 5, answers) == pytest.approx([1, 1, -0.4, -1, -1])
    two = Problem(problem.messages, ("a b", "a b", *"cdefghij"))
    assert task.rewards([two], ["a b"]) == [1]


def test_textvqa_official_files(tmp_path: Path):
    task = get("textvqa", data=textvqa_files(tmp_path), validation_size=2)
    train, validation, test = (task.problems(split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (4, 2, 3)
    assert test[0].messages == (
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "what colour is it\nAnswer the question using a single word or phrase."},
            ],
        },
    )
    (image,) = test[0].images
    assert image.key == "valred" and open_image(image).size == (40, 30)
    assert open_image(image).getpixel((3, 3))[0] > 150
    with_words = get("textvqa", data=str(tmp_path), ocr_tokens=True, instruction=None).problems("test")[1]
    assert with_words.messages[0]["content"][1]["text"] == "what colour is it\nReference OCR token: STOP, valgreen"


def test_okvqa_official_files(tmp_path: Path):
    task = get("okvqa", data=okvqa_files(tmp_path / "data"), validation_size=1)
    assert [len(task.problems(split)) for split in ("train", "validation", "test")] == [2, 1, 3]
    problem = task.problems("test")[2]
    assert problem.reference == tuple(ANSWERS["blue"]) and problem.images[0].key == "9"
    assert open_image(problem.images[0]).getpixel((3, 3))[2] > 150
    elsewhere = tmp_path / "images"
    (tmp_path / "data" / "val2014").rename(elsewhere)
    questions = tmp_path / "data" / "OpenEnded_mscoco_val2014_questions.json"
    by_split = get("okvqa", data={"val2014": questions}, images=elsewhere).problems("test")
    assert [p.messages for p in by_split] == [p.messages for p in task.problems("test")]


@pytest.mark.parametrize("name", ["textvqa", "okvqa"])
def test_parquet_files_keep_their_images_until_read(tmp_path: Path, name: str):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "green.jpg").write_bytes(jpeg("green"))
    stored = [{"bytes": jpeg("red"), "path": "x.jpg"}, {"bytes": None, "path": "green.jpg"}, None]
    rows = [
        {"question_id": str(i), "image": image, "question": "what is it", "answers": ANSWERS[colour]}
        for i, (image, colour) in enumerate(zip(stored, COLOURS, strict=True))
    ]
    split = get(name, data=tmp_path).own_splits["test"]
    kinds = {"image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])}
    table = pyarrow.table({key: pyarrow.array([r[key] for r in rows], kinds.get(key)) for key in rows[0]})
    parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet", row_group_size=2)
    problems = get(name, data=tmp_path).problems("test")
    assert [p.images[0].key for p in problems] == ["0", "1", "2"]
    assert open_image(problems[0].images[0]).getpixel((1, 1))[0] > 150
    assert open_image(problems[1].images[0]).getpixel((1, 1))[1] > 150
    with pytest.raises(FileFormatError, match=r"row 3: expected an image"):
        open_image(problems[2].images[0])


def test_jsonl_files_name_their_images(tmp_path: Path):
    (tmp_path / "red.jpg").write_bytes(jpeg("red"))
    row = {"question": "what is it", "answers": ANSWERS["red"], "image": "red.jpg", "image_id": "r"}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = get("textvqa", data=tmp_path).problems("test")
    assert open_image(problem.images[0]).size == (40, 30) and problem.images[0].key == "r"


def test_the_hub_is_read_without_its_images(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "question_id": datasets.Value("string"),
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answers": datasets.Sequence(datasets.Value("string")),
        }
    )
    rows = [
        {"question_id": c, "image": {"bytes": jpeg(c), "path": None}, "question": "what", "answers": ANSWERS[c]}
        for c in COLOURS
    ]

    def load_dataset(name, config, split):
        assert (name, split) == ("lmms-lab/OK-VQA", "val2014")
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = get("okvqa")
    problem = task.problems("test")[1]
    assert open_image(problem.images[0]).getpixel((1, 1))[1] > 150
    with pytest.raises(ValueError, match="data: expected the official files of OK-VQA to train on, got None"):
        task.problems("train")


def test_questions_are_told_apart_by_their_images():
    def asked(key: str) -> Problem:
        return Problem(({"role": "user", "content": "what is it"},), images=(StoredImage(key, key, bytes),))

    problems = [asked(str(i)) for i in range(8)]
    rest, held = hold_out(problems, 3, "size")
    assert len(rest) == 5 and len(held) == 3 and not {p.images for p in rest} & {p.images for p in held}
    text = Problem(({"role": "user", "content": "hi"},))
    assert prompt_key(text) == hashlib.sha256(json.dumps(text.messages, sort_keys=True).encode()).hexdigest()


def change(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text())
    content["data"][0] |= fields
    path.write_text(json.dumps(content))


def test_textvqa_errors(tmp_path: Path):
    folder = textvqa_files(tmp_path / "data")
    file = folder / "TextVQA_0.5.1_val.json"
    whole = file.read_text()
    for fields, match in (
        ({"answers": ["one"]}, r"data\[0\]: field 'answers': expected the answers of two or more people"),
        ({"answers": "red"}, r"data\[0\]: field 'answers': expected list"),
        ({"question": " "}, r"data\[0\]: field 'question': expected a non-empty string"),
        ({"image_id": 3}, r"data\[0\]: field 'image_id': expected str"),
    ):
        change(file, **fields)
        with pytest.raises(FileFormatError, match=match):
            get("textvqa", data=folder).problems("test")
        file.write_text(whole)
    change(file, image_id="absent")
    with pytest.raises(FileNotFoundError, match=r"images: file .*train_images/absent.jpg does not exist"):
        get("textvqa", data=folder).problems("test")
    file.write_text('{"data": {}}')
    with pytest.raises(FileFormatError, match=r'expected \{"data": \[rows\]\}'):
        get("textvqa", data=folder).problems("test")
    file.write_text(whole[:50])
    with pytest.raises(FileFormatError, match=r"TextVQA_0.5.1_val.json: not JSON"):
        get("textvqa", data=folder).problems("test")
    with pytest.raises(FileNotFoundError, match=r"no validation.jsonl, validation.parquet or validation-\* below"):
        get("textvqa", data=folder / "train_images").problems("test")
    with pytest.raises(
        ValueError, match=r"images: expected the folder of the image files that the data names, got none"
    ):
        get("textvqa", data={"train": folder / "TextVQA_0.5.1_train.json"}).problems("train")
    with pytest.raises(ValueError, match="split: textvqa has train, validation, test, got 'dev'"):
        get("textvqa", data=folder).problems("dev")
    (folder / "TextVQA_Rosetta_OCR_v0.2_train.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ocr_tokens: no TextVQA_Rosetta_OCR_\*_train.json beside"):
        get("textvqa", data=folder, ocr_tokens=True).problems("train")
    file.write_text(whole)
    (folder / "copy").mkdir()
    (folder / "copy" / file.name).write_text(whole)
    with pytest.raises(ValueError, match=r"data: expected one TextVQA_.*_val.json below"):
        get("textvqa", data=folder).problems("test")


def test_okvqa_errors(tmp_path: Path):
    folder = okvqa_files(tmp_path)
    file = folder / "mscoco_val2014_annotations.json"
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=r"questions\[0\]: no answers to question 70 in .*annotations.json"):
        get("okvqa", data=folder).problems("test")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"mscoco_val2014_annotations.json does not exist"):
        get("okvqa", data=folder).problems("test")


def test_images_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "cut.jpg").write_bytes(jpeg("red")[:200])
    (tmp_path / "text.jpg").write_bytes(b"not an image")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(FileFormatError, match=rf"{name}: expected an image, got what pillow can't read"):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"images: file .*absent.jpg does not exist"):
        open_image(str(tmp_path / "absent.jpg"))
    with pytest.raises(TypeError, match="images: expected PIL images, paths or StoredImages, got int"):
        open_image(3)  # type: ignore[arg-type]
