"""Several experts judged on one task, as rows of the same batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from t2.evaluation import Evaluation, batches, encode
from t2.model import ExpertChoice, SVFModel
from t2.tasks import Problem, Task
from t2.training.rollouts import end_tokens, pad


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
    options = GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=end_tokens(svf.model, tokenizer),
        pad_token_id=fill,
    )
    answers, done = [[""] * len(prompts) for _ in choices], 0
    for indices in batches([len(prompt) for prompt in prompts], room, token_budget // len(choices)):
        rows = [prompts[index] for index in indices for _ in choices]
        ids, mask = (tensor.to(svf.sigma.device) for tensor in pad(rows, fill, left=True))
        out = svf.generate(
            input_ids=ids, attention_mask=mask, experts=choices * len(indices), generation_config=options
        )
        texts = iter(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
        for index in indices:
            for column in answers:
                column[index] = next(texts)
        done += len(indices)
        announce(done)
    return {
        name: Evaluation(tuple(task.scores(problems, column)), tuple(column))
        for name, column in zip(experts, answers, strict=True)
    }


def figures(found: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Accuracy, 95% interval and the score of each problem, by expert, as JSON has them."""
    return {
        name: {"accuracy": each.accuracy, "interval": each.interval, "scores": each.scores}
        for name, each in found.items()
    }
