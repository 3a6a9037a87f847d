"""Compares the bits of this tree's results with another commit's: kernels, models, training and adaptation.

    python -m tests.compare_bits REF [--work FOLDER] [--only TEXT ...]

Checks REF out into a folder of its own, builds its kernels there, runs every case in one process per tree, and prints
whether each case has the same digest. Exit code 1 if any differs. A case that a tree lacks counts as different.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS, SHAPES = (1, 7, 40), ((64, 48), (577, 1031), (96, 96))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("ref", help="commit to compare with")
    arguments.add_argument("--work", type=Path, help="folder for the other tree; default a temporary one")
    arguments.add_argument("--only", nargs="*", default=[], help="run cases whose name contains one of these texts")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        other = (given.work or Path(temporary) / "tree").resolve()
        if not other.exists():
            subprocess.run(["git", "worktree", "add", "--detach", str(other), given.ref], cwd=HERE.parent, check=True)
        try:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=other, check=True)
            found = [_run(tree, given.only) for tree in (other, HERE.parent)]
        finally:
            if given.work is None:
                subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=HERE.parent, check=True)
    names = list(dict.fromkeys((*found[0], *found[1])))
    same = {name: found[0].get(name) == found[1].get(name) is not None for name in names}
    for name, equal in same.items():
        print(f"{'same' if equal else 'DIFFERENT'}  {name}")
    print(f"{sum(same.values())} of {len(same)} cases have the bits of {given.ref}")
    return 0 if names and all(same.values()) else 1


def _run(tree: Path, only: list[str]) -> dict[str, str | None]:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--worker", *only]
    done = subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


# One tree


def worker(only: list[str]) -> None:
    import torch

    torch.set_num_threads(2)
    digests = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["T2_CACHE"] = folder
        for name, case in _cases(Path(folder)):
            if not only or any(text in name for text in only):
                digests[name] = _attempt(name, case)
    print(json.dumps(digests))


def _attempt(name: str, case: Callable[[], Any]) -> str | None:
    try:
        return _digest(case())
    except Exception:
        traceback.print_exc()
        print(f"{name} failed", file=sys.stderr)
        return None


def _digest(value: Any) -> str:
    """SHA-256 over tensors' bytes and other values' text."""
    import torch

    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        elif isinstance(part, dict):
            add(list(part.items()))
        elif isinstance(part, list | tuple):
            for each in part:
                add(each)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


def _load(path: str) -> Any:
    """A module of this file's tree, whatever tree runs."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, HERE / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cases(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        yield f"kernels {dtype}", lambda dtype=dtype: _kernels(dtype)
    lm = _load("t2/tiny_lm.py")
    for family in lm.CONFIGS:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"model {family} {dtype}", lambda f=family, d=dtype: _model(lm, f, d)
    for method in ("svf", "lora", "dense-compose"):
        yield f"training {method}", lambda m=method: _training(folder / m, method=m)
    yield "training with a cold start", lambda: _training(folder / "cold", cold_start_steps=2, steps=4)
    for search in ("cem", "cma", "random"):
        yield f"few-shot {search}", lambda s=search: _few_shot(s)
    yield "first pass", _first_pass
    yield "smollm2 generate", _smollm2


def _kernels(dtype: Any) -> list[Any]:
    import torch

    from t2kernels import DenseWeight, FactoredWeight, decompose, ops

    found: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features, generator=generator)
        factors = decompose(weight)
        packed, dense = FactoredWeight.pack(*factors, dtype=dtype), DenseWeight.pack(weight, dtype=dtype)
        scales = packed.s * (1 + 0.1 * torch.randn(5, len(packed.s), generator=generator))
        bias = torch.randn(out_features, generator=generator)
        for rows in ROWS:
            x = torch.randn(rows, in_features, generator=generator)
            ids = torch.randint(5, (rows,), generator=generator)
            for kind in (torch.float32, torch.bfloat16):
                found.append(packed.linear(x.to(kind), scales, ids, bias.to(kind)))
                found.append(dense.linear(x.to(kind), bias.to(kind)))
            leaf, moved = x.clone().requires_grad_(), scales.clone().requires_grad_()
            packed.linear(leaf, moved, ids, bias).square().sum().backward()
            found += [leaf.grad, moved.grad]
        found += list(factors)
    query = torch.randn(3, 4, 1, 32, generator=generator)
    key, value = (torch.randn(3, 2, 19, 32, generator=generator) for _ in range(2))
    found.append(ops.decode_attention(query, key, value, None, 32**-0.5))
    return found


