"""The checks of a wrapped model, for a family of models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import t2
from t2.generation.engine import Engine, Token
from t2.generation.whole_batches import WholeBatchEngine
from t2.model.verify import VerificationError
from tests.families.tiny import VOCABULARY, tiny_model

TOLERANCE = 2e-3
CHECKS = ("z = 1", "mixed batch", "greedy", "beams", "engine", "training step", "given back")


@dataclass
class Verdict:
    """The result for one family: for each of CHECKS "ok", why it does not apply, or what is wrong."""

    family: str
    kind: str = ""  # the model's class
    built: str = "ok"
    wrapped: str = "ok"
    share: float = 0.0  # of the blocks' weights decomposed
    dense: dict[str, int] = field(default_factory=dict)  # weights left dense, by kind
    left_out: dict[str, str] = field(default_factory=dict)
    engine: str = ""  # why requests run in whole batches; "" if they run token by token
    checks: dict[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """Checks that failed."""
        return [f"{name}: {came}" for name, came in self.checks.items() if came.startswith("wrong")]


class Inapplicable(Exception):
    """The plain model can't do this either."""


def prompts(count: int = 4) -> dict[str, Tensor]:
    """Rows of 9, 4, 7 and 2 tokens, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 7, 2])[:count]
    mask = torch.arange(9) >= 9 - lengths[:, None]
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}


def off(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-30))


def judge(family: str) -> Verdict:
    verdict = Verdict(family)
    try:
        model = tiny_model(family)
        verdict.kind = type(model).__name__
        with torch.no_grad():
            base = model(**prompts()).logits
        if not base.isfinite().all():
            raise ValueError("logits are not finite")
    except Exception as error:
        verdict.built = said(error)
        return verdict
    plain = copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False))
    except (VerificationError, ValueError, TypeError, NotImplementedError) as error:
        verdict.wrapped = f"refused: {error}"
        verdict.checks["given back"] = checked(lambda: same_weights(model, plain))
        return verdict
    except Exception as error:
        verdict.wrapped = f"wrong: {said(error)}"
        verdict.checks["wrapped"] = verdict.wrapped
        return verdict
    verdict.share, verdict.dense, verdict.left_out = svf.coverage.share, dict(svf.coverage.dense), dict(svf.left_out)
    names: list[Any] = ["a", "b", "a", None]
    for seed, name in enumerate("ab"):
        svf.add_expert(name, t2.Expert.random(svf.layout, std=0.3, seed=seed))
    merged = {name: svf.merged_copy(name) for name in (*"ab", None)}
    kept = prompts()["attention_mask"].bool()

    def at_one() -> str:
        with torch.no_grad():
            return near(svf(**prompts()).logits[kept], base[kept])

    def mixed() -> str:
        with torch.no_grad():
            got = svf(**prompts(), experts=names).logits
            want = torch.stack([merged[name](**prompts()).logits[row] for row, name in enumerate(names)])
        return near(got[kept], want[kept])

    def generated(**options: Any) -> str:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
        try:
            want = [merged[name].generate(**prompts(), **options)[row] for row, name in enumerate(names)]
        except Exception as error:
            raise Inapplicable(said(error)) from error
        got = svf.generate(**prompts(), experts=names, **options)
        return "ok" if torch.equal(got, torch.stack(want)) else "wrong: other tokens than the merged models"

    def served() -> str:
        """Requests that join one after the other, each against the merged model with its prompt alone."""
        rows = [ids[mask.bool()] for ids, mask in zip(*prompts().values(), strict=True)]
        options = {"max_new_tokens": 6, "do_sample": False}
        ends = model.generation_config.eos_token_id
        eos_ids = [] if ends is None else [ends] if isinstance(ends, int) else ends
        try:
            want = [merged[name].generate(r[None], **options)[0, len(r) :] for r, name in zip(rows, names, strict=True)]
        except Exception as error:
            raise Inapplicable(said(error)) from error
        limits: Any = {"eos_ids": eos_ids, "max_rows": 3, "max_tokens": 32, "chunk": 5}
        try:
            engine = Engine(svf, **limits)
        except TypeError as error:
            verdict.engine = str(error)
            engine = WholeBatchEngine(svf, **limits)
        given: list[list[int]] = [[] for _ in rows]
        for row, name, answer in zip(rows, names, given, strict=True):
            engine.submit(row.tolist(), lambda event, to=answer: to.append(event), max_tokens=6, expert=name)
            engine.step()
        while engine.step():
            pass
        got = [[event.id for event in answer if isinstance(event, Token)] for answer in given]
        return "ok" if got == [row.tolist() for row in want] else "wrong: other tokens than the merged models"

    def trained() -> str:
        batch = prompts()
        try:
            copy.deepcopy(plain)(**batch, labels=batch["input_ids"]).loss.backward()
        except Exception as error:
            raise Inapplicable(said(error)) from error
        z = svf.start_training()
        before = z.detach().clone()
        optimizer = torch.optim.SGD([z], lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            svf(**batch, labels=batch["input_ids"]).loss.backward()
            if z.grad is None or not z.grad.isfinite().all() or not z.grad.any():
                return "wrong: no finite gradient reaches z"
            optimizer.step()
        others = [name for name, p in svf.named_parameters() if p is not z and p.grad is not None]
        moved = not torch.equal(before, z.detach())
        svf.finish_training()
        return f"wrong: gradients of {others[:2]}" if others else "ok" if moved else "wrong: z did not move"

    def back() -> str:
        given = svf.unload()
        with torch.no_grad():
            if not torch.equal(given(**prompts()).logits, base):
                return "wrong: other logits"
        return same_weights(given, plain)

    runs = (at_one, mixed, generated, lambda: generated(num_beams=2), served, trained, back)
    for name, run in zip(CHECKS, runs, strict=True):
        verdict.checks[name] = checked(run)
    return verdict


def near(got: Tensor, want: Tensor) -> str:
    far = off(got, want)
    return "ok" if far <= TOLERANCE else f"wrong: off by {far:.2g}"


def same_weights(model: torch.nn.Module, plain: torch.nn.Module) -> str:
    got, want = model.state_dict(), plain.state_dict()
    different = [
        n for n in want.keys() | got.keys() if n not in got or n not in want or not torch.equal(got[n], want[n])
    ]
    return f"wrong: {sorted(different)[:3]} differ" if different else "ok"


def checked(run: Callable[[], str]) -> str:
    try:
        return run()
    except Inapplicable as error:
        return f"not for the plain model: {error}"
    except Exception as error:
        return f"wrong: {said(error)}"


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def report(family: str, to: Connection) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    to.send(asdict(judge(family)))
