"""Strategies that ask a model for a prompt's domain: the base (paper: a) or a classification expert (paper: b)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from t2.adaptation.base import Adaptation, Strategy
from t2.adaptation.labels import label_scores, label_tokens
from t2.adaptation.options import Calibration
from t2.generation.prompts import encode
from t2.model.svf_model import ExpertChoice, SVFModel
from t2.tasks.classify import BASE, OTHERS, Domains, Prompt, adaptation_problem, as_domains, labels_of

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Content-free inputs for calibration (Zhao et al. 2021)."""


class PromptStrategy(Strategy):
    """Classifies each prompt by the likeliest label after the adaptation prompt.

    Calibration corrects for labels that are likelier than others on any input:

        p(label | prompt) ~ p_model(label | prompt) / prior(label)

    Args:
        svf, tokenizer: as in `Strategy`.
        domains: what the experts are for; each has one of its name in the bank. "others" is the base.
        calibration: "contextual" takes as prior the mean probabilities on inputs without content (Zhao et al. 2021,
            arXiv 2102.09690), "batch" those of the prompts of the call themselves (Zhou et al. 2023, arXiv 2309.17249),
            which expects them to be of all domains alike; "none" a flat one.
        mixed: run each request with all experts, weighted by their probabilities, instead of the likeliest alone.
        token_budget: maximum tokens of a batch of pass one.
    """

    name = "prompt"

    def __init__(
        self,
        svf: SVFModel,
        tokenizer: PreTrainedTokenizerBase,
        domains: Domains,
        *,
        calibration: Calibration = "contextual",
        mixed: bool = False,
        token_budget: int = 8192,
    ) -> None:
        super().__init__(svf, tokenizer)
        if calibration not in ("none", "contextual", "batch"):
            raise ValueError(f"calibration: expected 'none', 'contextual' or 'batch', got {calibration!r}")
        if not isinstance(token_budget, int) or token_budget < 1:
            raise ValueError(f"token_budget: expected an integer >= 1, got {token_budget!r}")
        self.domains = as_domains(domains)
        for domain in self.domains:
            if domain.name not in svf.bank:
                raise ValueError(f"domains: expected names of experts ({', '.join(svf.bank)}), got {domain.name!r}")
        self.labels = labels_of(self.domains)
        self.calibration: Calibration = calibration
        self.mixed = mixed
        self.token_budget = token_budget
        self.prior: Tensor | None = None
        """log prior(label) [labels]; `calibrate` sets it."""
        self.label_tokens = label_tokens(self.labels, tokenizer)

    @property
    def expert(self) -> ExpertChoice:
        """Expert that pass one runs with; None for the base."""
        return None

    def label_scores(self, prompts: Sequence[Prompt]) -> Tensor:
        """log p_model(label | prompt) [B, labels] float32, without a prior; labels as in `labels`, "others" first."""
        encoded = [encode(adaptation_problem(prompt, self.domains), self.tokenizer) for prompt in prompts]
        return label_scores(
            self.svf,
            encoded,
            self.label_tokens,
            pad_token=int(self.tokenizer.pad_token_id),
            expert=self.expert,
            token_budget=self.token_budget,
        )

    def calibrate(self, prompts: Sequence[Prompt] = CONTENT_FREE) -> None:
        """Set the prior to the labels' mean probabilities on these prompts."""
        if not len(prompts):
            raise ValueError("prompts: expected at least one to calibrate with, got none")
        self.prior = _log_mean(self.label_scores(prompts))

    def adapt(self, prompts: Sequence[Prompt]) -> Adaptation:
        """Pass one over a batch; `reasons` are the labels' probabilities.

        Raises:
            ValueError: calibration "batch" has fewer than two prompts for a prior, and `calibrate` gave none.
        """
        start = time.perf_counter()
        return self.adaptation(self.label_scores(prompts), start)

    def adaptation(self, scores: Tensor, start: float) -> Adaptation:
        """The choice by the scores that `label_scores` gives; `start`: when pass one began."""
        probabilities = self.probabilities(scores)
        if self.mixed:
            alpha = probabilities
        else:
            alpha = torch.nn.functional.one_hot(probabilities.argmax(-1), len(self.labels)).float()
        names = tuple(BASE if label == OTHERS else label for label in self.labels)
        reasons = tuple(self._reason(row) for row in probabilities.tolist())
        return Adaptation(names, alpha, time.perf_counter() - start, reasons)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Calibrated p(label | prompt) [B, labels] from the scores that `label_scores` gives."""
        return torch.softmax(scores - self._prior(scores), dim=-1)

    def _prior(self, scores: Tensor) -> Tensor:
        if self.prior is None and self.calibration == "contextual":
            self.calibrate()
        if self.prior is not None:
            return self.prior
        if self.calibration == "none" or not len(scores):
            return torch.zeros(len(self.labels))
        if len(scores) < 2:
            raise ValueError("prompts: expected at least two for calibration 'batch', got one; calibrate() with some")
        return _log_mean(scores)

    def _reason(self, probabilities: list[float]) -> str:
        ranked = sorted(zip(probabilities, self.labels, strict=True), reverse=True)
        return ", ".join(f"{label} {probability:.0%}" for probability, label in ranked)


class ClassifierStrategy(PromptStrategy):
    """`PromptStrategy` whose pass one runs with an expert trained on the adaptation prompt (`classification_task`).

    Its training has every label equally often, so the default is no calibration.

    Args:
        expert: its name in the bank.
    """

    name = "classifier"

    def __init__(
        self,
        svf: SVFModel,
        tokenizer: PreTrainedTokenizerBase,
        domains: Domains,
        expert: str = "classifier",
        *,
        calibration: Calibration = "none",
        mixed: bool = False,
        token_budget: int = 8192,
    ) -> None:
        super().__init__(svf, tokenizer, domains, calibration=calibration, mixed=mixed, token_budget=token_budget)
        if expert not in svf.bank:
            raise ValueError(f"expert: expected one of the bank ({', '.join(svf.bank)}), got {expert!r}")
        self._expert = expert

    @property
    def expert(self) -> ExpertChoice:
        return self._expert


def _log_mean(scores: Tensor) -> Tensor:
    """Logarithm of the mean probabilities [labels]."""
    return scores.logsumexp(0) - torch.tensor(float(len(scores))).log()
