"""Mutates files of every kind that the package reads, and tells whether each was refused well, accepted, or BAD.

    python tests/fuzz/files.py --mutations 1000            # of all kinds together; the same ones every time
    python tests/fuzz/files.py --mutations 200 --kinds expert checkpoint --seed 3

A mutation flips bits, cuts, repeats, blanks or inserts bytes, or replaces, removes or adds a field of the JSON inside:
values of other types, numbers beyond float64, NaN, half surrogates, nesting of 100,000 levels. Right is either

- refused: a ValueError, TypeError or OSError whose text names the file, within 20 seconds, or
- accepted: what was read is still sound, as the kind's reader checks (a z may be another one, but is finite; factors
  are those of before to the bit), or a damaged cache is named in a warning and made anew.

BAD is all else: an error of another kind or without the file's name, a warning without it, a crash, a hang, something
unsound that was accepted. Exit status 1 if there is any. Each kind runs in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import math
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

import t2
from t2.adaptation.bank_folder import load_bank_folder, save_bank_folder
from t2.adaptation.few_shot import read_memory
from t2.eval.result_cache import ResultCache
from t2.eval.spec import load_spec
from t2.model import serving_plan as planning
from t2.tasks import get
from t2.tasks.base import prompt_text
from t2.tasks.images import open_image
from t2.training.checkpoint import Base, Checkpoint, State, load_optimizer, optimizer_tensors
from t2.training.metrics import Metrics
from t2.weights import factor_cache as svd
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.loading import _check_gguf
from t2.weights.shards import INDEX, Shards
from t2kernels import decompose
from t2kernels.planner import CostModel

SECONDS = 20
DEEP, RAW = "\x00deep\x00", "\x00raw\x00"
DEEP_TEXT = "[" * 100_000 + "]" * 100_000
RAW_VALUES = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "9" * 5000, "1e-400", "-0", '"\\ud800"', "{", "nul")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e300, 2**31, 2**63, "", "x", "\x00", "5", "a/b", "../x", "[]", "é" * 9),
    *([], {}, [None], [[]], {"a": 1}, [1, "x", None], "y" * 100_000, DEEP),
    *(RAW + value for value in RAW_VALUES),
)
LAYOUT = t2.Layout(("a.q", "a.k", "b.mlp"), (4, 1, 7), "f" * 64, "tiny")


@dataclass
class Kind:
    """How files of one kind are made, mutated and read.

    make: writes sound files into a folder, and gives those that are mutated, in turns. read: reads them as the package
    does, and says why the result is sound; raises Unsound if it is not. fields: mutates the JSON inside; None where
    there is none.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], str]
    fields: Callable[[bytes, random.Random], bytes] | None = None


