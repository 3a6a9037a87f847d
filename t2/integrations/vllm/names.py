"""The names of vLLM's quantisation methods that this package adds: a form, and a storage."""

from __future__ import annotations

import torch

from t2kernels.packing import INT4

NAME = "t2_svf"
FACTORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
DELTA = {**FACTORED, "uint8": torch.uint8, "int4": INT4}
METHODS: dict[str, tuple[bool, torch.dtype | None]] = {
    f"{NAME}{form}{'_' if storage else ''}{storage}": (bool(form), dtype)
    for form, known in (("", FACTORED), ("_delta", DELTA))
    for storage, dtype in {"": None, **known}.items()
}
"""By name: whether the form is delta, and the storage; None is the model's dtype."""


def method_name(form: str, storage: str) -> str:
    """The method of a form, factored or delta, and a storage dtype by name.

    Raises:
        ValueError: there is none.
    """
    name = f"{NAME}{'_delta' if form == 'delta' else ''}_{storage}"
    if name not in METHODS:
        raise ValueError(f"factor_dtype: expected one of {', '.join(FACTORED)} for the form {form}, got {storage}")
    return name
