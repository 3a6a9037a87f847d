"""The experts of a server: files of a bank folder that come, change and go, mixes by name, and pass one."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from t2.adaptation.bank_folder import CLASSIFIER, load_bank_folder
from t2.adaptation.base import Adaptation, Strategy, mixed
from t2.adaptation.dispatch import PromptStrategy
from t2.adaptation.strategies import PassOne, pass_one
from t2.experts.expert import Expert
from t2.experts.mixes import parse_mix
from t2.generation.engine import Finished, QueueFull, Token
from t2.generation.prompts import encode
from t2.model.svf_model import ExpertChoice
from t2.server.errors import ApiError
from t2.server.opened import Opened
from t2.tasks.classify import adaptation_problem

BASE, AUTO = "base", "auto"
SUFFIX = ".safetensors"
log = logging.getLogger("t2.server")


@dataclass(frozen=True)
class Chosen:
    """The expert of a request, under the name that it is reported by; and how pass one chose it, if it did."""

    name: str
    choice: ExpertChoice
    reason: str | None = None
    seconds: float | None = None


class Experts:
    """What requests may name as their model: the base, and the experts in the files of the folder.

    NAME.safetensors is the expert NAME, and domains.json says what pass one chooses among. Without a folder the experts
    are those that the model has.
    """

    def __init__(self, opened: Opened) -> None:
        self.svf, self.tokenizer, self.engine = opened.svf, opened.tokenizer, opened.engine
        self.model, self.folder = opened.model, opened.folder
        self._seen: dict[str, tuple[int, int]] = {}
        self._strategy: Strategy | None = None
        self._needed: set[str] | None = None
        """The experts that pass one chooses among; None where that is not known."""
        self._asked: deque[tuple[str, Future[Chosen]]] = deque()
        self._looking = threading.Lock()

    @property
    def names(self) -> list[str]:
        """All models by name, the base first."""
        experts = [name for name in self.svf.bank if name != CLASSIFIER]
        return [self.model, *([AUTO] if self._strategy is not None else []), *experts]

    def is_reserved(self, name: str) -> bool:
        """Whether an expert of this name could not be asked for."""
        return name in (self.model, BASE, AUTO)

    # The folder

    def look(self) -> None:
        """Takes over what has changed in the folder. A file that cannot be read leaves the expert as it was."""
        with self._looking:
            if self.folder is not None:
                self._look(self.folder)

    def _look(self, folder: Path) -> None:
        paths = [path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".")]
        files = {path.name.removesuffix(SUFFIX): path for path in paths}
        described = folder / "domains.json"
        changed: set[str] = set()
        for name, path in {**files, "": described}.items():
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            stamp = about.st_mtime_ns, about.st_size
            if self._seen.get(name) == stamp:
                continue
            self._seen[name] = stamp
            changed.add(name)
            if name:
                self._add(name, path)
        for name in self._seen.keys() - files.keys() - ({""} if described.exists() else set()):
            del self._seen[name]
            changed.add(name)
            if name in self.svf.bank:
                self.svf.remove_expert(name)
                log.info("expert removed", extra={"fields": {"expert": name}})
        if changed and (self._needed is None or changed & {"", CLASSIFIER, *self._needed}):
            self._needed = None
            self._strategy = self._strategy_of(folder)

    def _add(self, name: str, path: Path) -> None:
        replaced = name in self.svf.bank
        try:
            if self.is_reserved(name):
                raise ValueError(f"name: expected another than the base's, {BASE!r} and {AUTO!r}, got {name!r}")
            self.svf.add_expert(name, Expert.load(path), replace=True)
        except (OSError, ValueError, TypeError) as error:
            log.error("expert refused", extra={"fields": {"expert": name, "error": str(error)}})
        else:
            log.info("expert replaced" if replaced else "expert added", extra={"fields": {"expert": name}})

    def _strategy_of(self, folder: Path) -> Strategy | None:
        """Pass one by the classification expert, or by the prompt, if the folder says what its experts are for."""
        if not (folder / "domains.json").is_file():
            return None
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                bank = load_bank_folder(folder)
            for warning in noted:
                log.warning("bank", extra={"fields": {"warning": str(warning.message)}})
            kind: PassOne = "prompt" if bank.classifier is None else "classifier"
            needed = {domain.name for domain in bank.domains} | ({CLASSIFIER} if bank.classifier else set())
            if missing := sorted(needed - set(self.svf.bank)):
                raise ValueError(f"bank: expected the experts {', '.join(missing)}, which were refused")
            self._needed = needed
            own = copy.deepcopy(self.tokenizer)  # one that two threads use at a time fails
            return pass_one(kind, self.svf, own, bank.domains)
        except (OSError, ValueError) as error:
            log.error("no automatic choice", extra={"fields": {"error": str(error)}})
            return None

    async def watch(self, seconds: float = 1.0) -> None:
        """Looks again and again."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(self.look)
            except Exception:
                log.exception("the bank's folder could not be read")

    # Requests

    async def choose(self, model: str, words: str) -> Chosen:
        """The expert that a request's `model` names; `words` is what pass one reads.

        Raises:
            ApiError: 404 for a name that nothing has, 400 for a mix that is none.
        """
        if model in (self.model, BASE):
            return Chosen(BASE, None)
        if model == AUTO:
            return await self._chosen(words)
        if model in self.svf.bank and model != CLASSIFIER:
            return Chosen(model, model)
        try:
            weights = parse_mix(model)
        except ValueError as error:
            raise ApiError(400, f"model: {error}", "model") from error
        if weights is None:
            raise self._unknown(model)
        return Chosen(model, self._mix(weights))

    def _mix(self, weights: dict[str, float]) -> ExpertChoice:
        for name in weights:
            if name not in (self.model, BASE) and (name not in self.svf.bank or name == CLASSIFIER):
                raise self._unknown(name)
        names = [BASE if name == self.model else name for name in weights]
        z = mixed(self.svf.bank, names, torch.tensor([list(weights.values())]))[0]
        try:
            self.svf.slot_table.scales_of(z)
        except ValueError as error:
            raise ApiError(400, f"model: {error}", "model") from error
        return z

    def _unknown(self, name: str) -> ApiError:
        return ApiError(
            404, f"model: expected one of {', '.join(self.names)}; got {name!r:.200}", "model", "model_not_found"
        )

    async def _chosen(self, words: str) -> Chosen:
        if self._strategy is None:
            raise self._unknown(AUTO)
        found = self._as_a_request(words, self._strategy) if isinstance(self._strategy, PromptStrategy) else None
        if found is not None:
            return await found
        chosen: Future[Chosen] = Future()
        self._asked.append((words, chosen))
        try:
            ran = self.engine.call(self._adapt)
        except RuntimeError as error:
            raise ApiError(503, "the engine has ended") from error
        ran.add_done_callback(lambda ended: self._give_up(chosen) if ended.exception() is not None else None)
        return await asyncio.wrap_future(chosen)

    def _as_a_request(self, words: str, strategy: PromptStrategy) -> Awaitable[Chosen] | None:
        """Pass one as a row of the running batch, which begins like those before it; None where it can't be one."""
        first, started = strategy.label_tokens.first, time.perf_counter()
        if first is None or (strategy.calibration != "none" and strategy.prior is None):
            return None
        prompt = encode(adaptation_problem(words, strategy.domains), self.tokenizer).tolist()
        if len(prompt) + 1 > self.engine.max_tokens:
            return None
        chosen: Future[Chosen] = Future()

        def event(found: Token | Finished) -> None:
            if chosen.done() or not chosen.set_running_or_notify_cancel():
                return
            if isinstance(found, Finished):
                chosen.set_exception(ApiError(503, f"the engine has ended: {found.error or found.reason}"))
                return
            scores = torch.tensor([[log_p for _, log_p in found.likeliest]])
            try:
                chosen.set_result(self._of(strategy.adaptation(scores.log_softmax(-1), started), 0))
            except Exception as error:
                chosen.set_exception(error)

        try:
            self.engine.submit(prompt, event, max_tokens=1, expert=strategy.expert, likeliest=first, ahead=True)
        except QueueFull as error:
            raise ApiError(429, "the server is busy; try again later", code="queue_full") from error
        except ValueError as error:  # its expert has just gone
            raise self._unknown(AUTO) from error
        except RuntimeError as error:
            raise ApiError(503, "the engine has ended") from error
        return asyncio.wrap_future(chosen)

    def _of(self, found: Adaptation, place: int) -> Chosen:
        row = found.alpha[place]
        name = found.names[int(row.argmax())] if row.dim() == 1 else "mix"
        return Chosen(name, found.choices(self.svf)[place], found.reasons[place], found.seconds)

    @staticmethod
    def _give_up(chosen: Future[Chosen]) -> None:
        if not chosen.done() and chosen.set_running_or_notify_cancel():
            chosen.set_exception(ApiError(503, "the engine has ended"))

    def _adapt(self) -> None:
        """Pass one for all that wait for it, in the engine's thread."""
        asked = [self._asked.popleft() for _ in range(len(self._asked))]
        asked = [(words, chosen) for words, chosen in asked if chosen.set_running_or_notify_cancel()]
        if not asked:
            return
        strategy = self._strategy
        try:
            if strategy is None:
                raise self._unknown(AUTO)
            found = strategy.adapt([words for words, _ in asked])
            each = [self._of(found, place) for place in range(len(asked))]
        except Exception as error:
            for _, chosen in asked:
                chosen.set_exception(error)
            return
        for (_, chosen), choice in zip(asked, each, strict=True):
            chosen.set_result(choice)