class Unsound(Exception):
    """What was accepted is not what may be accepted."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Unsound(what)


# Mutations


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One of: up to three flipped bits, a cut, a blank, repeated, inserted or removed stretch, no content at all."""
    if not data:
        return rng.randbytes(9)
    place, size = rng.randrange(len(data)), rng.choice((1, 2, 8, 64))
    way = rng.choice(("bits", "bits", "bits", "cut", "blank", "repeat", "insert", "remove", "empty"))
    if way == "bits":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return {
        "cut": lambda: data[:place],
        "blank": lambda: data[:place] + bytes(len(data[place : place + size])) + data[place + size :],
        "repeat": lambda: data[: place + size] + data[place:],
        "insert": lambda: data[:place] + rng.randbytes(size) + data[place:],
        "remove": lambda: data[:place] + data[place + size :],
        "empty": lambda: b"",
    }[way]()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one field replaced, removed, added or repeated, or the whole replaced."""
    value = copy.deepcopy(value)
    found = list(places(value))
    way = rng.choice(("replace", "replace", "replace", "remove", "add", "whole"))
    if way == "whole" or not found:
        return rng.choice(VALUES)
    container, key = rng.choice(found)
    if way == "remove":
        del container[key]
    elif way == "add" and isinstance(container, dict):
        container[rng.choice(("x", "", "\x00", str(key) + "x"))] = rng.choice(VALUES)
    elif way == "add":
        container.insert(key, rng.choice((container[key], *VALUES)))
    else:
        old = container[key]
        near = [old + 1, -old, old * 1.5, old * 10**40] if type(old) in (int, float) else []
        container[key] = rng.choice((*VALUES, *near, *near))
    return value


def dumps(value: Any) -> str:
    """JSON with what `json.dumps` cannot write: values marked RAW as they are, DEEP as deep nesting."""
    text = json.dumps(value)
    text = text.replace(json.dumps(DEEP), DEEP_TEXT)
    for raw in RAW_VALUES:
        text = text.replace(json.dumps(RAW + raw), raw)
    return text


def json_fields(data: bytes, rng: random.Random) -> bytes:
    return dumps(mutate_value(json.loads(data), rng)).encode(errors="surrogatepass")


def line_fields(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json_fields(lines[place], rng)
    return b"\n".join(lines) + b"\n"


def gzip_fields(data: bytes, rng: random.Random) -> bytes:
    return gzip.compress(line_fields(gzip.decompress(data), rng), mtime=0)


def safetensors_fields(data: bytes, rng: random.Random) -> bytes:
    """The header, or JSON in a text of the metadata."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    if metadata and rng.random() < 0.75:
        name = rng.choice(sorted(metadata))
        try:
            metadata[name] = dumps(mutate_value(json.loads(metadata[name]), rng))
        except ValueError:
            metadata[name] = rng.choice(("", "x", "2", "\x00", "y" * 1000, DEEP_TEXT))
    else:
        header = mutate_value(header, rng)
    text = dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header's keys in order: the library writes them in another one each time."""
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def parquet_fields(data: bytes, rng: random.Random) -> bytes:
    """A column's values of another type."""
    import pyarrow
    from pyarrow import parquet

    rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    name, out = rng.choice(sorted(rows[0])), io.BytesIO()
    value = rng.choice([each for each in VALUES if each not in ([], {}, [[]], DEEP) and not str(each).startswith(RAW)])
    for row in rows if isinstance(value, list | dict) else rows[:: rng.choice((1, len(rows)))]:
        row[name] = value
    kept = [{k: v for k, v in row.items() if k != name or rng.random() < 0.9} for row in rows]
    try:
        parquet.write_table(pyarrow.Table.from_pylist(kept), out)
    except (pyarrow.ArrowException, TypeError, OverflowError, ValueError):
        return mutate_bytes(data, rng)
    return out.getvalue()


# Kinds


def expert_files(folder: Path) -> list[Path]:
    t2.Expert.random(LAYOUT).save(folder / "expert.safetensors")
    noted = t2.Expert(torch.ones(12), LAYOUT, {"task": "sums", "domains": '["a"]'})
    noted.save(folder / "half.safetensors", torch.float16)
    return [folder / "expert.safetensors", folder / "half.safetensors"]


def sound_expert(expert: t2.Expert) -> str:
    require(expert.z.dtype == torch.float32 and bool(torch.isfinite(expert.z).all()), "z is not finite float32")
    require(expert.z.shape == (expert.layout.R,) == (sum(expert.layout.ranks),), "z does not fit its layout")
    require(all(type(rank) is int and rank > 0 for rank in expert.layout.ranks), "ranks are no whole numbers")
    require(all(isinstance(text, str) for text in (*expert.layout.names, *expert.metadata.values())), "no texts")
    with tempfile.TemporaryDirectory() as folder:
        expert.save(Path(folder) / "again.safetensors")
        require(torch.equal(t2.Expert.load(Path(folder) / "again.safetensors").z, expert.z), "z does not survive")
    return "a finite z of the layout's length, texts of the user's own"


def bank_file(folder: Path) -> list[Path]:
    bank = t2.ExpertBank(LAYOUT)
    for seed, name in enumerate(("math", "code")):
        bank.add(name, t2.Expert.random(LAYOUT, seed=seed))
    bank.save(folder / "bank.safetensors")
    return [folder / "bank.safetensors"]


def read_bank(path: Path) -> str:
    bank = t2.ExpertBank.load(path)
    require(all(isinstance(name, str) and name for name in bank.names), "names are no texts")
    for name in bank:
        sound_expert(bank[name])
    return "finite rows with names of their own"


def bank_folder(folder: Path) -> list[Path]:
    layout = t2.Layout(("a",), (5,), "f" * 64, "tiny")
    classifier = t2.Expert(torch.ones(5), layout, {"domains": '["sums", "code"]'})
    experts = {name: t2.Expert.random(layout) for name in ("sums", "code")}
    save_bank_folder(folder / "bank", {"sums": "adding", "code": ""}, experts, classifier)
    return [folder / "bank" / name for name in ("domains.json", "classifier.safetensors", "code.safetensors")]


