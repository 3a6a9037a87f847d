"""A few questions about small images, in the schemas that TextVQA and OK-VQA are published in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (10, 10, 230)}
ANSWERS = {colour: [colour] * 6 + [f"a {colour}"] * 2 + ["two", "unanswerable"] for colour in COLOURS}


def jpeg(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), COLOURS[colour]).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def textvqa_files(folder: Path) -> Path:
    """Six questions for train and three for val, about three images."""
    (folder / "train_images").mkdir(parents=True)
    for part, texts in (("train", ("what colour is it", "is it red")), ("val", ("what colour is it",))):
        rows = []
        for colour in COLOURS:
            (folder / "train_images" / f"{part}{colour}.jpg").write_bytes(jpeg(colour))
            for text in texts:
                rows.append(
                    {
                        "question": text,
                        "image_id": f"{part}{colour}",
                        "image_classes": ["Car"],
                        "flickr_original_url": "",
                        "flickr_300k_url": "",
                        "image_width": 40,
                        "image_height": 30,
                        "answers": ANSWERS[colour],
                        "question_tokens": text.split(),
                        "question_id": len(rows),
                        "set_name": part,
                    }
                )
        header = {"dataset_type": part, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(folder / f"TextVQA_0.5.1_{part}.json", header | {"data": rows})
        words = [{"image_id": row["image_id"], "ocr_tokens": ["STOP", row["image_id"]], "ocr_info": []} for row in rows]
        write_json(folder / f"TextVQA_Rosetta_OCR_v0.2_{part}.json", header | {"data": words})
    return folder


def okvqa_files(folder: Path) -> Path:
    for split in ("train2014", "val2014"):
        (folder / split).mkdir(parents=True)
        questions, annotations = [], []
        for i, colour in enumerate(COLOURS):
            (folder / split / f"COCO_{split}_{i + 7:012d}.jpg").write_bytes(jpeg(colour))
            questions.append({"image_id": i + 7, "question": "what fruit has it", "question_id": 70 + i})
            answers = [
                {"answer_id": n + 1, "raw_answer": a, "answer_confidence": "yes", "answer": a}
                for n, a in enumerate(ANSWERS[colour])
            ]
            annotations.insert(
                0, {"image_id": i + 7, "question_id": 70 + i, "answers": answers, "question_type": "eight"}
            )
        header = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": split, "license": {}}
        write_json(folder / f"OpenEnded_mscoco_{split}_questions.json", header | {"questions": questions})
        write_json(folder / f"mscoco_{split}_annotations.json", header | {"annotations": annotations})
    return folder
