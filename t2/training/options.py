"""Options of training: one dataclass, which is also the command line of `t2 train`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Method = Literal["svf", "lora", "dense-compose"]
Objective = Literal["policy-gradient", "next-token"]
Parametrisation = Literal["free", "sigmoid"]
Baseline = Literal["none", "leave-one-out", "group"]
Storage = Literal["float32", "bfloat16", "float16", "int8"]
ModelDtype = Literal["float32", "bfloat16", "float16"]
Stream = Literal["auto", "yes", "no"]
Alarm = Literal["warn", "lower", "stop"]
RENAMED = {"dtype": "factor_dtype", "skip_even_prompts": "skip_zero_advantage"}
"""Options of version 0.1 by their names in the files of its runs, and their names now."""
SINCE = {"model_dtype": "float32", "support": None, "support_from": "gradient", "support_examples": 96}
"""Options that files of older runs may lack, with their value in those."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of one training run. Those marked "published" have the value of the runs of arXiv 2501.06252.

    Rewards: a cold start helps where the model never gives a right completion, which reward alone cannot find. Prompts
    of zero advantage have only the KL term, and their update costs several times what their completions do; without
    them, the KL penalty is that of the other prompts. The published runs draw 256 prompts per step with one completion
    each; several completions give a baseline that needs no second model. Their max_grad_norm of 1e-3 cuts every
    gradient, so that a step with few right completions weighs as much as any other: right for 256 prompts, not for 16.

    Memory: streaming never holds the dense model, and gives the same weights bit by bit. An expert belongs to one model
    dtype. The KL is taken to the base also where training starts from an expert.

    Alarms concern a policy under rewards; after a cold start, kl_alarm counts from the KL at its end.
    """

    task: str
    """Task to train on, such as reasoning-gym:chain_sum, gsm8k or jsonl:FILE."""
    output: Path
    """Folder of the run: checkpoint, experts, metrics and curves."""
    task_options: str = "{}"
    """Options of the task, as a JSON object."""
    resume: bool = False
    """Continue the run in the output folder from its checkpoint."""

    method: Method = "svf"
    """SVF expert, LoRA adapter (PEFT), or SVF as published: W' is built and its full gradient kept."""
    objective: Objective = "policy-gradient"
    """REINFORCE on the task's reward, or next-token likelihood of its solutions (the paper's ablation)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers that get SVF: all-linear, attention, mlp, experts, one regular expression, or name suffixes."""
    factor_dtype: Storage = "float32"
    """Dtype in which the SVF factors are stored (svf only)."""
    cold_start_steps: int = 0
    """First steps, which follow the likelihood of the task's solutions before rewards take over."""
    cold_start_learning_rate: float = 4e-3
    """Adam's learning rate in the cold start; it falls to the ordinary rate along a cosine."""
    model_dtype: ModelDtype = "float32"
    """Dtype of the base model around the factors: embeddings, norms, activations and logits."""
    stream: Stream = "auto"
    """Read one matrix at a time instead of the whole model; auto does so for local folders with shards."""
    start: Path | None = None
    """Expert file to start from instead of the base (svf and dense-compose with a free z)."""
    bf16_products: bool = False
    """Round activations to bfloat16 where they meet bfloat16 factors (svf only): faster on some CPUs."""
    parametrisation: Parametrisation = "free"
    """Train z itself, or z = c sigmoid(p) with c such that sum(sigma z) = sum(sigma) (published)."""
    lora_rank: int = 16
    """Rank of the LoRA adapters (lora only)."""
    support: int | None = None
    """Components per matrix that z may change; by default all. Fewer want a higher learning rate."""
    support_from: str = "gradient"
    """Choice of the support: largest next-token gradient at z = 1 (gradient), or largest changes by the experts of a
    file or folder."""
    support_examples: int = 96
    """Training examples with solutions whose gradient chooses the support."""

    steps: int = 40
    """Number of optimiser steps."""
    prompts_per_step: int = 16
    """Prompts per step; the published runs take 256."""
    samples_per_prompt: int = 4
    """Completions sampled per prompt; the published runs take 1."""
    max_new_tokens: int | None = None
    """Maximum length of a sampled completion, in tokens; the default is the task's."""
    temperature: float = 1.0
    """Sampling temperature, which also divides the logits of the likelihoods and of the KL penalty."""
    baseline: Baseline = "leave-one-out"
    """Reward baseline: none (paper), leave-one-out (RLOO) or group mean (GRPO)."""
    normalise_rewards: bool = False
    """Divide advantages by their standard deviation over the step."""
    clip_rewards: float | None = None
    """Maximum absolute value of an advantage; by default unbounded (published)."""
    skip_zero_advantage: bool = True
    """Leave out of the update the prompts whose completions all have the same reward."""
    kl_coefficient: float = 0.1
    """Weight of the KL penalty to the base, summed over a completion's tokens; the paper tries 0 to 0.3."""

    learning_rate: float = 2e-3
    """Adam's learning rate (published)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 (after a cold start)."""
    decay: bool = False
    """Lower the learning rate to 0 along a cosine over the steps (those after a cold start)."""
    max_grad_norm: float = 1.0
    """Maximum norm of a gradient, to which longer ones are cut; 1e-3 in the published runs."""
    token_budget: int = 4096
    """Maximum tokens, padding included, whose activations are held at once."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    shard: bool = False
    """Divide the factors over the processes of torchrun or accelerate launch (svf only); else each has all."""

    validate_every: int = 5
    """Steps between validations; the best checkpoint by validation score is the result."""
    validation_size: int = 100
    """Number of validation examples."""
    test_size: int = 200
    """Number of test examples for the base and the result at the end; 0 skips the test."""
    save_every: int = 1
    """Steps between checkpoints."""
    patience: int = 0
    """End after this many validations in a row without a better one (those after a cold start), or at 100%; 0 never
    does."""

    entropy_alarm: float = 0.1
    """Raise an alarm when the policy's entropy falls below this share of its first value."""
    kl_alarm: float = 2.0
    """Raise an alarm when the KL to the base exceeds this value, in nats per token."""
    on_alarm: Alarm = "lower"
    """Action on an alarm: warn in the log, lower (return to the best checkpoint, halve the rate), or stop."""

    seed: int = 0
    """Seed for prompt order and sampling."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Experiment trackers of accelerate that get the metrics; a JSONL file is always written."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of layers without SVF: attention, norms and embeddings."""

    def __post_init__(self) -> None:
        at_least_one = ("steps", "prompts_per_step", "samples_per_prompt", "token_budget", "validate_every")
        for name in (*at_least_one, "validation_size", "save_every", "lora_rank"):
            self._check(name, getattr(self, name) >= 1, "an integer >= 1")
        for name in ("warmup_steps", "cold_start_steps", "test_size", "patience", "kl_coefficient"):
            self._check(name, getattr(self, name) >= 0, "a number >= 0")
        for name in ("temperature", "learning_rate", "cold_start_learning_rate", "max_grad_norm"):
            self._check(name, getattr(self, name) > 0, "a number > 0")
        self._check("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "an integer >= 1")
        self._check("clip_rewards", self.clip_rewards is None or self.clip_rewards > 0, "a number > 0")
        self._check(
            "samples_per_prompt",
            self.samples_per_prompt > 1 or self.baseline != "leave-one-out" or self.objective == "next-token",
            "at least 2 for the leave-one-out baseline",
        )
        self._check("cold_start_steps", self.cold_start_steps <= self.steps, f"at most the {self.steps} steps in all")
        self._check("stream", self.stream != "yes" or self.method == "svf", "auto or no unless the method is svf")
        whole = self.method == "svf" and self.support is None
        self._check("shard", not self.shard or whole, "no unless the method is svf, without a support")
        can_start = self.method != "lora" and self.parametrisation == "free"
        self._check("start", self.start is None or can_start, "none unless z itself is trained")
        self._check("support", self.support is None or can_start, "none unless z itself is trained")
        self._check("support", self.support is None or self.support >= 1, "an integer >= 1")
        self._check("support_examples", self.support_examples >= 1, "an integer >= 1")
        from t2.tasks import options_of

        options_of(self.task_options)

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The options that shape the run, as JSON holds them: without its folder and whether it is resumed."""
        options = asdict(self) | {"start": None if self.start is None else str(self.start)}
        del options["output"], options["resume"]
        as_json: dict[str, Any] = json.loads(json.dumps(options))  # tuples become lists
        return as_json

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Names of the options that differ from those of a saved run; more steps are no difference.

        An option that the saved run does not have yet counts with its default.
        """
        free = {"steps", "patience", "test_size", "trackers", "token_budget", "save_every", "stream", "shard"}
        saved = SINCE | {RENAMED.get(name, name): value for name, value in saved.items()}
        return [name for name, value in self.to_dict().items() if name not in free and value != saved.get(name)]
