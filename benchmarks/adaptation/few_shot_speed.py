"""Few-shot search for a mix of experts: the population in one batch against the published way.

    python -m benchmarks.adaptation.few_shot_speed --bank t2/banks/smollm2-135m-instruct    # ten minutes on two cores
    python -m benchmarks.adaptation.few_shot_speed --rounds 1 --generations 1 --population 6 --few-shot 2    # a look

The published code (arXiv 2501.06252) composes U @ diag(sigma z) @ V^T, with a product by a diagonal matrix, copies it
into the model, runs all problems in one batch, and goes to the next candidate. A second row does the least that this
takes: W' written in place with one product a matrix. Both get their likelihoods from the pass that generates, and no
candidate is tried twice. Ours also runs with factors and products of bfloat16. All ways get the same candidates for the
same seed and are timed end to end, in turns; agreement is checked completion by completion, since a search in which
nothing is right ends at the base whatever it computes. Writes benchmarks/results/fewshot-speed.json.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from t2.adaptation import FewShotOptions, FewShotResult, FewShotStrategy, few_shot_problems, load_bank_folder
from t2.adaptation.search import Fitness
from t2.demo import baselines
from t2.experts.layout import Layout
from t2.generation.batching import pad
from t2.generation.decode import Completion
from t2.generation.prompts import eos_ids_of
from t2.tasks import get
from t2.weights.factor_cache import FactorCache
from t2.weights.machine import machine
from t2.weights.targets import weight_matrix

MODEL = "smollm2-135m-instruct"
TASK = "reasoning-gym:chain_sum"
TASK_OPTIONS = {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
OURS, OURS_BF16 = "one batch", "one batch, bf16 products"
PUBLISHED, IN_PLACE = "W' as published, one by one", "W' in place, one by one"


class _Likelihoods(LogitsProcessor):
    """Log p of the likeliest token of each row, [rows] a step."""

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

    def population_answers(self, strategy: FewShotStrategy, candidates: Tensor) -> list[list[Completion]]:
        answers = []
        for z in strategy.vectors(candidates):
            if self.in_place:
                baselines.rebuild(self.dense, self.factors, strategy.svf.layout, z)
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
    def _generate(self, strategy: FewShotStrategy) -> list[Completion]:
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
            answers.append(Completion(tokens[:length].clone(), float(log_p[:length].double().mean())))
        return answers


@dataclass
class SearchTrace:
    """Result of a search, and its completions by candidate and problem."""

    result: FewShotResult
    answers: dict[tuple[bytes, int], Completion]


def run_search(strategy: FewShotStrategy, published: Published | None) -> SearchTrace:
    answers: dict[tuple[bytes, int], Completion] = {}

    def evaluate(candidates: Tensor) -> list[Fitness]:
        found = (
            strategy.population_answers(candidates)
            if published is None
            else published.population_answers(strategy, candidates)
        )
        for candidate, row in zip(candidates, found, strict=True):
            answers.update({(candidate.numpy().tobytes(), problem): answer for problem, answer in enumerate(row)})
        return strategy.fitness(found)

    return SearchTrace(strategy.search(evaluate), answers)


def agree(ours: SearchTrace, other: SearchTrace) -> dict[str, Any]:
    """Agreement of two searches with the same seed. Those that part ways have few candidates in common."""
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


def speed_table(results: Any) -> Table:
    """Seconds of every way, and its agreement with the search in one batch."""
    machine, rows = results["machine"], []
    for way, times in results["seconds"].items():
        over = [ratios[way] for ratios in results["ratios_to"].values()]
        agreed = results["agreement_with_one_batch"].get(way)
        same = ""
        if agreed is not None:
            tokens, common = (sum(each[key] for each in agreed) for key in ("same_tokens", "answers_in_common"))
            same = f"{tokens:,} of {common:,}; {sum(each['same_alpha'] for each in agreed)} of {len(agreed)}"
        rows.append([way, f"{statistics.median(times):.1f}", *(f"{statistics.median(o):.1f}" for o in over), same])
    return Table(
        f"{results['population']} candidates of {results['experts']} experts a generation, {results['generations']} "
        f"generations, {results['problems']} problems of chain_sum; medians of {len(times)} searches, each with its "
        f"own seed, ways taking turns, {machine['threads']} cores of {machine['processor']} "
        "(`python -m benchmarks.adaptation.few_shot_speed --bank t2/banks/smollm2-135m-instruct`):",
        ["way", "s a search", *(f"over {ours}" for ours in results["ratios_to"]), "same answers; same mix"],
        rows,
    )


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
    bank: Folder with the experts; default random experts around 1.
    experts: Number of random experts.
    few_shot: Number of problems.
    population: Candidates in a generation.
    generations: Generations of a search, unless a mix solves everything earlier.
    rounds: Searches of each way, each round with another seed.
    results: File for the results as JSON.
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
        traces: dict[str, SearchTrace] = {}
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
            traces[name] = run_search(strategy, ways[name])
            seconds[name].append(traces[name].result.seconds)
        for name, each in agreement.items():
            each.append(agree(traces[OURS], traces[name]))
    ratios = {
        ours: {name: [a / b for a, b in zip(seconds[name], seconds[ours], strict=True)] for name in ways}
        for ours in stored
    }
    found = {
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
    write_results(results, found)
    speed_table(found).show()
    for name, each in agreement.items():
        for turn, agreed in enumerate(each):
            said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in agreed.items())
            print(f"{name}, round {turn}: {said}")


if __name__ == "__main__":
    tyro.cli(main)