def bank_fields(data: bytes, rng: random.Random) -> bytes:
    return (json_fields if data[:1] == b"{" else safetensors_fields)(data, rng)


def read_bank_folder(path: Path) -> str:
    bank = load_bank_folder(path.parent)
    for domain in bank.domains:
        require(isinstance(domain.name, str) and isinstance(domain.description, str), "domains are no texts")
        sound_expert(bank.experts[domain.name])
    return "finite experts of one base, an expert for each domain"


def factor_file(folder: Path) -> list[Path]:
    weight = factor_weight()
    decompose_weights({"a": weight}, FactorCache(folder), progress=False)
    return [FactorCache(folder).path(svd.weight_key(weight))]


def factor_weight() -> torch.Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def read_factors(path: Path) -> str:
    """By all ways: strictly, which may refuse; and with the weight at hand, which must give the right factors."""
    weight, cache = factor_weight(), FactorCache(path.parent)
    key, right = path.stem, decompose(factor_weight())
    for load, want in ((cache.load, right), (cache.load_weight, (weight,))):
        try:
            got = load(key)
        except (t2.FileFormatError, FileNotFoundError) as error:
            require(path.name in str(error), f"{load.__name__}: no file in: {error}")
        else:
            got = (got,) if isinstance(got, torch.Tensor) else got
            require(all(map(torch.equal, got, want)), f"{load.__name__} gave other numbers")
    before = path.read_bytes()
    require(all(map(torch.equal, cache.load_or_redo(key, weight), right)), "load_or_redo gave other factors")
    path.write_bytes(before)
    decompose_weights({"a": weight}, cache, progress=False)
    require(all(map(torch.equal, cache.load_or_redo(key, weight), right)), "decompose_weights left other factors")
    return "the factors of before to the bit"


BASE = Base("tiny", "float32", "e" * 64)


def checkpoint_file(folder: Path) -> list[Path]:
    parameters = [torch.ones(5), torch.ones(2, 3)]
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in parameters])
    sum(parameter.square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = State(step=3, best_score=0.5, best_step=2, first_entropy=1.0, first_kl=0.0, base_score=0.25)
    best, options = [torch.ones(5), torch.ones(2, 3)], {"seed": 0, "task": "sums", "targets": ["all-linear"]}
    checkpoint = Checkpoint(state, parameters, best, BASE, optimizer_tensors(optimizer), options)
    checkpoint.save(folder / "checkpoint.safetensors")
    return [folder / "checkpoint.safetensors"]


def read_checkpoint(path: Path) -> str:
    checkpoint, parameters = Checkpoint.load(path), [torch.ones(5), torch.ones(2, 3)]
    checkpoint.check(path, BASE, parameters)
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in parameters])
    load_optimizer(optimizer, checkpoint.optimizer)
    for parameter, value in zip(parameters, checkpoint.parameters, strict=True):
        parameter.data.copy_(value)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    require(all(bool(torch.isfinite(parameter).all()) for parameter in parameters), "a step gives no finite numbers")
    require(0 < checkpoint.state.rate_scale <= 1 and checkpoint.state.step >= 0, "the state is none")
    return "finite numbers of the right shapes, a state that can be; options are compared with the run's"


def metrics_file(folder: Path) -> list[Path]:
    rows = [{"step": 0, "base": 0.5, "validation": 0.5}, *({"step": i, "kl": 0.1 * i, "reward": None} for i in (1, 2))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / "metrics.jsonl"]


def read_metrics(path: Path) -> str:
    metrics = Metrics(path, 1)
    for name in {name for row in metrics.rows for name in row}:
        steps, values = metrics.series(name)
        require(all(type(step) is int for step in steps), "steps are no whole numbers")
        require(all(isinstance(value, int | float) for value in values), "values are no numbers")
    return "rows of numbers; a last line that a crash cut is left out, as are later steps"


ROWS = [
    *({"prompt": f"What is {i}?", "answer": str(i), "weight": i / 4} for i in range(6)),
    *({"messages": [{"role": "user", "content": f"q{i}"}], "answer": i} for i in range(3)),
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "answer": 1.5},
]


def jsonl_files(folder: Path) -> list[Path]:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "mine.jsonl").write_text(text)
    return [folder / "mine.jsonl"]


def gzip_files(folder: Path) -> list[Path]:
    (folder / "mine.jsonl.gz").write_bytes(gzip.compress(jsonl_files(folder)[0].read_bytes(), mtime=0))
    return [folder / "mine.jsonl.gz"]


