"""Transformer-squared on fused SVF kernels: one base model, a different expert for every request in a batch."""

from t2.experts import Expert, ExpertBank
from t2.layout import Layout
from t2.loading import load
from t2.model import SVFConfig, SVFModel
from t2.storage import FileFormatError
from t2.streaming import load_factored

__all__ = ["Expert", "ExpertBank", "FileFormatError", "Layout", "SVFConfig", "SVFModel", "load", "load_factored"]
