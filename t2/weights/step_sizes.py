"""Sizes of a training step, as the options of `t2 estimate` give them."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a training step."""

    prompt_tokens: int = 256
    """Length of a prompt, in tokens."""
    new_tokens: int = 256
    """Length of a completion, in tokens."""
    prompts_per_step: int = 16
    """Prompts per step."""
    samples_per_prompt: int = 4
    """Completions per prompt."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")

    @property
    def rows(self) -> int:
        """Completions sampled at once."""
        return self.prompts_per_step * self.samples_per_prompt

    def micro_batches(self) -> list[tuple[int, int]]:
        """(prompts, completions) of every micro-batch that some token budget leads to, the smallest first."""
        parts = [(1, answers) for answers in range(1, self.samples_per_prompt)]
        return parts + [(prompts, prompts * self.samples_per_prompt) for prompts in range(1, self.prompts_per_step + 1)]

    def tokens(self, prompts: int, answers: int, *, checkpointing: bool = False) -> int:
        """Tokens as `--token-budget` counts them: with checkpointing every completion has a prompt of its own."""
        return (answers if checkpointing else prompts) * self.prompt_tokens + answers * self.new_tokens
