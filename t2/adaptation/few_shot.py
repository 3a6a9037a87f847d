"""Strategy (c): the mix of experts that answers a few problems of a task best (arXiv 2501.06252, section 3.2).

Candidates differ in their scales alone, so a whole population is one batch: 32 candidates and 10 prompts are 320 rows
with 32 slots.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.adaptation.base import Adaptation, Strategy, mixed
from t2.adaptation.search import (
    FewShotOptions,
    Fitness,
    Generation,
    Memory,
    Search,
    SearchProgress,
    make_search,
    run_search,
)
from t2.experts.expert import Expert
from t2.experts.layout import Layout
from t2.generation.batching import length_batches
from t2.generation.cached_batch import SVFRunner
from t2.generation.decode import Completion, DecodeOptions, complete
from t2.generation.prompts import encode, eos_ids_of
from t2.model.svf_model import SVFModel
from t2.tasks.base import Problem, Split, Task, scores_of
from t2.tasks.classify import BASE, Prompt
from t2.weights.files import FileFormatError, file_errors
from t2kernels.files import strict_json, write_text

LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def few_shot_problems(task: Task, count: int, *, split: Split = "train", seed: int = 0, skip: int = 0) -> list[Problem]:
    """`count` problems of a split, drawn without repeats; ValueError if it has fewer.

    `skip` leaves its first ones out.
    """
    problems = task.problems(split)[skip:]
    if not 1 <= count <= len(problems):
        behind = f" behind the first {skip}" if skip else ""
        raise ValueError(
            f"few_shot: expected 1 to {len(problems)} problems of {task.name}'s {split}{behind}, got {count}"
        )
    chosen = numpy.random.default_rng(seed).choice(len(problems), count, replace=False)
    return [problems[int(index)] for index in chosen]


def matrix_groups(layout: Layout, options: FewShotOptions) -> tuple[int, ...]:
    """The group of each matrix, in the order of the layout; () for one group.

    By "layer" matrices belong together whose names have the same first number ("model.layers.3."), and those without
    one.
    """
    if options.granularity == "model":
        return ()
    if options.granularity == "matrix":
        return tuple(range(len(layout.names)))
    layers = [found[1] if (found := LAYER.search(name)) else "" for name in layout.names]
    numbers = {layer: index for index, layer in enumerate(dict.fromkeys(layers))}
    return tuple(numbers[layer] for layer in layers)


def keeper(best: Fitness, singles: Mapping[str, Fitness], incumbent: str, margin: float) -> str | None:
    """Single expert to keep instead of the best mix, or None.

    With a margin it is the incumbent, or the base if that answers more of the few-shot problems, unless the mix is
    above it by `margin` standard errors (`Fitness.above`). Without one the best mix is taken (published).

    Args:
        singles: the fitness of the base and of each expert alone, by name.
        incumbent: one of them.
    """
    if not margin:
        return None
    name = incumbent if singles[incumbent].score >= singles[BASE].score else BASE
    return name if best.above(singles[name]) < margin else None


def alone(name: str, names: Sequence[str], alpha: Tensor) -> Tensor:
    """Weights of one single, in the shape of alpha: [E], or [G, E] with groups."""
    weights = torch.zeros_like(alpha)
    weights[..., names.index(name)] = 1.0
    return weights


def mean_weights(names: Sequence[str], alpha: Tensor) -> dict[str, float]:
    """The weight of each expert, the mean over groups."""
    return dict(zip(names, alpha.reshape(-1, len(names)).mean(0).tolist(), strict=True))


@dataclass(frozen=True)
class FewShotResult:
    """The best mix of a search, or the single that stays in its place (`keeper`).

    alpha: [E] float32, or [G, E] where groups of matrices have weights of their own; columns as in `names`.
    singles: the fitness of the base and of each expert alone, by name.
    incumbent: what was to stay unless a mix is better by the margin.
    seconds: of the search, without what `memory` had.
    """

    names: tuple[str, ...]
    alpha: Tensor
    groups: tuple[int, ...]
    fitness: Fitness
    singles: Mapping[str, Fitness]
    incumbent: str
    generations: tuple[Generation, ...]
    stopped: str
    seconds: float

    @property
    def mean_alpha(self) -> dict[str, float]:
        """The weight of each expert, the mean over groups."""
        return mean_weights(self.names, self.alpha)


class FewShotStrategy(Strategy):
    """One mix for all requests: that which answers a few problems of their task best.

    The search runs when it is first needed. The base, every expert alone and all in equal parts are among its first
    candidates, so that with a `margin` of 0 the result is never worse than any of them on these problems.

    Args:
        svf, tokenizer: as in `Strategy`.
        task: whose metric counts.
        problems: to try candidates on; none of those that the result is to be judged on.
        options: of the search.
        experts: names of the bank that are mixed; default all.
        incumbent: what stays unless a mix is better by the `margin` of the options, which must be above 0 for any but
            the base: an expert's name, or a strategy of pass one, of which it is what the problems get the most of.
        new_tokens: longest answer; default the task's own.
        memory: file that results of candidates are kept in, so that a search that was interrupted goes on.
        announce: called after each generation.

    Raises:
        ValueError: no problems, no experts, unknown ones, or a population without room for each of them; an incumbent
            that is none of them, or without a margin.
        FileFormatError: the memory's file is of another search, or not one.
    """

    name = "few-shot"

    def __init__(
        self,
        svf: SVFModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        problems: Sequence[Problem],
        *,
        options: FewShotOptions | None = None,
        experts: Sequence[str] | None = None,
        incumbent: Strategy | str = BASE,
        new_tokens: int | None = None,
        memory: Path | None = None,
        announce: Callable[[SearchProgress], object] = lambda found: None,
    ) -> None:
        super().__init__(svf, tokenizer)
        names = svf.bank.names if experts is None else list(experts)
        if not names or not set(names) <= set(svf.bank) or len(set(names)) != len(names) or BASE in names:
            raise ValueError(f"experts: expected names of the bank ({', '.join(svf.bank) or 'empty'}), got {names}")
        if not len(problems):
            raise ValueError("problems: expected at least one, got none")
        self.options = options or FewShotOptions()
        self.task, self.problems = task, list(problems)
        self.names = (BASE, *names)
        if incumbent != BASE and not self.options.margin:
            raise ValueError("incumbent: expected a margin above 0 beside one, since at 0 the best mix is always taken")
        if isinstance(incumbent, str):
            self._check_incumbent(incumbent)
        self.incumbent = incumbent
        self.groups = matrix_groups(svf.layout, self.options)
        self.new_tokens = new_tokens or task.max_new_tokens
        self.announce = announce
        self.result: FewShotResult | None = None
        self._memory_file = memory
        self.prompts = [encode(problem, tokenizer) for problem in self.problems]
        eos_ids, pad_token = eos_ids_of(svf.model, tokenizer), int(tokenizer.pad_token_id)
        self._decode_options = DecodeOptions(self.new_tokens, tuple(eos_ids), pad_token, svf.sigma.device)
        self._new_search()  # says what does not fit before any work
        self._read_memory()

    def _check_incumbent(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"incumbent: expected one of {', '.join(self.names)}, got {name!r}")

    def _incumbent(self) -> str:
        """Its name; of a strategy that with the most weight over all problems."""
        if isinstance(self.incumbent, str):
            return self.incumbent
        found = self.incumbent.adapt(self.problems)
        weights = found.alpha.reshape(-1, len(found.names)).sum(0)
        name = found.names[int(weights.argmax())]
        self._check_incumbent(name)
        return name

    # Candidates

    @property
    def _shape(self) -> tuple[int, int]:
        return max(self.groups, default=0) + 1, len(self.names)

    def _new_search(self) -> Search:
        centre = min(max(1 / len(self.names), self.options.low), self.options.high)
        return make_search(self._first(), self.options, centre)

    def _first(self) -> Tensor:
        """[E + 1, D]: the base and each expert alone, then all in equal parts."""
        groups, count = self._shape
        weights = torch.cat([torch.eye(count), torch.full((1, count), 1 / count)])
        return weights.unsqueeze(1).expand(-1, groups, -1).reshape(count + 1, -1).clone()

    def _normalise(self, candidates: Tensor) -> Tensor:
        """[N, D], in each group divided by the sum; the base where all are 0."""
        if self.options.coefficients == "free":
            return candidates
        alpha = candidates.view(len(candidates), *self._shape)
        sums = alpha.sum(-1, keepdim=True)
        base = torch.zeros_like(alpha)
        base[..., 0] = 1.0
        return torch.where(sums > 0, alpha / sums.clamp(min=1e-12), base).reshape(len(candidates), -1)

    def _alpha(self, candidates: Tensor) -> Tensor:
        """[N, E], or [N, G, E] with groups."""
        return candidates.view(len(candidates), *(self._shape if self.groups else self._shape[1:]))

    def vectors(self, candidates: Tensor) -> Tensor:
        """z [N, R] of normalised candidates [N, D]."""
        return mixed(self.svf.bank, self.names, self._alpha(candidates), self.groups)

    # Scores

    def evaluate(self, candidates: Tensor) -> list[Fitness]:
        """The fitness of normalised candidates [N, D]."""
        return self.fitness(self.population_answers(candidates))

    def population_answers(self, candidates: Tensor) -> list[list[Completion]]:
        """Greedy answers to the problems, by candidate [N, D]: all in one batch, as far as the token budget goes."""
        z = list(self.vectors(candidates).to(self.svf.sigma.device))
        rows = [(c, p) for c in range(len(z)) for p in range(len(self.prompts))]
        found: dict[tuple[int, int], Completion] = {}
        lengths = [len(self.prompts[p]) + self.new_tokens for _, p in rows]
        for indices in length_batches(lengths, self.options.token_budget):
            batch = [rows[index] for index in indices]
            answers = complete(
                SVFRunner(self.svf),
                [self.prompts[p] for _, p in batch],
                self._decode_options,
                candidates=[c for c, _ in batch],
                route=lambda rows: self.svf.route([z[i] for i in rows]),
                likelihoods=True,
            )
            found.update(zip(batch, answers, strict=True))
        return [[found[c, p] for p in range(len(self.prompts))] for c in range(len(z))]

    def fitness(self, answers: Sequence[Sequence[Completion]]) -> list[Fitness]:
        """The fitness of each candidate, from its completions of the problems."""
        texts = [
            str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True)) for row in answers for answer in row
        ]
        scores = scores_of(self.task, self.problems * len(answers), texts)
        count = len(self.problems)
        found = []
        for index, row in enumerate(answers):
            own = scores[index * count : (index + 1) * count]
            right = [answer.log_likelihood for answer, score in zip(row, own, strict=True) if score == 1.0]
            found.append(Fitness(statistics.fmean(own), statistics.fmean(right) if right else -math.inf, tuple(own)))
        return found

    # The search

    def search(self, evaluate: Callable[[Tensor], Sequence[Fitness]] | None = None) -> FewShotResult:
        """Searches, or returns what was found before.

        Args:
            evaluate: takes the place of `self.evaluate`, for comparisons.
        """
        if self.result is not None:
            return self.result
        start = time.perf_counter()
        incumbent = self._incumbent()
        found = run_search(
            self._new_search(), evaluate or self.evaluate, self._normalise, memory=self._memory, announce=self._after
        )
        first = self._normalise(self._first()[: len(self.names)])
        singles = {
            name: self._memory[candidate.numpy().tobytes()] for name, candidate in zip(self.names, first, strict=True)
        }
        alpha, margin = self._alpha(found.alpha.unsqueeze(0))[0], self.options.margin
        fitness, stopped = found.fitness, found.stopped
        if (kept := keeper(fitness, singles, incumbent, margin)) is not None:
            alpha, fitness = alone(kept, self.names, alpha), singles[kept]
            stopped += f"; {kept} stays, since the best mix is not above it by {margin:g} standard errors"
        self.result = FewShotResult(
            self.names,
            alpha,
            self.groups,
            fitness,
            singles,
            incumbent,
            tuple(found.generations),
            stopped,
            time.perf_counter() - start,
        )
        return self.result

    def _after(self, found: SearchProgress) -> None:
        self._write_memory()
        self.announce(found)

    def adapt(self, prompts: Sequence[Prompt]) -> Adaptation:
        """The same mix for every prompt. `seconds` are the search's the first time."""
        start = time.perf_counter()
        result = self.search()
        alpha = result.alpha.unsqueeze(0).repeat(len(prompts), *(1,) * result.alpha.dim())
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result.mean_alpha.items())
        reason = f"few-shot {result.fitness.score:.0%} of {len(self.problems)}: {weights}"
        seconds = time.perf_counter() - start
        return Adaptation(result.names, alpha, seconds, (reason,) * len(prompts), result.groups)

    def expert(self) -> Expert:
        """The mix as an expert of its own, with weights, scores and options as metadata."""
        result = self.search()
        z = mixed(self.svf.bank, self.names, result.alpha.unsqueeze(0), self.groups)[0]
        metadata = {
            "task": self.task.name,
            "alpha": json.dumps(result.mean_alpha),
            "score": str(result.fitness.score),
            "log_likelihood": str(result.fitness.log_likelihood),
            "singles": json.dumps({name: fitness.score for name, fitness in result.singles.items()}),
            "problems": str(len(self.problems)),
            "incumbent": result.incumbent,
            "seed": str(self.options.seed),
            "options": json.dumps(asdict(self.options)),
        }
        if self.groups:
            metadata["alpha_by_group"] = json.dumps(result.alpha.tolist())
        return Expert(z, self.svf.layout, metadata)

    # What is known from before

    def _identity(self) -> str:
        """A digest of everything that a candidate's fitness depends on."""
        digest = hashlib.sha256()
        for part in (self.svf.layout.fingerprint, self.task.name, self.names, self.groups, self.new_tokens):
            digest.update(f"{part}\n".encode())
        digest.update(str(self.svf.svf_config.dtype).encode())
        for problem, prompt in zip(self.problems, self.prompts, strict=True):
            digest.update(f"{prompt.tolist()} {problem.solution}\n".encode())
        for name in self.names[1:]:
            digest.update(self.svf.bank[name].z.numpy().tobytes())
        return digest.hexdigest()

    def _read_memory(self) -> None:
        self._memory: Memory = {}
        path = self._memory_file
        if path is None or not path.is_file():
            return
        identity, self._memory = read_memory(path)
        if identity != self._identity():
            raise FileFormatError(
                f"memory: {path} is of a search with another model, bank, task or problems; delete it"
            )

    def _write_memory(self) -> None:
        if self._memory_file is not None:
            known = {key.hex(): list(asdict(fitness).values()) for key, fitness in self._memory.items()}
            write_text(self._memory_file, json.dumps({"identity": self._identity(), "candidates": known}) + "\n")


def read_memory(path: Path) -> tuple[str, Memory]:
    """Reads a search's file: the digest of all that fitnesses depend on, and the fitness of each candidate.

    Raises:
        FileFormatError: the file is not of a search; the message names it.
    """
    with file_errors(f"memory: {path} is not of a few-shot search"):
        saved = strict_json(path.read_bytes(), finite=False)  # a log-likelihood may be -Infinity
        if not isinstance(saved["identity"], str):
            raise ValueError(f"identity: expected a text, got {saved['identity']!r:.80}")
        memory: Memory = {}
        for key, (score, likelihood, scores) in saved["candidates"].items():
            if not all(type(value) in (int, float) and not math.isnan(value) for value in (score, likelihood, *scores)):
                raise ValueError(f"candidates: expected numbers for {key:.80}")
            if not all(math.isfinite(value) for value in (score, *scores)) or likelihood == math.inf:
                raise ValueError(f"candidates: expected finite numbers for {key:.80}")
            memory[bytes.fromhex(key)] = Fitness(score, likelihood, tuple(scores))
        return saved["identity"], memory