def parquet_files(folder: Path) -> list[Path]:
    import pyarrow
    from pyarrow import parquet

    table, talks = pyarrow.Table.from_pylist(ROWS[:6]), pyarrow.Table.from_pylist(ROWS[6:9])
    parquet.write_table(table, folder / "mine.parquet")
    parquet.write_table(talks, folder / "talks.parquet", write_page_checksum=True, compression="zstd")
    return [folder / "mine.parquet", folder / "talks.parquet"]


class Plain:
    """A tokenizer without a chat template, for `prompt_text`."""

    chat_template = None


def sound_problems(task: Any, splits: tuple[str, ...] = ("train", "validation", "test")) -> str:
    for split in splits:
        for problem in task.problems(split):
            text = prompt_text(problem, Plain())  # type: ignore[arg-type]
            text.encode()
            require(problem.solution is None or isinstance(problem.solution, str), "a solution is no text")
            if not problem.images:
                task.scores([problem], ["5"])
    return "prompts that are texts, answers that are texts or numbers"


def read_jsonl(path: Path) -> str:
    return sound_problems(get(f"jsonl:{path}", validation_size=1, test_size=1))


OFFICIAL: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "1 + 1?", "answer": "2 #### 2"}, {"question": "2?", "answer": "#### 2"}],
    "arc-easy": [
        {"question": "a?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        {
            "question": {"stem": "b?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
            "answerKey": "B",
        },
    ],
    "math": [{"problem": "1?", "solution": "\\boxed{1}"}, {"problem": "2?", "solution": "\\boxed{2}"}],
}


def official_files(folder: Path) -> list[Path]:
    for name, rows in OFFICIAL.items():
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / name / "train.jsonl" for name in OFFICIAL]


def read_official(path: Path) -> str:
    name = path.parent.name
    options = {} if name == "arc-easy" else {"validation_size": 0}
    return sound_problems(get(name, data=path.parent, **options), ("train",))


def plan_file(folder: Path) -> list[Path]:
    task = {"task": "gsm8k", "options": {"validation_size": 10}, "problems": 5, "few_shot_from": "train"}
    plan = {"seen": {"sums": task}, "unseen": {"other": {"task": "math"}}, "few_shot": [5], "few_shot_seeds": [0, 1]}
    plan |= {
        "search": {"population": 16, "margin": 1.0},
        "incumbents": ["base", "prompt"],
        "variants": {"v": {"sums": "f"}},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return [folder / "plan.json"]


def read_plan(path: Path) -> str:
    plan = load_spec(path)
    require(bool(plan.seen) and all(isinstance(each.task, str) for each in plan.tasks.values()), "no tasks")
    require(all(type(n) is int and n >= 1 for n in (plan.problems, *plan.few_shot, *plan.few_shot_sizes)), "no sizes")
    require(math.isfinite(plan.search.margin + plan.search.low + plan.search.high), "bounds are not finite")
    return "a plan: other tasks, sizes or names"


TILE = {"block_m": 16, "block_n": 64, "block_k": 128, "warps": 4, "stages": 4}


def tuning_file(folder: Path) -> list[Path]:
    (folder / "tiles.json").write_text(
        json.dumps({"project rows<=16": TILE, "expand rows<=1": TILE | {"overlap": True}})
    )
    return [folder / "tiles.json"]


def read_tuning(path: Path) -> str:
    from t2kernels.triton.tuning import Tile, _measured

    _measured.cache_clear()
    for key, tile in _measured(path).items():
        require(isinstance(key, str) and isinstance(tile, Tile), "no tile")
        require(all(n & (n - 1) == 0 < n <= 1024 for n in (tile.block_m, tile.block_n, tile.block_k)), "no block sizes")
        require(type(tile.stages) is int and type(tile.overlap) is bool, "fields of other types")
    return "tiles with sizes that can be, or none, with a warning"


def cost_values() -> CostModel:
    kinds = ("float32", "bfloat16", "float16", "int8", "uint8", "int4", "bfloat16 products")
    entry = {kind: (1e-9,) * 8 for kind in kinds}
    return CostModel(CostModel.machine_key(), entry, row=1e-9, call=1e-6, build=1e-11, pack=1e-9)


def cost_file(folder: Path) -> list[Path]:
    known = {CostModel.machine_key(): cost_values().to_dict(), "another machine": cost_values().to_dict()}
    (folder / "cost.json").write_text(json.dumps(known))
    return [folder / "cost.json"]


def read_cost(path: Path) -> str:
    with patch.object(CostModel, "measure", cost_values):
        model = planning.cost_model(path)
        require(0 <= model.product(5, 64, 64, torch.float32) < math.inf, "no seconds")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            planning.cost_model(path)  # sound by now
    return "times that can be, or measured anew"


def shard_files(folder: Path) -> list[Path]:
    from safetensors.torch import save_file

    for i in (1, 2):
        save_file(
            {f"layer{i}.weight": torch.ones(3, 2), f"layer{i}.bias": torch.ones(3)}, folder / f"model-{i}.safetensors"
        )
    names = {f"layer{i}.{part}": f"model-{i}.safetensors" for i in (1, 2) for part in ("weight", "bias")}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 72}, "weight_map": names}))
    return [folder / INDEX, folder / INDEX, folder / "model-1.safetensors"]


