"""Argument checks shared by the public functions: each error names the argument, what came, what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, shape: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    return value


def check_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)} ({meaning}), got {list(value.shape)}")


def check_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} (that of {like_name}), got {value.device}")


def check_dtype(name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def check_activations(x: object, in_features: int) -> Tensor:
    x = check_tensor("x", x, f"[..., {in_features}]")
    check_dtype("x", x, ACTIVATION_DTYPES)
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected last dimension {in_features} (in_features), got shape {list(x.shape)}")
    return x


def check_ids(name: str, ids: object, x: Tensor, count: int) -> Tensor:
    """Routing ids: int64 [x.shape[0]] with 0 <= id < count.

    Values are checked where the host has them at hand. On a GPU, where reading them would make it wait, and under
    torch.compile they are left to the kernel: those of the GPU make a row NaN whose id is out of range.
    """
    ids = check_tensor(name, ids, "[x.shape[0]]")
    check_dtype(name, ids, (torch.int64,))
    if x.dim() < 2:
        raise ValueError(f"x: expected [rows, ..., in] when {name} is given, got shape {list(x.shape)}")
    check_shape(name, ids, (x.shape[0],), "one id per leading row of x")
    check_device(name, ids, x, "x")
    if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= count:
            raise IndexError(f"{name}: expected 0 <= id < {count}, got ids from {low} to {high}")
    return ids


def check_bias(bias: Tensor | None, x: Tensor, out_features: int) -> None:
    if bias is None:
        return
    check_dtype("bias", check_tensor("bias", bias, f"[{out_features}]"), ACTIVATION_DTYPES)
    check_shape("bias", bias, (out_features,), "out_features")
    check_device("bias", bias, x, "x")


def check_frozen(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected requires_grad=False (the factors are frozen), got a tensor that requires grad"
        )
