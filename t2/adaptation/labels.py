"""Scores of candidate labels as a model's next words, without generating and parsing text.

    log p(label | prompt) = sum_t log softmax(logits_t over the tokens that go on to a label)[label_t]

This is decoding constrained to the valid labels, with every branch followed. A token that only one label continues with
costs nothing, so long labels are at no disadvantage. If all labels begin with different tokens, one forward pass over
the prompt is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.generation.batching import length_batches, shared_prefix
from t2.generation.cached_batch import SVFRunner
from t2.generation.scoring import MicroBatch, PromptGroup, completion_logits, completion_tokens
from t2.model.kv_cache import new_cache
from t2.model.svf_model import ExpertChoice, SVFModel


@dataclass(frozen=True)
class LabelTokens:
    """Tokens of the labels, cut where they become unique.

    tokens: per label, up to the first token that no other label shares.
    permitted: per token, all tokens that lead to some label at that position.
    """

    tokens: tuple[tuple[int, ...], ...]
    permitted: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def first(self) -> tuple[int, ...] | None:
        """The first token of each label, if these are all different: what a prompt's last logits decide."""
        return tuple(ids[0] for ids in self.tokens) if all(len(ids) == 1 for ids in self.tokens) else None


def label_tokens(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> LabelTokens:
    """The labels' tokens, each ended by the EOS id, so that none is a prefix of another.

    Raises:
        ValueError: two labels have the same tokens.
    """
    end = int(tokenizer.eos_token_id)
    whole = [(*tokenizer(label, add_special_tokens=False)["input_ids"], end) for label in labels]
    if len(set(whole)) != len(whole):
        raise ValueError(f"labels: expected labels that the tokenizer tells apart, got {list(labels)}")

    def permitted(prefix: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({ids[len(prefix)] for ids in whole if ids[: len(prefix)] == prefix}))

    def alone(ids: tuple[int, ...]) -> tuple[int, ...]:
        return next(ids[:t] for t in range(1, len(ids) + 1) if sum(other[:t] == ids[:t] for other in whole) == 1)

    kept = [alone(ids) for ids in whole]
    return LabelTokens(tuple(kept), tuple(tuple(permitted(ids[:t]) for t in range(len(ids))) for ids in kept))


def label_scores(
    svf: SVFModel,
    prompts: Sequence[Tensor],
    labels: LabelTokens,
    *,
    pad_token: int,
    expert: ExpertChoice = None,
    token_budget: int = 8192,
) -> Tensor:
    """log p(label | prompt) [len(prompts), labels] float32 on the CPU; the probabilities of a row sum to 1.

    The shared prefix of a batch is computed once, and each prompt once for all labels.

    Args:
        prompts: token ids [length] each.
        pad_token: padding id.
        expert: expert that the model runs with.
        token_budget: maximum tokens of a batch, padding included; one prompt always fits.
    """
    runner, device = SVFRunner(svf), svf.sigma.device
    answers = tuple(torch.tensor(ids) for ids in labels.tokens)
    scores = torch.empty(len(prompts), len(answers))
    lengths = [len(prompt) + sum(map(len, answers)) for prompt in prompts]
    for indices in length_batches(lengths, token_budget):
        shared = shared_prefix([prompts[index] for index in indices], new_cache(runner.transformer))
        batch = MicroBatch(tuple(PromptGroup(prompts[index], answers) for index in indices), shared)
        tokens = completion_tokens(batch, pad_token, device)
        with torch.inference_mode(), svf.route(expert):
            logits = completion_logits(runner, tokens)
            scores[indices] = _followed(logits.view(len(indices), -1, logits.shape[-1]), labels).cpu()
    return scores


def _followed(logits: Tensor, labels: LabelTokens) -> Tensor:
    """The labels' log-probabilities [prompts, labels], from the logits [prompts, all labels' tokens, vocabulary]."""
    scores = logits.new_zeros(logits.shape[0], len(labels.tokens), dtype=torch.float32)
    place = 0
    for label, (tokens, permitted) in enumerate(zip(labels.tokens, labels.permitted, strict=True)):
        for token, options in zip(tokens, permitted, strict=True):
            if len(options) > 1:
                row = logits[:, place].float()
                scores[:, label] += row[:, token] - row[:, list(options)].logsumexp(-1)
            place += 1
    return scores