def read_shards(path: Path) -> str:
    shards = Shards(path.parent)
    for name, shape in shards.shapes.items():
        require(tuple(shards.read(name).shape) == shape, f"{name} has another shape than its header says")
    return "tensors as headers and index say, with other numbers, names or dtypes; a model compares them with its own"


def gguf_file(folder: Path) -> list[Path]:
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(8)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", torch.ones(4, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / "tiny.gguf"]


def read_gguf(path: Path) -> str:
    _check_gguf(path)
    return "a header that parses, tensors inside the file; transformers judges the rest when it converts"


def image_files(folder: Path) -> list[Path]:
    from PIL import Image

    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    for suffix in ("png", "jpg", "gif", "webp"):
        image.save(folder / f"image.{suffix}")
    return sorted(folder.glob("image.*"))


def read_image(path: Path) -> str:
    image = open_image(path)
    require(image.mode == "RGB" and image.size[0] * image.size[1] < 10**9, "no RGB image")
    return "an image that pillow reads, with other pixels"


CELL = {"kind": "scores", "label": "sums", "dtype": "float32"}


def cell_file(folder: Path) -> list[Path]:
    ResultCache(folder).put(CELL, {"scores": [1.0, 0.0], "seconds": 1.5, "texts": ["a", "b"]})
    return [ResultCache(folder).path(CELL)]


def read_cell(path: Path) -> str:
    found = ResultCache(path.parent).find(CELL)
    require(found in (None, {"scores": [1.0, 0.0], "seconds": 1.5, "texts": ["a", "b"]}), "another value")
    return "the value of before, or a miss with a warning"


def memory_file(folder: Path) -> list[Path]:
    known = {"00ff": [0.5, -1.25, [1.0, 0.0]], "0a0b": [0.0, -math.inf, [0.0, 0.0]]}
    (folder / "x.memory").write_text(json.dumps({"identity": "f" * 64, "candidates": known}))
    return [folder / "x.memory"]


def read_search_memory(path: Path) -> str:
    identity, memory = read_memory(path)
    require(isinstance(identity, str) and all(math.isfinite(each.score) for each in memory.values()), "no fitness")
    return "numbers for each candidate; the identity is compared with the search's"


KINDS: dict[str, Kind] = {
    "expert": Kind(expert_files, lambda path: sound_expert(t2.Expert.load(path)), safetensors_fields),
    "bank": Kind(bank_file, read_bank, safetensors_fields),
    "bank folder": Kind(bank_folder, read_bank_folder, bank_fields),
    "factors": Kind(factor_file, read_factors, safetensors_fields),
    "checkpoint": Kind(checkpoint_file, read_checkpoint, safetensors_fields),
    "metrics": Kind(metrics_file, read_metrics, line_fields),
    "jsonl": Kind(jsonl_files, read_jsonl, line_fields),
    "jsonl.gz": Kind(gzip_files, read_jsonl, gzip_fields),
    "parquet": Kind(parquet_files, read_jsonl, parquet_fields),
    "official task": Kind(official_files, read_official, line_fields),
    "eval plan": Kind(plan_file, read_plan, json_fields),
    "tuning": Kind(tuning_file, read_tuning, json_fields),
    "cost model": Kind(cost_file, read_cost, json_fields),
    "shards": Kind(shard_files, read_shards, bank_fields),
    "gguf": Kind(gguf_file, read_gguf),
    "image": Kind(image_files, read_image),
    "eval cell": Kind(cell_file, read_cell, json_fields),
    "search memory": Kind(memory_file, read_search_memory, json_fields),
}


