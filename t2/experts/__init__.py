"""Experts: vectors z over a model's singular values, their layout, banks, slots and transfer."""

from t2.experts import transfer
from t2.experts.expert import Expert, ExpertBank
from t2.experts.layout import Layout

__all__ = ["Expert", "ExpertBank", "Layout", "transfer"]
