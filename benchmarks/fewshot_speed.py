"""Few-shot search for a mix of experts: the population in one batch against the published way.

    python benchmarks/fewshot_speed.py --bank t2/banks/smollm2-135m-instruct    # ten minutes of two cores
    python benchmarks/fewshot_speed.py --rounds 1 --generations 1 --population 6 --few-shot 2    # a look

The published code (arXiv 2501.06252) composes U @ diag(sigma z) @ V^T, a product with a diagonal matrix among them,
copies it into the model, answers all problems in one batch, and goes to the next candidate. A second row has the least
that this takes: W' written in place with one product a matrix. Both get their likelihoods from the pass that generates,
and no candidate is tried twice. Ours also runs with factors and products of bfloat16. All ways get the same candidates
for the same seed and are timed end to end, in turns; that they come to the same is checked answer by answer, since a
search in which nothing is right comes to the base whatever it computes. Writes benchmarks/results/fewshot-speed.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).parent.parent))
from t2.generation.greedy import Answer

import t2
from t2.adaptation import FewShotOptions, FewShotResult, FewShotStrategy, few_shot_problems, load_bank_folder
from t2.adaptation.search import Fitness
from t2.demo import baselines as peers
from t2.experts.layout import Layout
from t2.generation.batching import pad
from t2.generation.prompts import eos_ids_of
from t2.tasks import get
from t2.weights.factor_cache import FactorCache
from t2.weights.machine import machine
from t2.weights.targets import weight_matrix
from t2kernels.files import write_text

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m-instruct"
TASK = "reasoning-gym:chain_sum"
TASK_OPTIONS = {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
OURS, OURS_BF16 = "one batch", "one batch, bf16 products"
PUBLISHED, IN_PLACE = "W' as published, one by one", "W' in place, one by one"


class _Likelihoods(LogitsProcessor):
    """Keeps log p of the likeliest token of each row, [rows] a step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.amax(-1) - scores.logsumexp(-1))
        return scores


@dataclass
class Published:
    """Candidates one by one on a dense model whose weights are overwritten."""

    dense: Any
    factors: dict[str, Any]
    tokenizer: Any
    in_place: bool

    def population_answers(self, strategy: FewShotStrategy, candidates: Tensor) -> list[list[Answer]]:
        answers = []
        for z in strategy.vectors(candidates):
            if self.in_place:
                peers.rebuild(self.dense, self.factors, strategy.svf.layout, z)
            else:
                self._compose(strategy.svf.layout, z)
            answers.append(self._generate(strategy))
        return answers

    @torch.inference_mode()
    def _compose(self, layout: Layout, z: Tensor) -> None:
        for name, (u, s, vh) in self.factors.items():
            composed = u @ torch.diag_embed(s * z[layout.window(name)]) @ vh
            weight_matrix(self.dense.get_submodule(name)).copy_(composed)

    @torch.inference_mode()
    def _generate(self, strategy: FewShotStrategy) -> list[Answer]:
        ids, mask = pad(strategy.prompts, self.tokenizer.pad_token_id, left=True)
        ends, likelihoods = eos_ids_of(self.dense, self.tokenizer), _Likelihoods()
        options = GenerationConfig(
            max_new_tokens=strategy.new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        out = self.dense.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=options,
            logits_processor=LogitsProcessorList([likelihoods]),
        )
        steps = torch.stack(likelihoods.steps, dim=1)
        answers = []
        for tokens, log_p in zip(out[:, ids.shape[1] :], steps, strict=True):
            ended = torch.isin(tokens, torch.tensor(ends)).nonzero()
            length = int(ended[0]) + 1 if len(ended) else len(tokens)
            answers.append(Answer(tokens[:length].clone(), float(log_p[:length].double().mean())))
        return answers


@dataclass
class Searched:
    """A search, and every answer on its way: by candidate and problem."""

    result: FewShotResult
    answers: dict[tuple[bytes, int], Answer]


def searched(strategy: FewShotStrategy, published: Published | None) -> Searched:
    answers: dict[tuple[bytes, int], Answer] = {}

    def evaluate(candidates: Tensor) -> list[Fitness]:
        found = (
            strategy.population_answers(candidates)
            if published is None
            else published.population_answers(strategy, candidates)
        )
        for candidate, row in zip(candidates, found, strict=True):
            answers.update({(candidate.numpy().tobytes(), problem): answer for problem, answer in enumerate(row)})
        return strategy.fitness(found)

    return Searched(strategy.search(evaluate), answers)