# Running


@dataclass(frozen=True)
class Outcome:
    """One mutation: "refused", "accepted" or "BAD", and why."""

    number: int
    verdict: str
    why: str


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends the block with a TimeoutError of its own kind, where the main thread runs Python."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Unsound(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_one(name: str, number: int, seed: int, folder: Path) -> Outcome:
    """Makes, mutates and reads one file in an empty folder; the mutation depends on the arguments alone."""
    kind, rng = KINDS[name], random.Random(f"{seed} {name} {number}")
    torch.manual_seed(0)
    files = kind.make(folder)
    path = files[number % len(files)]
    data = sorted_header(path.read_bytes()) if path.suffix == ".safetensors" else path.read_bytes()
    mutate = kind.fields if kind.fields is not None and rng.random() < 0.6 else mutate_bytes
    changed = mutate(data, rng)
    path.write_bytes(changed)
    if changed == data:
        return Outcome(number, "accepted", "nothing changed")
    named = [str(path), *([str(path.parent)] if name in ("bank folder", "official task") else [])]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with alarm(SECONDS):
                why, verdict = kind.read(path), "accepted"
        except (ValueError, TypeError, OSError) as error:
            why = f"{type(error).__name__}: {error}"
            verdict = "refused" if any(place in str(error) for place in named) else "BAD"
        except BaseException as error:  # whatever it is, it is a finding
            if isinstance(error, KeyboardInterrupt):
                raise
            why, verdict = f"{type(error).__name__}: {error}", "BAD"
    ours = [
        str(each.message) for each in said if "damaged" in str(each.message) or "computed again" in str(each.message)
    ]
    if verdict == "accepted" and ours:
        silent = [text for text in ours if str(path) not in text]
        why, verdict = (
            (f"a warning without the file: {silent[0]}", "BAD") if silent else ("made anew, with a warning", verdict)
        )
    return Outcome(number, verdict, why)


def run(name: str, numbers: Iterator[int] | range, seed: int = 0) -> Iterator[Outcome]:
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            yield run_one(name, number, seed, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def child(name: str, first: int, last: int, seed: int) -> None:
    """Prints an outcome a line; memory is bounded, so that a length from a damaged file does not take the machine's."""
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    for number in range(first, last):
        print(json.dumps({"begins": number}), flush=True)
        for outcome in run(name, range(number, number + 1), seed):
            print(json.dumps(vars(outcome)), flush=True)


def in_process(name: str, count: int, seed: int) -> list[Outcome]:
    """All outcomes of a kind, from processes of their own: one that crashes is a finding, and another goes on."""
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        first = len(outcomes)
        command = [sys.executable, __file__, "--child", name, str(first), str(count), str(seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 + SECONDS * (count - first))
            ended, out, errors = str(done.returncode), done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            ended, out, errors = "hang", (error.stdout or b"").decode(), ""
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        outcomes += [Outcome(**line) for line in lines if "verdict" in line]
        if len(outcomes) < count:
            why = f"the process ended with {ended}: {errors.strip().splitlines()[-1:]}"
            outcomes.append(Outcome(len(outcomes), "BAD", why))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000, help="of all kinds together")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every outcome")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, first, last, seed = given.child
        child(name, int(first), int(last), int(seed))
        return
    bad, total = 0, Counter[str]()
    each, rest = divmod(given.mutations, len(given.kinds))
    print(f"{'kind':16}{'refused':>9}{'accepted':>10}{'BAD':>6}")
    for place, name in enumerate(given.kinds):
        outcomes = in_process(name, each + (place < rest), given.seed)
        counts = Counter(outcome.verdict for outcome in outcomes)
        total += counts
        print(f"{name:16}{counts['refused']:9}{counts['accepted']:10}{counts['BAD']:6}", flush=True)
        for why, count in Counter(o.why for o in outcomes if o.verdict == "accepted").most_common():
            print(f"    accepted {count}: {why}", flush=True)
        for outcome in outcomes:
            if outcome.verdict == "BAD" or given.show:
                text = " ".join(outcome.why.split())
                print(f"    {outcome.verdict} {name} {outcome.number}: {text:.300}", flush=True)
        bad += counts["BAD"]
    print(f"{'all':16}{total['refused']:9}{total['accepted']:10}{total['BAD']:6}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
