"""Transformer-squared on fused SVF kernels: one base model, a different expert for every request in a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2 import _renamed
from t2._lazy import lazy_names

if TYPE_CHECKING:
    from t2 import adaptation, eval, generation, tasks, training
    from t2.experts import transfer
    from t2.experts.expert import Expert, ExpertBank
    from t2.experts.layout import Layout
    from t2.model.config import SVFConfig
    from t2.model.load import load_factored, load_svf
    from t2.model.svf_model import SVFModel
    from t2.weights.files import FileFormatError
    from t2.weights.loading import load

__all__ = [
    "Expert",
    "ExpertBank",
    "FileFormatError",
    "Layout",
    "SVFConfig",
    "SVFModel",
    "adaptation",
    "eval",
    "generation",
    "load",
    "load_factored",
    "load_svf",
    "tasks",
    "training",
    "transfer",
]

_renamed.install()
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Expert": "t2.experts.expert",
        "ExpertBank": "t2.experts.expert",
        "FileFormatError": "t2.weights.files",
        "Layout": "t2.experts.layout",
        "SVFConfig": "t2.model.config",
        "SVFModel": "t2.model.svf_model",
        "adaptation": "",
        "eval": "",
        "generation": "",
        "load": "t2.weights.loading",
        "load_factored": "t2.model.load",
        "load_svf": "t2.model.load",
        "tasks": "",
        "training": "",
        "transfer": "t2.experts",
    },
)
