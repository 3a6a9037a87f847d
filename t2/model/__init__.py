"""SVFModel: decomposed layers, routes, key-value cache, serving plans and verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2._lazy import lazy_names

if TYPE_CHECKING:
    from t2.experts.registry import ExpertChoice
    from t2.model.config import SVFConfig
    from t2.model.load import load_factored, load_svf
    from t2.model.svf_model import SVFModel

__all__ = ["ExpertChoice", "SVFConfig", "SVFModel", "load_factored", "load_svf"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ExpertChoice": "t2.experts.registry",
        "SVFConfig": "t2.model.config",
        "SVFModel": "t2.model.svf_model",
        "load_factored": "t2.model.load",
        "load_svf": "t2.model.load",
    },
)
