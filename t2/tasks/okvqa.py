"""OK-VQA: questions about photos that need knowledge from outside of them (Marino et al. 2019, arXiv 1906.00067)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2.tasks.data import HubDataset, Row, read_listed
from t2.tasks.vqa import VQATask
from t2.weights.files import FileFormatError


class OKVQA(VQATask):
    """Rows {"question", "answers", "image"} as on the Hub, or the official files: for each of train2014 and val2014
    `OpenEnded_mscoco_SPLIT_questions.json` ({"questions": [{"image_id", "question", "question_id"}]}), with
    `mscoco_SPLIT_annotations.json` ({"annotations": [{"question_id", "answers": [{"answer"}]}]}) beside it, and COCO's
    images `SPLIT/COCO_SPLIT_000000000042.jpg` below the images' folder, or right there. Test is val2014, all that the
    Hub has; train needs the official files.

    Arguments, metric and reward are `VQATask`'s.
    """

    name = "okvqa"
    dataset = HubDataset("lmms-lab/OK-VQA", splits=("train2014", "val2014"))
    own_splits = {"train": "train2014", "test": "val2014"}  # noqa: RUF012  # never changed

    def rows(self, split: str) -> list[Row]:
        if self.data is None and split == "train":
            raise ValueError(
                "data: expected the official files of OK-VQA to train on, got None; the Hub has val2014 only"
            )
        return super().rows(split)

    def official_rows(self, split: str) -> list[Row] | None:
        file = self.official_file(split, f"OpenEnded_mscoco_{split}_questions.json")
        if file is None:
            return None
        beside = file.with_name(file.name.removeprefix("OpenEnded_").replace("questions", "annotations"))
        answers = {
            row.fields.get("question_id"): row.get("answers", list) for row in read_listed(beside, "annotations")
        }
        rows = []
        for row in read_listed(file, "questions"):
            name = f"COCO_{split}_{row.get('image_id', int):012d}.jpg"
            fields = dict(row.fields) | {
                "image": self.image_file([split], name),
                "answers": self._of(row, answers, beside),
            }
            rows.append(Row(fields, row.where))
        return rows

    @staticmethod
    def _of(row: Row, answers: dict[Any, list[Any]], file: Path) -> list[Any]:
        number = row.get("question_id", int)
        if number not in answers:
            raise FileFormatError(f"{row.where}: no answers to question {number} in {file}")
        return answers[number]
