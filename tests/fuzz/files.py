"""Damages files of every kind that the package reads, and looks at what becomes of them.

    python -m tests.fuzz.files [--mutations 1000] [--seed 0]

Each file is sound first; then bits flip, it is cut short, or a value in its JSON becomes another. It may be refused,
by a ValueError, TypeError or OSError that names the file; used, if what it says is still possible (the kinds below say
why); or left out with a warning where the package made it itself and makes it again. Anything else is a fault: another
error, a crash, a hang, or a refusal that does not say which file it is about.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import queue
import random
import signal
import struct
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import t2
from t2.adaptation.folder import load_bank_folder, save_bank_folder
from t2.evaluate.plan import load_plan
from t2.experts import ExpertBank
from t2.layout import Layout
from t2.planning import cost_model
from t2.shards import INDEX, Shards
from t2.storage import write_safetensors
from t2.svd import FactorCache, decompose_weights, weight_key
from t2.tasks.jsonl import JsonlTask
from t2.training.checkpoint import Checkpoint, State
from t2.training.curves import Metrics
from t2kernels.planner import CostModel
from t2kernels.triton import tuning

LAYOUT = Layout(("a", "b"), (2, 3), "0" * 64, "toy")
SECONDS = 20
REFUSALS = (ValueError, TypeError, OSError)


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    make: writes a sound one into a folder. load: reads it; what it returns has to be sound, else it raises
        AssertionError. accepted: why a damaged one may be used.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    accepted: str


def expert() -> t2.Expert:
    return t2.Expert(torch.linspace(0.5, 1.5, 5), LAYOUT, {"task": "toy"})


def check_expert(loaded: t2.Expert) -> None:
    assert loaded.z.dtype == torch.float32 and loaded.z.isfinite().all() and loaded.z.shape == (loaded.layout.R,)


def make_expert(folder: Path) -> Path:
    expert().save(folder / "expert.safetensors")
    return folder / "expert.safetensors"


def load_expert(path: Path) -> None:
    check_expert(t2.Expert.load(path))


def make_bank(folder: Path) -> Path:
    bank = ExpertBank(LAYOUT)
    bank.add("one", expert())
    bank.add("two", expert())
    bank.save(folder / "bank.safetensors")
    return folder / "bank.safetensors"


def load_bank(path: Path) -> None:
    bank = ExpertBank.load(path)
    for name in bank:
        check_expert(bank[name])


def make_folder(folder: Path) -> Path:
    save_bank_folder(folder / "bank", {"sums": "adding", "logic": "whether"}, {"sums": expert(), "logic": expert()})
    return folder / "bank" / "domains.json"


def load_folder(path: Path) -> None:
    for each in load_bank_folder(path.parent).experts.values():
        check_expert(each)


WEIGHT = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def make_factors(folder: Path) -> Path:
    cache = FactorCache(folder)
    decompose_weights({"w": WEIGHT}, cache, progress=False)
    return cache.path(weight_key(WEIGHT))


def load_factors(path: Path) -> None:
    cache, key = FactorCache(path.parent), weight_key(WEIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decompose_weights({"w": WEIGHT}, cache, progress=False)
        u, s, vh = cache.load_or_redo(key, lambda: WEIGHT)
    torch.testing.assert_close((u * s) @ vh, WEIGHT, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.load_weight(key), WEIGHT)


def parameters() -> list[torch.Tensor]:
    return [torch.ones(5)]


def make_checkpoint(folder: Path) -> Path:
    moments = {"0.step": torch.tensor(2.0), "0.exp_avg": torch.zeros(5), "0.exp_avg_sq": torch.ones(5)}
    state = State(step=2, best_score=0.5, best_step=2)
    Checkpoint(state, "base", parameters(), parameters(), moments, {"rate": 0.1}).save(
        folder / "checkpoint.safetensors"
    )
    return folder / "checkpoint.safetensors"


def load_checkpoint(path: Path) -> None:
    checkpoint = Checkpoint.load(path)
    if checkpoint.base != "base":
        raise ValueError(f"{path}: another base")
    checkpoint.check(path, parameters())


ROWS = [{"prompt": f"q{i}", "answer": str(i)} for i in range(12)] + [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "answer": 5}
]


def make_jsonl(folder: Path) -> Path:
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "task.jsonl"


def make_gzip(folder: Path) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "task.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    return folder / "task.jsonl.gz"


def make_parquet(folder: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS[:-1]), folder / "task.parquet")
    return folder / "task.parquet"


def load_task(path: Path) -> None:
    task = JsonlTask(path)
    for split in ("train", "validation", "test"):
        for problem in task.problems(split):
            assert isinstance(problem.solution, str)
            for message in problem.messages:
                assert isinstance(message["content"], str | list)


def make_plan(folder: Path) -> Path:
    task = {"task": "arc:easy", "problems": 10}
    content = {
        "seen": {"sums": task},
        "unseen": {"logic": task | {"options": {"size": 3}}},
        "problems": 5,
        "few_shot": [3, 5],
        "search": {"margin": 2.0},
    }
    (folder / "plan.json").write_text(json.dumps(content))
    return folder / "plan.json"


def make_tiles(folder: Path) -> Path:
    tile = {"block_m": 16, "block_n": 32, "block_k": 64, "warps": 4, "stages": 3}
    (folder / "tiles.json").write_text(json.dumps({"one": tile, "two": tile | {"persistent": True}}))
    return folder / "tiles.json"


def load_tiles(path: Path) -> None:
    tuning._measured.cache_clear()
    for tile in with_warnings(path, lambda: tuning._measured(path)).values():
        assert isinstance(tile, tuning.Tile) and 0 < tile.block_m <= 1024


def with_warnings(path: Path, load: Callable[[], Any]) -> Any:
    """Warnings have to name the file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load()
    assert all(path.name in str(each.message) for each in said), [str(each.message) for each in said]
    return loaded


