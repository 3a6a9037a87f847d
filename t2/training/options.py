"""The knobs of training: one dataclass, which is also the command line of `t2 train`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from t2.tasks import options_of

Method = Literal["svf", "lora", "dense-compose"]
Objective = Literal["policy-gradient", "next-token"]
Parametrisation = Literal["free", "sigmoid"]
Baseline = Literal["none", "leave-one-out", "group"]
Storage = Literal["float32", "bfloat16", "float16", "int8"]
ModelDtype = Literal["float32", "bfloat16", "float16"]
Stream = Literal["auto", "yes", "no"]
Alarm = Literal["warn", "lower", "stop"]


@dataclass(frozen=True)
class TrainOptions:
    """How one expert is trained. Options named "published" have the value of the runs of arXiv 2501.06252."""

    task: str
    """What to train on: a name that `t2.tasks.get` knows, such as reasoning-gym:chain_sum, gsm8k, or jsonl:FILE."""
    output: Path
    """Folder of the run: checkpoint, experts, metrics and curves."""
    task_options: str = "{}"
    """Options of the task, as JSON."""
    resume: bool = False
    """Continue the run in the output folder from its checkpoint."""

    method: Method = "svf"
    """What is trained: an SVF expert, PEFT's LoRA, or SVF the published way (W' is built, its full gradient kept)."""
    objective: Objective = "policy-gradient"
    """REINFORCE on the task's reward (section 3.1), or the likelihood of its solutions (the paper's ablation)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """all-linear, attention, mlp, one regular expression, or several name suffixes: of the language model alone, where
    the model reads images too."""
    dtype: Storage = "float32"
    """Storage of the factors (svf only)."""
    cold_start_steps: int = 0
    """First updates that follow the likelihood of the task's solutions, before rewards take over: reward alone cannot
    find what the model never says."""
    cold_start_learning_rate: float = 4e-3
    """Of Adam in those updates, falling to the ordinary rate along a cosine."""
    model_dtype: ModelDtype = "float32"
    """Of the model around the factors: embeddings, norms, activations, logits. An expert belongs to one."""
    stream: Stream = "auto"
    """Read target matrices one by one from the checkpoint, so that the dense model is never in memory (svf only); auto
    does so for local folders with several shards. The model is the same to the bit."""
    start: Path | None = None
    """An expert to begin with instead of the base, such as one of the next-token objective (svf and dense-compose with
    a free z). The KL stays that to the base."""
    bf16_products: bool = False
    """Let activations be rounded to bfloat16 where they meet bfloat16 factors (svf only): twice the arithmetic on
    processors that have it."""
    parametrisation: Parametrisation = "free"
    """z itself is learnt, from 1 on; or z = c sigmoid(p), with c such that sum(sigma z) = sum(sigma) (published)."""
    lora_rank: int = 16
    """Rank of the adapters (lora only)."""

    steps: int = 40
    """Updates."""
    prompts_per_step: int = 16
    """Prompts of one update, drawn in a fixed order of the seed; the published runs take 256."""
    samples_per_prompt: int = 4
    """Answers sampled to each prompt; 1 in the published runs, more give a baseline that needs no second model."""
    max_new_tokens: int | None = None
    """Longest answer drawn in training; the task's own room if none is given. Validations and tests have that room."""
    temperature: float = 1.0
    """Of the policy that answers are drawn from, and of the likelihoods and the KL penalty."""
    baseline: Baseline = "leave-one-out"
    """What is taken off a reward: nothing (published), the mean of the prompt's other answers, or of all of them."""
    normalise_rewards: bool = False
    """Divide advantages by their standard deviation over the step."""
    clip_rewards: float | None = None
    """Bound on the absolute value of an advantage; none in the published runs."""
    skip_even_prompts: bool = True
    """Leave prompts whose answers all got the same reward out of the update: they have no advantage, only the KL, and
    the update costs several times what their answers do. The KL penalty is then that of the other prompts."""
    kl_coefficient: float = 0.1
    """Weight lambda of KL(policy || base), exact over the vocabulary and added up over an answer's tokens. The paper
    sweeps 0 to 0.3."""

    learning_rate: float = 2e-3
    """Of Adam (published)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 (after a cold start)."""
    decay: bool = False
    """Lower the learning rate to 0 along a cosine over the steps (those after a cold start)."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are cut. The published 1e-3 cuts every one, so that a step of few answers, or none
    that are right, weighs as much as any other: for their 256 prompts a step, not for a dozen."""
    token_budget: int = 4096
    """Most tokens, padding included, whose activations are held at once."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    validate_every: int = 5
    """Steps between validations; the best checkpoint by their score is the result."""
    validation_size: int = 100
    """Problems of the validation split that are used."""
    test_size: int = 200
    """Problems of the test split that the base and the result answer at the end; 0 leaves that out."""
    save_every: int = 1
    """Steps between checkpoints."""

    entropy_alarm: float = 0.1
    """An alarm is raised when the entropy of a policy under rewards falls below this share of its first value."""
    kl_alarm: float = 2.0
    """An alarm is raised when the KL to the base exceeds this many nats a token, or after a cold start this many more
    than then."""
    on_alarm: Alarm = "lower"
    """What an alarm does: a line in the log, or also half the learning rate from the best checkpoint on, or an end."""

    seed: int = 0
    """Of the order of prompts and of all answers drawn."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside the folder: trackers of accelerate."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of what is not ours: attention, norms, the embedding."""

    def __post_init__(self) -> None:
        at_least_one = ("steps", "prompts_per_step", "samples_per_prompt", "token_budget", "validate_every")
        for name in (*at_least_one, "validation_size", "save_every", "lora_rank"):
            self._check(name, getattr(self, name) >= 1, "an integer >= 1")
        for name in ("warmup_steps", "cold_start_steps", "test_size", "kl_coefficient"):
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
        can_start = self.method != "lora" and self.parametrisation == "free"
        self._check("start", self.start is None or can_start, "none unless z is learnt, and free")
        options_of(self.task_options)

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """All options that shape the run, as JSON holds them: not where it is, nor whether it is resumed."""
        options = asdict(self) | {"start": None if self.start is None else str(self.start)}
        del options["output"], options["resume"]
        as_json: dict[str, Any] = json.loads(json.dumps(options))  # tuples become lists
        return as_json

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """The names of options that a saved run had otherwise; more steps are no difference.

        A run that was saved before an option was there had its default."""
        free = {"steps", "test_size", "trackers", "token_budget", "save_every", "stream"}
        saved = {"model_dtype": "float32"} | saved
        return [name for name, value in self.to_dict().items() if name not in free and value != saved.get(name)]