def _model(lm: Any, family: str, dtype: Any) -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import t2

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(lm.CONFIGS[family]()).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.3)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=dtype, progress=False))
    names = lm.add_random_experts(svf, 3)
    ids, choices = lm.prompts(4), [*names, None]
    with torch.no_grad():
        logits = svf(input_ids=ids, experts=choices).logits
    z = svf.z_of("e0").clone().requires_grad_()
    with svf.route([z, "e1", {"e0": 0.5, "e2": 0.5}, None]):
        svf.model(input_ids=ids).logits.float().square().mean().backward()
    tokens = svf.generate(input_ids=ids, experts=choices, max_new_tokens=8, do_sample=False)
    merged = (getattr(svf, "merged_copy", None) or svf.merge)("e1").state_dict()
    return [svf.sigma, svf.layout.fingerprint, logits, z.grad, tokens, merged]


def _training(folder: Path, **changes: Any) -> list[Any]:
    import torch

    from t2.training import Trainer, TrainOptions

    torch.set_num_threads(1)
    toy = _load("t2/toy.py")
    options: dict[str, Any] = {
        "task": "say",
        "output": folder,
        "steps": 3,
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        "validate_every": 2,
        "validation_size": 8,
        "test_size": 8,
        "learning_rate": 5e-2,
        "trackers": (),
    }
    assert {field.name for field in fields(TrainOptions)} >= options.keys()
    trainer = Trainer(toy.toy_model(), toy.toy_tokenizer(), toy.SayTheWord(), TrainOptions(**options | changes))
    result = trainer.run()
    torch.set_num_threads(2)
    return [list(trainer.policy.parameters), result.best and result.best.answers, result.base and result.base.answers]


def _wrapped_toy() -> tuple[Any, Any, Any]:
    import t2

    toy = _load("t2/toy.py")
    svf = t2.SVFModel(toy.toy_model(), t2.SVFConfig(progress=False))
    for index, name in enumerate(("red", "cat")):
        svf.add_expert(name, t2.Expert.random(svf.layout, std=0.3, seed=index))
    return svf, toy.toy_tokenizer(), toy.SayTheWord()


def _few_shot(method: str) -> list[Any]:
    from t2.adaptation import FewShotOptions, FewShotStrategy

    svf, tokenizer, task = _wrapped_toy()
    options = FewShotOptions(search=method, population=12, elite_ratio=0.25, generations=3)
    strategy = FewShotStrategy(svf, tokenizer, task, task.problems("train")[:4], options=options)
    result = strategy.search()
    return [result.alpha, result.fitness, list(result.singles.items()), strategy.expert().z]


def _first_pass() -> list[Any]:
    from t2.adaptation import ClassifierStrategy, Domain, PromptStrategy

    svf, tokenizer, task = _wrapped_toy()
    import t2

    svf.add_expert("classifier", t2.Expert.random(svf.layout, std=0.3, seed=7))
    domains = [Domain("red", "say"), Domain("cat", "cat dog")]
    prompts, found = task.problems("test"), []
    for strategy in (PromptStrategy(svf, tokenizer, domains), ClassifierStrategy(svf, tokenizer, domains)):
        adaptation = strategy.adapt(prompts)
        found += [adaptation.names, adaptation.alpha, adaptation.reasons]
    return found


def _smollm2() -> list[Any]:
    import torch

    import t2

    model, tokenizer = t2.load("smollm2-135m-instruct")
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False, dtype=torch.bfloat16))
    names = []
    for seed in range(3):
        names.append(f"e{seed}")
        svf.add_expert(names[-1], t2.Expert.random(svf.layout, std=0.05, seed=seed))
    texts = ["What is the capital of France?", "Add 17 and 25.", "Name a fruit that is yellow.", "Why is the sky blue?"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = svf(**batch, experts=[*names, None]).logits
    return [svf.sigma, logits, svf.generate(**batch, experts=[*names, None], max_new_tokens=12, do_sample=False)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        sys.exit(main())