def make_cost_model(folder: Path) -> Path:
    kinds = json.loads(json.dumps(CostModel.measured_here.to_dict()))  # type: ignore[attr-defined]
    (folder / "cost-model.json").write_text(json.dumps({CostModel.machine_key(): kinds}))
    return folder / "cost-model.json"


def load_cost_model(path: Path) -> None:
    measure = CostModel.measure
    CostModel.measure = classmethod(lambda cls: cls.measured_here)  # type: ignore[attr-defined,assignment,method-assign]
    try:
        model = with_warnings(path, lambda: cost_model(path))
    finally:
        CostModel.measure = measure  # type: ignore[method-assign]
    assert 0 <= model.row < float("inf")


def make_shards(folder: Path) -> Path:
    write_safetensors(folder / "model-1.safetensors", {"a": torch.ones(2, 2)}, {})
    write_safetensors(folder / "model-2.safetensors", {"b": torch.ones(3)}, {})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    return folder / INDEX


def load_shards(path: Path) -> None:
    shards = Shards(path.parent)
    for name in shards.shapes:
        assert shards.read(name).isfinite().all()


def make_metrics(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "reward": 0.5}) + "\n" for i in range(5)))
    return folder / "metrics.jsonl"


def load_metrics(path: Path) -> None:
    assert all(type(row["step"]) is int for row in Metrics(path, 3).rows)


KINDS = {
    "expert": Kind(make_expert, load_expert, "z is another finite vector, or metadata another text"),
    "bank": Kind(make_bank, load_bank, "z is another finite matrix, or a name another text"),
    "bank folder": Kind(make_folder, load_folder, "a description is another text, or another key is ignored"),
    "factors": Kind(make_factors, load_factors, "what is damaged is computed again"),
    "checkpoint": Kind(make_checkpoint, load_checkpoint, "numbers are others that a run could have had"),
    "jsonl": Kind(make_jsonl, load_task, "a text is another text"),
    "jsonl.gz": Kind(make_gzip, load_task, "the header's time or name changed, which gzip does not check"),
    "parquet": Kind(make_parquet, load_task, "a text is another text: pages carry no checksum by default"),
    "plan": Kind(make_plan, load_plan, "a number or name is another possible one"),
    "tiles": Kind(make_tiles, load_tiles, "left out with a warning, or another possible tile"),
    "cost model": Kind(make_cost_model, load_cost_model, "measured again, or another possible time"),
    "shards": Kind(make_shards, load_shards, "the index has another key, which is ignored"),
    "metrics": Kind(make_metrics, load_metrics, "lines that are no rows are left out, as after a crash"),
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2.5,
    1e300,
    10**400,
    "",
    "x",
    "\u0000",
    [],
    {},
    [[]],
    ["x"],
    {"x": 1},
    "NaN!",
    "deep",
]


def changed_json(text: str, chance: random.Random) -> str:
    """With one value replaced, one key removed, or one added."""
    content = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(content)
    junk = chance.choice(JUNK)
    if not places:
        return json.dumps(junk)
    holder, key = chance.choice(places)
    if chance.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = junk
    made = json.dumps(content)
    return made.replace('"NaN!"', "NaN").replace('"deep"', "[" * 100_000 + "]" * 100_000)


