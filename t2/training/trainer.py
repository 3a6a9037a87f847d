"""The training loop: answers, rewards, one update, and now and then a validation; interruptible at every step."""

from __future__ import annotations

import json
import math
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from t2.experts.support import top_components
from t2.generation.batching import shared_prefix
from t2.generation.evaluate import Evaluation, evaluate
from t2.generation.head import OutputHead
from t2.generation.images import ImageInputs
from t2.generation.prompts import encode_prompt, eos_ids_of
from t2.generation.sampling import uniforms
from t2.generation.scoring import (
    CompletionTokens,
    MicroBatch,
    PromptGroup,
    completion_logits,
    completion_tokens,
    micro_batches,
)
from t2.model.kv_cache import new_cache
from t2.model.sharding import in_step
from t2.model.svf_model import SVFModel
from t2.tasks import Problem, Task
from t2.tasks.base import rewards_of
from t2.training.alarms import AlarmMonitor
from t2.training.checkpoint import Checkpoint, State, load_optimizer, optimizer_tensors
from t2.training.loss import TokenStatistics, advantages, policy_loss
from t2.training.metrics import Metrics, Row, plot
from t2.training.options import TrainOptions
from t2.training.policies import ExpertPolicy, make_policy, svf_config
from t2.training.rollouts import RolloutGenerator
from t2.training.support import gradient_scores, support_like
from t2.weights.files import FileFormatError, file_errors
from t2.weights.loading import Tokenizer, tokenizer_of
from t2kernels.files import write_text

