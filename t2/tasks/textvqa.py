"""TextVQA: questions about what is written in a photo (Singh et al. 2019, arXiv 1904.08920)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2.tasks.data import Data, HubDataset, Row, read_listed
from t2.tasks.vqa import INSTRUCTION, VQATask, accuracy, normalise


def tokenise(answer: str) -> str:
    """Preprocessing of TextVQA's evaluation (`EvalAIAnswerProcessor` of MMF) before VQA's normalisation."""
    return answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")


class TextVQA(VQATask):
    """Rows {"question", "answers", "image" or "image_id", "ocr_tokens"} as on the Hub, or the official files:
    `TextVQA_0.5.1_train.json` and `TextVQA_0.5.1_val.json` ({"data": [rows]}), whose images are
    `train_images/IMAGE_ID.jpg` below the images' folder, or right there.

    Args:
        ocr_tokens: whether the prompt has the words that an OCR system found, "ocr_tokens" of the row, as LLaVA's
            prompts for TextVQA do. With the official files they come from `TextVQA_Rosetta_OCR_v0.2_*.json` beside.

    The others, the metric and the reward are `VQATask`'s.
    """

    name = "textvqa"
    dataset = HubDataset("lmms-lab/textvqa", splits=("train", "validation"))
    own_splits = {"train": "train", "test": "validation"}  # noqa: RUF012  # never changed

    def __init__(
        self,
        data: Data = None,
        images: str | Path | None = None,
        *,
        ocr_tokens: bool = False,
        graded_reward: bool = False,
        validation_size: int = 500,
        instruction: str | None = INSTRUCTION,
        max_new_tokens: int = 16,
    ) -> None:
        self.ocr_tokens = ocr_tokens
        super().__init__(
            data,
            images,
            graded_reward=graded_reward,
            validation_size=validation_size,
            instruction=instruction,
            max_new_tokens=max_new_tokens,
        )

    def official_rows(self, split: str) -> list[Row] | None:
        part = {"train": "train", "validation": "val"}[split]
        file = self.official_file(split, f"TextVQA_[0-9]*_{part}.json")
        if file is None:
            return None
        words = self._ocr_words(file, part) if self.ocr_tokens else {}
        rows = []
        for row in read_listed(file, "data"):
            name = row.text("image_id")
            fields = dict(row.fields) | {"image": self.image_file(["train_images"], f"{name}.jpg")}
            rows.append(Row(fields | ({"ocr_tokens": words.get(name)} if self.ocr_tokens else {}), row.where))
        return rows

    @staticmethod
    def _ocr_words(file: Path, part: str) -> dict[str, list[Any]]:
        beside = sorted(file.parent.glob(f"TextVQA_Rosetta_OCR_*_{part}.json"))
        if not beside:
            raise FileNotFoundError(f"ocr_tokens: no TextVQA_Rosetta_OCR_*_{part}.json beside {file}")
        return {row.text("image_id"): row.get("ocr_tokens", list) for row in read_listed(beside[-1], "data")}

    def question(self, row: Row) -> str:
        if not self.ocr_tokens:
            return super().question(row)
        words = row.get("ocr_tokens", list)
        if not all(isinstance(word, str) for word in words):
            raise row.error("ocr_tokens", "a list of words", words)
        return f"{super().question(row)}\nReference OCR token: {', '.join(words)}"

    def score(self, references: Sequence[str], answer: str) -> float:
        own, *others = (normalise(tokenise(text)) for text in (answer, *references))
        return accuracy(own, others)
