"""`decode_attention`: the attention of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor

from t2kernels import checks, ops


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    scale: float | None = None,
    key_rows: Tensor | None = None,
    key_ranges: Tensor | None = None,
) -> Tensor:
    """softmax(scale * query key^T) value for one new token a row; query heads share key heads in groups, in order.

    Keys and values are read once for all query heads of a group, where they lie: no repetition, no copy. A row's bits
    depend on its keys from the first allowed one to the last, not on the batch or on padding. A row that may look
    nowhere gives zeros. Softmax and sums are float32. Inference only.

    Args:
        query: [rows, heads, 1, head_dim] float32, bfloat16 or float16, head_dim a multiple of 16.
        key, value: [rows, key heads, length, head_dim], the dtype of query; heads is a multiple of the key heads.
            Any strides; a last dimension that is not contiguous costs a copy.
        allowed: bool [rows, length], the keys that a row may look at; None for all.
        scale: default 1 / sqrt(head_dim).
        key_rows: int64 [rows], the row of key and value that each row looks at: several tokens of one request share
            its keys, which may lie in any row of a cache; they are read once for a few of them if they follow each
            other. Default: each its own.
        key_ranges: int64 [rows, 2], the first key that each row may look at, and the end. Both this and `allowed` hold
            where both are given.

    Returns:
        [rows, 1, heads, head_dim], contiguous, the dtype of query.

    Raises:
        TypeError: a wrong or mixed dtype. ValueError: a shape or device that does not fit, or a tensor that requires
        grad.
    """
    meaning = "[rows, key heads, length, head_dim]"
    checks.check_dtype(
        "query", checks.check_tensor("query", query, "[rows, heads, 1, head_dim]"), checks.ACTIVATION_DTYPES
    )
    if query.dim() != 4 or query.shape[2] != 1 or query.shape[3] % 16 or not query.shape[3]:
        raise ValueError(
            f"query: expected shape [rows, heads, 1, head_dim], head_dim a multiple of 16, got {list(query.shape)}"
        )
    rows, heads, _, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        checks.check_dtype(name, checks.check_tensor(name, tensor, meaning), (query.dtype,))
        checks.check_device(name, tensor, query, "query")
    if key.dim() != 4 or not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"key: expected shape {meaning}, key heads a divisor of {heads}, got {list(key.shape)}")
    if key_rows is not None:
        checks.check_dtype("key_rows", checks.check_tensor("key_rows", key_rows, "[rows]"), (torch.int64,))
        checks.check_shape("key_rows", key_rows, (rows,), "rows")
        checks.check_device("key_rows", key_rows, query, "query")
        if rows and not (int(key_rows.min()) >= 0 and int(key_rows.max()) < key.shape[0]):
            raise ValueError(f"key_rows: expected 0 <= row < {key.shape[0]}, the rows of key, got {key_rows.tolist()}")
    if key_ranges is not None:
        checks.check_dtype("key_ranges", checks.check_tensor("key_ranges", key_ranges, "[rows, 2]"), (torch.int64,))
        checks.check_shape("key_ranges", key_ranges, (rows, 2), "rows, 2")
        checks.check_device("key_ranges", key_ranges, query, "query")
        begin, end = key_ranges.unbind(1)
        if rows and not bool(((begin >= 0) & (begin <= end) & (end <= key.shape[2])).all()):
            raise ValueError(
                f"key_ranges: expected 0 <= begin <= end <= {key.shape[2]}, the length, got {key_ranges.tolist()}"
            )
    key_count = rows if key_rows is None else key.shape[0]
    checks.check_shape("key", key, (key_count, key.shape[1], key.shape[2], head_dim), meaning)
    checks.check_shape("value", value, tuple(key.shape), "that of key")
    if allowed is not None:
        checks.check_dtype("allowed", checks.check_tensor("allowed", allowed, "[rows, length]"), (torch.bool,))
        checks.check_shape("allowed", allowed, (rows, key.shape[2]), "rows, length")
        checks.check_device("allowed", allowed, query, "query")
    if torch.is_grad_enabled():
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected requires_grad=False (inference only), got a tensor that requires grad"
                )
    scale = head_dim**-0.5 if scale is None else float(scale)
    ranges = None if key_ranges is None else key_ranges.contiguous()
    return ops.decode_attention(query, key, value, allowed, scale, key_rows, ranges)
