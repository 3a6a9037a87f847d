"""Questions about images that ten people answered: the metric of VQA, and what tasks with it have in common."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from t2.tasks.base import Problem, Split, user_message
from t2.tasks.data import Data, Row
from t2.tasks.dataset_task import DatasetTask, check_split
from t2.tasks.images import StoredImage

INSTRUCTION = "Answer the question using a single word or phrase."
"""LLaVA's instruction for short answers (Liu et al. 2023, arXiv 2310.03744)."""

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,\d")
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Contractions by what is left when one of their apostrophes is missing; and one that is in the official list."""


def one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """An answer as the evaluation of VQA compares it (Agrawal et al. 2016, arXiv 1505.00468; visualqa.org/evaluation).

    Punctuation is dropped where it stands beside a space, or if the answer has a number such as 1,000, and becomes a
    space elsewhere; periods go unless a digit follows. Lower case; "one" is 1 and "none" 0; no articles; contractions
    get their apostrophe back.
    """
    text = whole = one_line(answer)
    dropped = COMMA_IN_NUMBER.search(whole) is not None
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in whole or f" {sign}" in whole
        text = text.replace(sign, "" if dropped or beside_space else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """min(1, people who gave this very answer / 3), averaged over all ways to leave one of the people out."""
    same, people = sum(reference == answer for reference in references), len(references)
    left_out_agrees, left_out_differs = min(1.0, max(0, same - 1) / 3), min(1.0, same / 3)
    return (same * left_out_agrees + (people - same) * left_out_differs) / people


class VQATask(DatasetTask):
    """Rows with "question", "answers" (texts, or objects with an "answer") and an image. Scored by `accuracy`.

    The reward is 1 for an answer whose accuracy is at least a half (two people of ten gave it: 0.6), else -1. The
    solution is the answer that most people gave. Test is the data set's own validation split, as usual: the answers of
    its test split are not published. Validation is held out of train.

    Args:
        data: a folder with the official files, or with Parquet or JSONL files as on the Hub; the same for each of the
            data set's own splits, `{"train": file}`; None reads the Hub.
        images: folder of the image files that the official files mean; default the data's.
        graded_reward: the reward is 2 accuracy - 1 instead.
        validation_size: problems held out of train.
        instruction: added to each question; None for none.
        max_new_tokens: room for an answer.
    """

    own_splits: dict[str, str]
    """The data set's own names of the splits that are train and test here."""

    def __init__(
        self,
        data: Data = None,
        images: str | Path | None = None,
        *,
        graded_reward: bool = False,
        validation_size: int = 500,
        instruction: str | None = INSTRUCTION,
        max_new_tokens: int = 16,
    ) -> None:
        super().__init__(data, validation_size=validation_size, instruction=instruction, max_new_tokens=max_new_tokens)
        self.images = images
        self.graded_reward = graded_reward

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, ("train", "validation", "test"))
        if split == "test":
            return self._read("test")
        train, validation = self._train_and_validation
        return train if split == "train" else validation

    def rows(self, split: str) -> list[Row]:
        own = self.own_splits[split]
        found = self.official_rows(own)
        return super().rows(own) if found is None else found

    def official_file(self, split: str, pattern: str) -> Path | None:
        """The official file of a split: the one given for it, or the one of this name in the folder, if there is any.

        Raises ValueError where several have the name.
        """
        if isinstance(self.data, Mapping):
            given = Path(self.data[split]).expanduser() if split in self.data else None
            return given if given is not None and given.suffix == ".json" else None
        if self.data is None or not Path(self.data).expanduser().is_dir():
            return None
        found = sorted(Path(self.data).expanduser().rglob(pattern))
        if len(found) > 1:
            raise ValueError(f"data: expected one {pattern} below {self.data}, got {', '.join(map(str, found))}")
        return found[0] if found else None

    def image_file(self, folders: Sequence[str], name: str) -> StoredImage:
        """The image file of this name, in one of these folders below that of the images, or right there."""
        places = [self.image_folder / folder / name for folder in (*folders, "")]
        return StoredImage.of_file(next((place for place in places if place.is_file()), places[0]))

    @abstractmethod
    def official_rows(self, split: str) -> list[Row] | None:
        """The rows of the official files, each with its image; None if `data` means others."""

    def image_key(self, row: Row) -> str:
        """Key that distinguishes a row's image from others."""
        return str(row.fields.get("image_id", row.fields.get("question_id", row.where)))

    def question(self, row: Row) -> str:
        return row.text("question")

    def problem(self, row: Row) -> Problem:
        given = row.get("answers", list)
        answers = [each.get("answer") if isinstance(each, dict) else each for each in given]
        if len(answers) < 2 or not all(isinstance(each, str) for each in answers):
            raise row.error("answers", "the answers of two or more people", given)
        lines = [self.question(row), *([self.instruction] if self.instruction else [])]
        image = replace(self._image(row), key=self.image_key(row))
        solution = Counter(answers).most_common(1)[0][0]
        return Problem((user_message("\n".join(lines), images=1),), tuple(answers), solution, (image,))

    def _image(self, row: Row) -> StoredImage:
        image = row.fields.get("image")
        if isinstance(image, StoredImage):
            return image
        return StoredImage.of_file(self.image_folder / row.text("image"))

    @property
    def image_folder(self) -> Path:
        """Folder of the image files that rows name."""
        if self.images is None and not isinstance(self.data, str | Path):
            raise ValueError("images: expected the folder of the image files that the data names, got none")
        return Path(self.images or str(self.data)).expanduser()

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [self.score(p.reference, answer) for p, answer in zip(problems, answers, strict=True)]

    def score(self, references: Sequence[str], answer: str) -> float:
        """Everything is normalised, unless all people gave the very same answer (VQA's own evaluation)."""
        if len(set(references)) > 1:
            return accuracy(normalise(answer), [normalise(reference) for reference in references])
        return accuracy(one_line(answer).lower(), [one_line(reference).lower() for reference in references])

    def rewards(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        scores = self.scores(problems, answers)
        return [2 * score - 1 if self.graded_reward else 1.0 if score >= 0.5 else -1.0 for score in scores]