CHECKPOINT = "checkpoint.safetensors"
SCORED_TOKENS = 1024
"""Tokens of a batch whose gradient chooses a support: all components are free then, and no step needs as much."""


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run. `expert` is the best checkpoint by validation score: a file, or a folder for LoRA."""

    finished: bool
    expert: Path
    state: State
    base: Evaluation | None = None
    best: Evaluation | None = None


class Trainer:
    """Trains one expert for `options.task`.

    Several processes (`torchrun`, `accelerate launch`) share the prompts of a step; the result is that of one process,
    up to the order in which gradients are added.

    Args:
        model: from `t2.load`, changed in place; for the svf method also from `t2.load_factored`.
        tokenizer: its tokenizer, or its processor.
        task: problems and rewards.
        options: all knobs; `options.task` only names the task.
        accelerator: default one of its own.
        console: for progress.

    Raises:
        ValueError: an option does not fit the task or the checkpoint; the output folder holds a run and `resume` is
            not given.
        FileNotFoundError: there is no checkpoint to resume from.
    """

    def __init__(
        self,
        model: PreTrainedModel | SVFModel,
        tokenizer: Tokenizer,
        task: Task,
        options: TrainOptions,
        *,
        accelerator: Accelerator | None = None,
        console: Console | None = None,
    ) -> None:
        self.options, self.task, self.processor = options, task, tokenizer
        self.tokenizer = tokenizer = tokenizer_of(tokenizer)
        self.accelerator = accelerator or make_accelerator(options)
        self.console = console or Console(quiet=not self.accelerator.is_main_process)
        self.problems, self.validation = check_problems(task, options)
        check_folder(options)
        self.new_tokens = options.max_new_tokens or task.max_new_tokens
        eos_ids = eos_ids_of(model, tokenizer)
        if not eos_ids or tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with an end token and a padding token, as `t2.load` gives it")
        checkpoint = self._saved()
        self.mesh = sharding_mesh(self.accelerator) if options.shard else None
        self.policy = make_policy(model, options, self.mesh)
        if options.gradient_checkpointing:
            self.policy.enable_checkpointing()
        with self.policy.base():
            head = OutputHead.of(self.policy)
        self.head = None if head is None or head.is_trained else head
        device = self.policy.parameters[0].device
        self.generator = RolloutGenerator(self.policy, device, int(tokenizer.pad_token_id), tuple(eos_ids))
        if options.support is not None:
            self._restrict(options.support, checkpoint)
        self.optimizer = torch.optim.Adam(self.policy.parameters, lr=options.learning_rate)
        self.alarms = AlarmMonitor(options.entropy_alarm, options.kl_alarm)
        self.state = State()
        self.best = [parameter.detach().clone() for parameter in self.policy.parameters]
        self.metrics = self._start(checkpoint)
        self._stopping = False

    # The folder

    @property
    def _checkpoint(self) -> Path:
        return self.options.output / CHECKPOINT

    def _saved(self) -> Checkpoint | None:
        """The checkpoint to resume from, of a run with the same options."""
        if not self.options.resume:
            return None
        checkpoint = Checkpoint.load(self._checkpoint)
        if other := self.options.differences(checkpoint.options):
            said = ", ".join(f"{name} {checkpoint.options.get(name)!r:.200}" for name in other)
            raise ValueError(
                f"resume: expected the options that the run was started with ({said}), got others than those of "
                f"{self._checkpoint}"
            )
        return checkpoint

    def _restrict(self, count: int, checkpoint: Checkpoint | None) -> None:
        """Gives the policy its support: the checkpoint's, or one that is chosen now."""
        policy = self.policy
        assert isinstance(policy, ExpertPolicy)
        if checkpoint is not None:
            if checkpoint.support is None:
                raise FileFormatError(f"{self._checkpoint}: support: expected the positions of a support, got none")
            with file_errors(self._checkpoint):
                policy.restrict(checkpoint.support)
        elif self.options.support_from != "gradient":
            policy.restrict(support_like(policy, Path(self.options.support_from), count))
        else:
            groups = self._solutions(range(min(self.options.support_examples, len(self.problems))))
            if not groups:
                raise ValueError(
                    f"support_from: expected training examples with solutions for a gradient, got none of "
                    f"{self.task.name}; an expert file can choose the support"
                )
            budget = min(self.options.token_budget, SCORED_TOKENS)
            scores = gradient_scores(policy, groups, pad_token=self.generator.pad_token, token_budget=budget)
            policy.restrict(top_components(scores, policy.layout, count))

    def _start(self, checkpoint: Checkpoint | None) -> Metrics:
        main = self.accelerator.is_main_process
        path = self.options.output / "metrics.jsonl" if main else None
        if checkpoint is not None:
            checkpoint.check(self._checkpoint, self.policy.identity, self.policy.parameters)
        if main:
            write_text(self.options.output / "options.json", json.dumps(self.options.to_dict(), indent=1) + "\n")
        if checkpoint is None:
            return Metrics(path)
        self.policy.load_parameters(checkpoint.parameters)
        load_optimizer(self.optimizer, checkpoint.optimizer)
        self.state = checkpoint.state
        self.best = [value.to(old) for value, old in zip(checkpoint.best, self.best, strict=True)]
        return Metrics(path, self.state.step)

    def _metadata(self, step: int) -> dict[str, str]:
        return {
            "task": self.task.name,
            "step": str(step),
            "validation": str(self.state.best_score if step == self.state.best_step else ""),
            "options": json.dumps(self.options.to_dict()),
            **self.task.expert_metadata(),
        }

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        parameters = [parameter.detach() for parameter in self.policy.parameters]
        moments, options = optimizer_tensors(self.optimizer), self.options.to_dict()
        options["steps"] = max(self.options.steps, self.state.step)  # no step is beyond it, which a checkpoint's is not
        support = self.policy.support if isinstance(self.policy, ExpertPolicy) else None
        Checkpoint(self.state, parameters, self.best, self.policy.identity, moments, options, support).save(
            self._checkpoint
        )

    def _save_experts(self) -> None:
        """The last parameters and the best ones, as files of their own."""
        if not self.accelerator.is_main_process:
            return
        last = [parameter.detach().clone() for parameter in self.policy.parameters]
        self.policy.save(self.options.output / "last", self._metadata(self.state.step))
        self.policy.load_parameters(self.best)
        self.policy.save(self._expert, self._metadata(self.state.best_step))
        self.policy.load_parameters(last)

    @property
    def _expert(self) -> Path:
        return self.options.output / "best"

    # The loop

    def run(self) -> TrainResult:
        """Trains to the last step, or until SIGINT, after which the checkpoint holds everything."""
        with self._interruptible(), self._progress() as announce:
            if self.state.base_score is None:
                self.state.base_score = self._score(self.validation, base=True).accuracy
                announce(f"base: validation {self.state.base_score:.1%}")
                self._validate({"step": 0, "base": self.state.base_score})
                self._save()
            while self.state.step < self.options.steps and not self._stopping and not self._out_of_patience():
                row = self.step()
                ended = self._alarmed(row)
                self._stopping = self._agreed(self._stopping)
                if self.state.step % self.options.save_every == 0:
                    self._save()
                announce(_summary(row, self.state, self.options.steps))
                if ended:
                    break
        self._save()
        self._save_experts()
        self._plot()
        finished = not (self._stopping and self.state.step < self.options.steps)
        base, best = self._test() if finished else (None, None)
        self.accelerator.end_training()
        expert = self._expert if self.options.method == "lora" else self._expert.with_suffix(".safetensors")
        return TrainResult(finished, expert, self.state, base, best)

    def step(self) -> Row:
        """One update: answers, rewards, gradient; a validation where one is due. Returns the step's metrics."""
        start = time.perf_counter()
        if self._rewarded and self.state.step == self.options.cold_start_steps:
            self.optimizer.state.clear()  # moments of another objective
        groups, row = self._drawn() if self._rewarded else self._solved()
        answered = time.perf_counter()
        row |= self._update(groups)
        self.state.step += 1
        seconds = {"seconds": time.perf_counter() - start, "rollout_seconds": answered - start}
        row = {"step": self.state.step} | row | seconds
        if self.state.step % self.options.validate_every == 0 or self.state.step == self.options.steps:
            self._validate(row)
        else:
            self._record(row)
        return row

    @property
    def _rewarded(self) -> bool:
        """Whether the next step follows rewards, not solutions."""
        options = self.options
        return options.objective == "policy-gradient" and self.state.step >= options.cold_start_steps

    def _out_of_patience(self) -> bool:
        """Whether as many validations as `patience` have passed since the best, or none can be better."""
        options = self.options
        if options.patience and self.state.best_step and (self.state.best_score or 0) >= 1:
            self.console.print(f"step {self.state.step}: no validation can be better than 100%; stopping")
            return True
        waited = self.state.step - max(self.state.best_step, options.cold_start_steps)
        if not options.patience or waited < options.patience * options.validate_every:
            return False
        self.console.print(f"step {self.state.step}: no better validation since step {self.state.best_step}; stopping")
        return True

    def _mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process' share."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def _indices(self) -> list[int]:
        """Indices of the next step's examples: every one once before any comes again, in an order of the seed."""
        count, size = len(self.problems), self.options.prompts_per_step
        epoch, place = divmod(self.state.step * size, count)
        indices: list[int] = []
        while len(indices) < size:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator)
            indices += order[place : place + size - len(indices)].tolist()
            epoch, place = epoch + 1, 0
        return indices

    def _drawn(self) -> tuple[list[PromptGroup], Row]:
        """Answers drawn from the policy, weighted by their advantages; this process' share of them."""
        options, samples = self.options, self.options.samples_per_prompt
        places = self._mine(range(options.prompts_per_step))
        indices = self._indices()
        mine: list[Problem] = [self.problems[indices[place]] for place in places]
        encoded = [encode_prompt(problem, self.processor) for problem in mine]
        drawn: list[tuple[Tensor, ...]] = []
        with self._in_step():
            if mine:
                numbers = uniforms(options.seed, self.state.step, places, samples, self.new_tokens)
                drawn = self.generator.completions(
                    [prompt for prompt, _ in encoded],
                    self.new_tokens,
                    images=[images for _, images in encoded],
                    samples=samples,
                    uniforms=numbers,
                    temperature=options.temperature,
                )
        texts = [str(self.tokenizer.decode(a, skip_special_tokens=True)) for answers in drawn for a in answers]
        judged = rewards_of(self.task, [problem for problem in mine for _ in range(samples)], texts)
        rewards = [judged[i : i + samples] for i in range(0, len(judged), samples)]
        table = dict(self._gathered(list(zip(places, rewards, strict=True))))
        all_rewards = torch.tensor([table[place] for place in range(options.prompts_per_step)])
        values = advantages(
            all_rewards, options.baseline, normalise=options.normalise_rewards, clip=options.clip_rewards
        )
        weights = (values / values.numel()).tolist()
        groups = [
            PromptGroup.from_samples(prompt, answers, weights[place], images)
            for place, (prompt, images), answers in zip(places, encoded, drawn, strict=True)
        ]
        lengths = self._gathered([(len(a), int(a[-1]) in self.generator.eos_ids) for answers in drawn for a in answers])
        return groups, {
            "reward": float(all_rewards.mean()),
            "mixed": float((all_rewards.amax(1) != all_rewards.amin(1)).float().mean()),
            "length": statistics.fmean(length for length, _ in lengths),
            "truncated": statistics.fmean(not ended for _, ended in lengths),
        }

    def _solved(self) -> tuple[list[PromptGroup], Row]:
        """The task's solutions, each token with the same weight; this process' share of them."""
        groups = self._solutions(self._indices())
        tokens = sum(len(completion) for group in groups for completion in group.completions)
        return list(self._mine(groups)), {"length": tokens / max(len(groups), 1)}

    def _solutions(self, indices: Sequence[int]) -> list[PromptGroup]:
        """The solutions of these training examples, each token with the same weight; those without one are left out."""
        encoded: list[tuple[Tensor, ImageInputs, Tensor]] = []
        for index in indices:
            problem = self.problems[index]
            if problem.solution is not None:
                ids = self.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
                answer = torch.tensor([*ids, self.tokenizer.eos_token_id])
                encoded.append((*encode_prompt(problem, self.processor), answer))
        tokens = sum(len(answer) for _, _, answer in encoded)
        return [PromptGroup(prompt, (answer,), (1.0 / tokens,), (1,), images) for prompt, images, answer in encoded]

    def _update(self, groups: Sequence[PromptGroup]) -> Row:
        """One step of Adam along the gradient of `policy_loss` over all groups of all processes."""
        options = self.options
        answers = options.prompts_per_step * options.samples_per_prompt
        kl_weight = options.kl_coefficient / answers if self._rewarded else 0.0
        with_base = kl_weight > 0 or (self.state.step + 1) % options.validate_every == 0
        if options.skip_zero_advantage or not with_base:
            groups = [group for group in groups if any(group.weights)]
        total, loss_sum = TokenStatistics(), 0.0
        self.optimizer.zero_grad()
        self.policy.transformer.train(options.gradient_checkpointing)
        device = self.generator.device
        cache = new_cache(self.policy.transformer) if self._shares_prefix else None
        with_images = any(group.images for group in groups)
        shared = 0 if with_images else shared_prefix([group.prompt for group in groups], cache)
        batches = list(micro_batches(groups, options.token_budget, shared, repeated=cache is None))
        for batch in self._filled(batches):
            tokens = completion_tokens(batch, self.generator.pad_token, device)
            weights, counts = (
                tokens.per_token(torch.tensor(values, device=device))
                for values in (
                    [weight for group in batch.groups for weight in group.weights],
                    [count for group in batch.groups for count in group.counts],
                )
            )
            base = None
            if with_base:
                with torch.no_grad(), self.policy.base(), self.accelerator.autocast():
                    base = self._states(tokens)
            with self.policy.learning():
                with self.accelerator.autocast():
                    states = self._states(tokens)
                head = None if self.head is None else self._logits
                loss, seen = policy_loss(states, tokens.targets, weights, base, kl_weight, counts=counts, head=head)
                del states, base
                loss.backward()
            total += seen
            loss_sum += float(loss.detach())
        self.policy.transformer.eval()
        self.policy.finish_gradients()
        gradients = [
            parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            for parameter in self.policy.parameters
        ]
        if self.accelerator.num_processes > 1:
            gradients = [self.accelerator.reduce(gradient, "sum") for gradient in gradients]
            parts = self._gathered([(total, loss_sum)])
            total = sum((part for part, _ in parts), TokenStatistics())
            loss_sum = sum(part for _, part in parts)
        for parameter, gradient in zip(self.policy.parameters, gradients, strict=True):
            parameter.grad = gradient
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, options.max_grad_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient of step {self.state.step + 1} is not finite; nothing was changed")
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {
            "loss": loss_sum,
            "kl": total.kl / total.tokens if with_base and total.tokens else None,
            "entropy": total.entropy / total.tokens if total.tokens else None,
            "gradient_norm": norm,
            "learning_rate": rate,
        }

    @property
    def _shares_prefix(self) -> bool:
        """Whether prompts are read once for all their completions, into a cache; one pass a batch where they aren't."""
        return not self.options.gradient_checkpointing and self.mesh is None

    def _filled(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """As many batches in every process that shares a sharded model, by ones that count for nothing."""
        if self.mesh is None:
            return batches
        most = max(self._gathered([len(batches)]))
        token = torch.tensor([self.generator.pad_token])
        nothing = MicroBatch((PromptGroup(token, (token,), (0.0,), (0,)),), repeated=True)
        return batches + [nothing] * (most - len(batches))

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """A block in which processes may run the policy, without gradient, a different number of times."""

        def run() -> None:
            token = torch.tensor([[self.generator.pad_token]], device=self.generator.device)
            with torch.no_grad(), self.policy.base():
                self.policy.model(input_ids=token)

        with in_step(self.policy.transformer, self.mesh, run):
            yield

    def _states(self, tokens: CompletionTokens) -> Tensor:
        """What `_logits` makes logits of, [tokens, hidden]; the logits themselves where the model has no head apart."""
        if self.head is None:
            return self._tempered(completion_logits(self.policy, tokens, share_prefix=self._shares_prefix))
        with self.head.left_out():
            return completion_logits(self.policy, tokens, share_prefix=self._shares_prefix)

    def _logits(self, states: Tensor) -> Tensor:
        assert self.head is not None
        with self.accelerator.autocast():
            return self._tempered(self.head(states))

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.options.temperature == 1.0 else logits / self.options.temperature

    def _rate(self) -> float:
        options, cold = self.options, self.options.cold_start_steps
        rate, step = options.learning_rate, self.state.step
        if step < cold:
            return rate + (options.cold_start_learning_rate - rate) * (0.5 + 0.5 * math.cos(math.pi * step / cold))
        rate, step = rate * self.state.rate_scale, step - cold
        if step < options.warmup_steps:
            rate *= (step + 1) / options.warmup_steps
        falls = 0.5 + 0.5 * math.cos(math.pi * step / max(options.steps - cold, 1))
        return rate * falls if options.decay else rate

    def _validate(self, row: Row) -> None:
        """Adds the policy's validation accuracy to the row; keeps the parameters if none were better before."""
        score = self._score(self.validation, base=False).accuracy
        if self.state.best_score is None or score > self.state.best_score:
            self.state.best_score, self.state.best_step = score, self.state.step
            self.best = [parameter.detach().clone() for parameter in self.policy.parameters]
        row["validation"] = score
        self._record(row)
        self._plot()

    def _score(self, problems: Sequence[Problem], *, base: bool) -> Evaluation:
        def answer(prompts: Sequence[Tensor], room: int, images: Sequence[ImageInputs] = ()) -> list[Tensor]:
            return [found[0] for found in self.generator.completions(prompts, room, images=images, base=base)]

        with self._in_step():
            mine = evaluate(
                answer,
                self.task,
                self._mine(problems),
                self.processor,
                token_budget=self.options.token_budget,
            )
        places = self._mine(range(len(problems)))
        found = sorted(self._gathered(list(zip(places, mine.scores, mine.answers, strict=True))))
        return Evaluation(tuple(score for _, score, _ in found), tuple(text for _, _, text in found))

    def _test(self) -> tuple[Evaluation | None, Evaluation | None]:
        """The base and the best checkpoint on the test split, written to `result.json`."""
        problems = self.task.problems("test")[: self.options.test_size] if self.options.test_size else []
        if not len(problems):
            return None, None
        self.policy.load_parameters(self.best)
        base, best = self._score(problems, base=True), self._score(problems, base=False)
        if self.accelerator.is_main_process:
            write_text(self.options.output / "result.json", json.dumps(self._figures(base, best), indent=1) + "\n")
        return base, best

    def _figures(self, base: Evaluation, best: Evaluation) -> dict[str, Any]:
        _, seconds = self.metrics.series("seconds")
        return {
            "task": self.task.name,
            "base": {"accuracy": base.accuracy, "interval": base.interval},
            "best": {"accuracy": best.accuracy, "interval": best.interval, "step": self.state.best_step},
            "test_problems": len(best.scores),
            "trainable": self.policy.trainable,
            "steps": self.state.step,
            "seconds_per_step": statistics.median(seconds) if seconds else None,
            "training_seconds": sum(seconds),
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "options": self.options.to_dict(),
        }

    # Alarms, records, processes, signals

    def _alarmed(self, row: Row) -> bool:
        """Whether an alarm ends the run; where it is to lower the rate, training goes on from the best parameters."""
        rewarded = "reward" in row  # solutions are to be far from the base, and certain
        cause = self.alarms.alarm(self.state, row.get("entropy"), row.get("kl")) if rewarded else None
        if cause is None:
            return False
        action = {
            "warn": "going on",
            "lower": f"going on from step {self.state.best_step} with half the learning rate",
            "stop": "stopping",
        }[self.options.on_alarm]
        self.console.print(f"step {self.state.step}: {cause}; {action}", style="yellow")
        if self.options.on_alarm == "lower":
            self.state.rate_scale /= 2
            self.policy.load_parameters(self.best)
            self.optimizer.state.clear()
        return self.options.on_alarm == "stop"

    def _record(self, row: Row) -> None:
        self.metrics.add(row)
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        self.accelerator.log(numbers, step=row["step"])

    def _plot(self) -> None:
        if self.accelerator.is_main_process:
            title = f"{self.task.name}: {self.options.method}, {self.options.objective}, seed {self.options.seed}"
            plot(self.metrics, self.options.output / "curve.png", title, self.state.best_step)

    def _gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes."""
        return gather_object(items) if self.accelerator.num_processes > 1 else items

    def _agreed(self, stopping: bool) -> bool:
        """Whether any process has been told to stop: all stop after the same step."""
        return any(self._gathered([stopping]))

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT ends the loop after the step that runs; a second one ends the program at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, before)
            self._stopping = True
            self.console.print("stopping after this step; once more ends at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str], None]]:
        name = TextColumn(self.task.name, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=30))
        columns = (name, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            line = bar.add_task("", total=self.options.steps, completed=self.state.step)

            def announce(text: str) -> None:
                self.console.print(text, highlight=False)
                bar.update(line, completed=self.state.step)

            yield announce


def check_problems(task: Task, options: TrainOptions) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Problems to train on and to validate with; raises where there are none, or none with the solutions it takes."""
    problems, validation = task.problems("train"), task.problems("validation")[: options.validation_size]
    if not len(problems) or not len(validation):
        raise ValueError(
            f"task: expected problems to train on and to validate with, got {len(problems)} and {len(validation)} of "
            f"{task.name}"
        )
    needs_solutions = options.objective == "next-token" or options.cold_start_steps > 0
    if needs_solutions and all(problem.solution is None for problem in problems):
        raise ValueError(
            "objective, cold_start_steps: the likelihood of solutions expects a task that has some, got "
            f"{task.name}, which has none"
        )
    return problems, validation


def check_folder(options: TrainOptions) -> None:
    """Raises unless the output is a folder for a new run, or one with a checkpoint where a run is to be resumed."""
    exists = (options.output / CHECKPOINT).is_file()
    if exists and not options.resume:
        raise ValueError(f"output: expected a folder without a run, got {options.output}; --resume continues it")
    if options.resume and not exists:
        raise FileNotFoundError(f"output: expected a run to resume in {options.output}, found no checkpoint")


def _summary(row: Row, state: State, steps: int) -> str:
    """A line for a step; of its validation only where it had one."""
    parts = [
        f"{name} {row[key]:.3g}"
        for name, key in (("reward", "reward"), ("loss", "loss"), ("KL", "kl"), ("entropy", "entropy"))
        if row.get(key) is not None and (key != "loss" or "reward" not in row)
    ]
    if "validation" in row:
        parts.append(f"validation {row['validation']:.1%} (best {state.best_score:.1%}, base {state.base_score:.1%})")
    return f"step {state.step}/{steps}: " + ", ".join(parts)


def make_accelerator(options: TrainOptions) -> Accelerator:
    """An accelerator that logs to the run's folder, with its trackers started."""
    accelerator = Accelerator(
        cpu=torch.accelerator.current_accelerator(check_available=True) is None,
        mixed_precision=options.mixed_precision,
        log_with=list(options.trackers) or None,
        project_dir=options.output if options.trackers else None,
    )
    if options.trackers:
        config = options.to_dict().items()
        plain = {name: value if isinstance(value, int | float) else str(value) for name, value in config}
        accelerator.init_trackers("t2", plain)
    return accelerator


def sharding_mesh(accelerator: Accelerator) -> DeviceMesh:
    """A mesh over all processes, to divide the factors over.

    Raises:
        ValueError: there is one process.
    """
    if accelerator.num_processes < 2:
        raise ValueError("shard: expected two processes or more (torchrun, accelerate launch), got one")
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def train(model_name: str, options: TrainOptions, *, console: Console | None = None) -> TrainResult:
    """Loads model and task by name and trains (`t2 train`). Raises as `t2.load`, `t2.tasks.get` and `Trainer` do."""
    from t2.model.load import load_factored
    from t2.tasks import get, options_of
    from t2.weights.loading import load
    from t2.weights.streaming import streams

    task = get(options.task, **options_of(options.task_options))
    check_problems(task, options)
    check_folder(options)
    accelerator = make_accelerator(options)
    dtype, device = getattr(torch, options.model_dtype), accelerator.device
    model: PreTrainedModel | SVFModel
    mesh = sharding_mesh(accelerator) if options.shard else None
    if options.method == "svf" and streams(model_name, options.stream):
        model, tokenizer = load_factored(model_name, svf_config(options, mesh), dtype=dtype, device=device)
    else:
        model, tokenizer = load(model_name, dtype=dtype, device=device)
    return Trainer(model, tokenizer, task, options, accelerator=accelerator, console=console).run()
