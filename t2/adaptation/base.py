"""Interface of strategies: prompts in, a mix of experts per request out (arXiv 2501.06252, section 3.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from t2.experts.expert import ExpertBank
from t2.experts.mixes import mix_rows
from t2.model.svf_model import ExpertChoice, SVFModel
from t2.tasks.base import Problem, prompt_text
from t2.tasks.classify import BASE, Prompt


@dataclass(frozen=True)
class Adaptation:
    """Result of pass one: the weights of a mix, z = alpha @ [1; experts], for each request.

    names: columns of alpha: "base" (z = 1) first, then experts of the bank.
    alpha: [B, E] float32, or [B, G, E] with separate weights for groups of matrices.
    seconds: duration of pass one.
    reasons: one readable line per request.
    groups: the group of each matrix of the layout, if alpha has groups.
    """

    names: tuple[str, ...]
    alpha: Tensor
    seconds: float
    reasons: tuple[str, ...]
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = (len(self.reasons), *((max(self.groups) + 1,) if self.groups else ()), len(self.names))
        if tuple(self.alpha.shape) != shape:
            raise ValueError(f"alpha: expected shape {list(shape)}, got {list(self.alpha.shape)}")
        if self.names[:1] != (BASE,):
            raise ValueError(f"names: expected {BASE!r} first, got {self.names}")

    def choices(self, svf: SVFModel) -> list[ExpertChoice]:
        """Entries for `svf.generate(experts=...)`, one per request.

        None for the base, a name for one expert, a mapping for a mix without the base, else a tensor z [R]. Requests
        with equal weights have the same entry, so that they share a slot.
        """
        made: dict[tuple[float, ...], ExpertChoice] = {}
        keys = [tuple(row.flatten().tolist()) for row in self.alpha]
        for key, row in zip(keys, self.alpha, strict=True):
            if key not in made:
                made[key] = self._choice(row, svf)
        return [made[key] for key in keys]

    def _choice(self, row: Tensor, svf: SVFModel) -> ExpertChoice:
        if row.dim() == 1:
            weights = {name: weight for name, weight in zip(self.names, row.tolist(), strict=True) if weight}
            if list(weights.values()) == [1.0]:
                (name,) = weights
                return None if name == BASE else name
            if weights and BASE not in weights:
                return weights
        return mixed(svf.bank, self.names, row.unsqueeze(0), self.groups)[0]


def mixed(bank: ExpertBank, names: Sequence[str], alpha: Tensor, groups: Sequence[int] = ()) -> Tensor:
    """z [B, R] = alpha @ [1; experts]: `bank.mix` with the base as the row "base" (z = 1).

    Args:
        names: the rows, "base" among them.
        alpha: [B, E]; or [B, G, E], where the matrix i of the layout takes the weights of its group, `groups[i]`.
    """
    layout = bank.layout
    rows = torch.stack([torch.ones(layout.R) if name == BASE else bank[name].z for name in names])
    if alpha.dim() == 2:
        return mix_rows(alpha, rows)
    z = torch.empty(alpha.shape[0], layout.R)
    for name, group in zip(layout.names, groups, strict=True):
        window = layout.window(name)
        z[:, window] = mix_rows(alpha[:, group], rows[:, window])
    return z


class Strategy(ABC):
    """Chooses experts for requests. `svf.set_adaptation(strategy)` lets `generate(adapt=name)` find it.

    Args:
        svf: the model; experts are those of its bank.
        tokenizer: its tokenizer, as `t2.load` gives it.
    """

    name: str

    def __init__(self, svf: SVFModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(svf, SVFModel) or not isinstance(svf.model, PreTrainedModel):
            raise TypeError(f"svf: expected an SVFModel around a transformers model, got {type(svf).__name__}")
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an end token and a padding token, as `t2.load` gives it")
        self.svf = svf
        self.tokenizer = tokenizer

    @abstractmethod
    def adapt(self, prompts: Sequence[Prompt]) -> Adaptation:
        """Pass one over a batch: texts, problems, or conversations, one per request."""

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """User message in each row of a batch that `generate` got, as `user_words` finds it."""
        if attention_mask is None:
            padded = (input_ids == self.tokenizer.pad_token_id).long()
            attention_mask = 1 - padded.cumprod(1) | padded.flip(1).cumprod(1).flip(1)
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        template = Template.of(self.tokenizer)
        return [user_words(str(self.tokenizer.decode(row)), self.tokenizer, template) for row in rows]


@dataclass(frozen=True)
class Template:
    """Text that a chat template puts around the last user message.

    start: before it, if it is the first message. turns: between another message and it. end: after it.
    """

    start: str
    turns: tuple[str, ...]
    end: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Template | None:
        """Template of a tokenizer, found by rendering sample messages; None if it has none."""
        if tokenizer.chat_template is None:
            return None
        other, words, turns = "\x02", "\x03", []
        start, _, end = prompt_text(_talk(user=words), tokenizer).partition(words)
        for said in (_talk(system=other, user=words), _talk(("user", ""), assistant=other, user=words)):
            try:
                _, _, rest = prompt_text(said, tokenizer).partition(other)
            except TemplateError:  # some have no place for a system prompt
                continue
            turns.append(rest.partition(words)[0])
        return cls(start, tuple(turns), end)


def _talk(*first: tuple[str, str], **said: str) -> Problem:
    return Problem(tuple({"role": role, "content": content} for role, content in (*first, *said.items())))


def user_words(text: str, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> str:
    """Last user message of a prompt that went through the chat template.

    A text of another form counts as the user message as a whole.
    """
    if template is not None and text.rstrip().endswith(template.end.rstrip()):
        turns = [turn for turn in template.turns if turn.strip() and turn in text]
        begins = [text.rfind(turn) + len(turn) for turn in turns]
        begins += [len(template.start)] if template.start and text.startswith(template.start) else []
        if begins:
            text = text[max(begins) : len(text.rstrip()) - len(template.end.rstrip())]
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.strip()
