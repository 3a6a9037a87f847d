"""The strategies of pass one by name. The command line and the eval spec offer those that are listed here."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from t2.adaptation.base import Strategy
    from t2.model.svf_model import SVFModel
    from t2.tasks.classify import Domains

PASS_ONE = {
    "prompt": "t2.adaptation.dispatch:PromptStrategy",
    "classifier": "t2.adaptation.dispatch:ClassifierStrategy",
}
"""The class of each strategy, as module:class; its arguments are a model, its tokenizer, and the domains of a bank."""

if TYPE_CHECKING:
    PassOne = str
else:
    PassOne = Literal[tuple(PASS_ONE)]


def pass_one(
    name: str, svf: SVFModel, tokenizer: PreTrainedTokenizerBase, domains: Domains, **options: Any
) -> Strategy:
    """The strategy of pass one with this name."""
    strategy: Strategy = resolve_name(PASS_ONE[name])(svf, tokenizer, domains, **options)
    return strategy
