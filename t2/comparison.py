"""Several experts judged on one task, as rows of the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedTokenizerBase

from t2.adaptation.base import Wrapped
from t2.adaptation.decoding import greedy
from t2.evaluation import Evaluation, encode, length_batches
from t2.model import ExpertChoice, SVFModel
from t2.tasks import Problem, Task
from t2.tasks.base import scores_of
from t2.training.rollouts import end_tokens


def evaluate_experts(
    svf: SVFModel,
    experts: Mapping[str, ExpertChoice],
    task: Task,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int | None = None,
    token_budget: int = 4096,
    announce: Callable[[int], object] = lambda done: None,
) -> dict[str, Evaluation]:
    """Every problem answered by every expert, greedily, in one batch; the scores by expert.

    Args:
        experts: what `SVFModel.route` takes for a request, by name.
        task: whose metric counts.
        problems: of one of its splits.
        new_tokens: longest answer; default the task's own.
        token_budget: most tokens of a batch, with padding, answers and the rows of all experts; one problem always
            fits.
        announce: called with the number of problems answered so far.

    Raises:
        ValueError: there are no experts.
    """
    if not experts:
        raise ValueError("experts: expected at least one, got none")
    choices, room = list(experts.values()), new_tokens or task.max_new_tokens
    prompts = [encode(problem, tokenizer) for problem in problems]
    fill = int(tokenizer.pad_token_id)
    ends = end_tokens(svf.model, tokenizer)

    def route(candidates: Sequence[int]) -> AbstractContextManager[None]:
        return svf.route([choices[candidate] for candidate in candidates])

    answers, done = [[""] * len(prompts) for _ in choices], 0
    for indices in length_batches([len(prompt) + room for prompt in prompts], token_budget // len(choices)):
        rows = [(index, candidate) for index in indices for candidate in range(len(choices))]
        found = greedy(
            Wrapped(svf),
            [prompts[index] for index, _ in rows],
            [candidate for _, candidate in rows],
            route,
            new_tokens=room,
            ends=ends,
            pad_token=fill,
            device=svf.sigma.device,
        )
        for (index, candidate), answer in zip(rows, found, strict=True):
            answers[candidate][index] = str(tokenizer.decode(answer.tokens, skip_special_tokens=True))
        done += len(indices)
        announce(done)
    return {
        name: Evaluation(tuple(scores_of(task, problems, column)), tuple(column))
        for name, column in zip(experts, answers, strict=True)
    }


def figures(found: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Accuracy, 95% interval and the score of each problem, by expert, as JSON has them."""
    return {
        name: {"accuracy": each.accuracy, "interval": each.interval, "scores": each.scores}
        for name, each in found.items()
    }