def agree(ours: Searched, other: Searched) -> dict[str, Any]:
    """How far two searches with the same seed are apart. Those that part ways have few candidates in common."""
    common = ours.answers.keys() & other.answers.keys()
    pairs = [(ours.answers[key], other.answers[key]) for key in common]
    apart = [abs(x.log_likelihood - y.log_likelihood) for x, y in pairs if torch.equal(x.tokens, y.tokens)]
    a, b = ours.result, other.result
    return {
        "score": [a.fitness.score, b.fitness.score],
        "same_alpha": torch.equal(a.alpha, b.alpha),
        "largest_alpha_difference": float((a.alpha - b.alpha).abs().max()),
        "answers": [len(ours.answers), len(other.answers)],
        "answers_in_common": len(common),
        "same_tokens": len(apart),
        "largest_log_likelihood_difference": max(apart, default=None),
    }


def main(
    bank: Path | None = None,
    experts: int = 3,
    few_shot: int = 10,
    population: int = 32,
    generations: int = 2,
    rounds: int = 2,
    results: Path = RESULTS / "fewshot-speed.json",
) -> None:
    """Args:
    bank: Folder with the experts; default so many that are drawn around 1.
    experts: How many of these.
    few_shot: Problems.
    population: Candidates of a generation.
    generations: Of a search, unless it finds a mix that answers everything.
    rounds: Searches of each way, each round with another seed.
    results: File for the figures.
    """
    dense, tokenizer = t2.load(MODEL)
    stored = {
        OURS: t2.SVFModel(t2.load(MODEL)[0]),
        OURS_BF16: t2.SVFModel(t2.load(MODEL)[0], t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True)),
    }
    svf = stored[OURS]
    for target in stored.values():
        if bank is None:
            for seed in range(experts):
                target.add_expert(f"expert{seed}", t2.Expert.random(svf.layout, std=0.1, seed=seed))
            names = svf.bank.names
        else:
            folder = load_bank_folder(bank)
            folder.add_to(target)
            names = [domain.name for domain in folder.domains]
    cache = FactorCache()
    factors = {name: cache.load(key) for name, key in svf.weight_keys.items()}
    task = get(TASK, **TASK_OPTIONS)
    ways: dict[str, Published | None] = {
        OURS: None,
        OURS_BF16: None,
        PUBLISHED: Published(dense, factors, tokenizer, in_place=False),
        IN_PLACE: Published(dense, factors, tokenizer, in_place=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    agreement: dict[str, list[dict[str, Any]]] = {name: [] for name in ways if name != OURS}
    for turn in tqdm(range(rounds), desc="rounds"):
        found: dict[str, Searched] = {}
        order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
        for name in tqdm(order, desc="ways", leave=False):
            options = FewShotOptions(
                population=population,
                generations=generations,
                patience=generations + 1,
                elite_ratio=max(0.2, 2 / population),
                seed=turn,
            )
            problems = few_shot_problems(task, few_shot, seed=turn)
            running = stored.get(name, svf)
            strategy = FewShotStrategy(running, tokenizer, task, problems, options=options, experts=names)
            found[name] = searched(strategy, ways[name])
            seconds[name].append(found[name].result.seconds)
        for name, each in agreement.items():
            each.append(agree(found[OURS], found[name]))
    ratios = {
        ours: {name: [a / b for a, b in zip(seconds[name], seconds[ours], strict=True)] for name in ways}
        for ours in stored
    }
    figures = {
        "machine": machine(),
        "model": MODEL,
        "experts": len(names),
        "population": population,
        "problems": few_shot,
        "generations": generations,
        "seconds": seconds,
        "ratios_to": ratios,
        "agreement_with_one_batch": agreement,
    }
    write_text(results, json.dumps(figures, indent=1) + "\n")
    table = Table("way", "seconds a search", *(f"over {ours}" for ours in stored))
    for name in ways:
        over = [f"{statistics.median(ratios[ours][name]):.2f}" for ours in stored]
        table.add_row(name, f"{statistics.median(seconds[name]):.1f}", *over)
    out = Console()
    out.print(table)
    for name, each in agreement.items():
        for turn, agreed in enumerate(each):
            said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in agreed.items())
            out.print(f"{name}, round {turn}: {said}")


if __name__ == "__main__":
    tyro.cli(main)