def mutated(data: bytes, path: Path, chance: random.Random) -> bytes:
    way = chance.random()
    if way < 0.15:
        return data[: chance.randrange(len(data))]
    if way < 0.5 or path.suffix in (".gz", ".parquet"):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 4))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        said = header.get("__metadata__", {})
        inner = [name for name, text in said.items() if text[:1] in "[{"]
        if inner and chance.random() < 0.6:
            name = chance.choice(inner)
            said[name] = changed_json(said[name], chance)
        elif said and chance.random() < 0.5:
            said[chance.choice(list(said))] = chance.choice(("", "x", "[", "{}", "1e999", "[" * 100_000))
        else:
            header = json.loads(changed_json(json.dumps(header), chance).replace("NaN", "0"))
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if path.suffix == ".jsonl":
        lines = data.decode().splitlines()
        place = chance.randrange(len(lines))
        lines[place] = changed_json(lines[place], chance)
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    return changed_json(data.decode(), chance).encode()


def outcome(kind: Kind, path: Path) -> tuple[str, str]:
    """("refused", "used" or "fault", what was said)."""

    def late(*_: Any) -> None:
        raise TimeoutError("hang")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        kind.load(path)
    except TimeoutError as error:
        return "fault", str(error)
    except REFUSALS as error:
        text = str(error)
        named = path.name in text or path.parent.name in text
        good = named and not isinstance(error, RecursionError | UnicodeError)
        return ("refused" if good else "fault"), f"{type(error).__name__}: {text[:300]}"
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    finally:
        signal.alarm(0)
    return "used", ""


def run(name: str, count: int, seed: int) -> list[tuple[str, str]]:
    """The outcomes of one kind's mutations."""
    torch.set_num_threads(1)
    kind, chance = KINDS[name], random.Random(f"{name} {seed}")
    found = []
    with tempfile.TemporaryDirectory(prefix="t2-fuzz-") as place:
        os.environ["T2_CACHE"] = place
        CostModel.measured_here = a_cost_model()  # type: ignore[attr-defined]
        folder = Path(place) / "files"
        folder.mkdir()
        path = kind.make(folder)
        sound = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        kind.load(path)
        for _ in range(count):
            for each, data in sound.items():
                each.write_bytes(data)
            victim = chance.choice(sorted(sound)) if chance.random() < 0.5 else path
            data = mutated(sound[victim], victim, chance)
            victim.write_bytes(data)
            what, said = outcome(kind, path)
            if what == "fault" and victim != path and victim.name in said and not said.startswith("Assertion"):
                what = "refused" if said.split(":")[0] in ("FileFormatError", "FileNotFoundError") else what
            found.append((what, f"{victim.name}: {said}"))
    return found


def a_cost_model() -> CostModel:
    """Of no machine."""
    from t2kernels.packing import STORAGE_DTYPES
    from t2kernels.planner import ROWS, storage_kind

    kinds = {storage_kind(dtype) for dtype in STORAGE_DTYPES} | {storage_kind(torch.bfloat16, True)}
    entry = {kind: [1e-9] * len(ROWS) for kind in kinds}
    return CostModel.from_dict(
        {"machine": "none", "entry": entry, "row": 1e-9, "call": 1e-6, "build": 1e-9, "pack": 1e-9}
    )


def _in_process(name: str, count: int, seed: int, answers: Any) -> None:
    answers.put((name, run(name, count, seed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    each, faults = -(-options.mutations // len(KINDS)), 0
    context = multiprocessing.get_context("spawn")
    for name in tqdm(KINDS, desc="kinds", disable=None):
        answers = context.Queue()
        process = context.Process(target=_in_process, args=(name, each, options.seed, answers))
        process.start()
        found = [("fault", "the process did not end")]
        for _ in range(SECONDS * 30):
            try:
                _, found = answers.get(timeout=1)
                break
            except queue.Empty:
                if process.exitcode is not None:
                    found = [("fault", f"the process ended with status {process.exitcode}")]
                    break
        process.join(5)
        process.kill()
        counts = Counter(what for what, _ in found)
        tally = ", ".join(f"{counts[what]} {what}" for what in ("refused", "used", "fault"))
        print(f"{name}: {tally}; used: {KINDS[name].accepted}")
        for what, said in found:
            if what == "fault":
                faults += 1
                print(f"  {said}")
    print(f"{each * len(KINDS)} mutations, {faults} faults")
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    main()
