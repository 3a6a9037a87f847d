"""`svf_linear`: the SVF linear map on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from t2kernels import checks, ops


def svf_linear(
    x: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    z: Tensor,
    bias: Tensor | None = None,
    *,
    expert_ids: Tensor | None = None,
) -> Tensor:
    """y = U diag(s * z) Vh x + bias without building that matrix (arXiv 2501.06252, section 3.1).

    Differentiable in x, s, z and bias; u and vh are frozen. Products and sums run in float32. For factors used more
    than a few times, `FactoredWeight.pack` once is faster, and gives the same bits; only where bfloat16 activations
    meet bfloat16 factors on a processor with that dot product does it round the scaled projection.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        u: [out, r], left singular vectors, the dtype of x.
        s: [r], singular values, any float dtype.
        vh: [r, in], right singular vectors, the dtype of x.
        z: [r] for one expert, or [E, r] for several, any float dtype.
        bias: [out] or None.
        expert_ids: int64 [x.shape[0]], the row of z that each leading row of x uses; needed with [E, r].

    Returns:
        [..., out], the dtype of x.

    Raises:
        TypeError: a wrong or mixed dtype. ValueError: a shape or device that does not fit. IndexError: an expert id
        outside 0..E-1.
    """
    checks.check_tensor("u", u, "[out, r]")
    checks.check_tensor("vh", vh, "[r, in]")
    if u.dim() != 2:
        raise ValueError(f"u: expected 2 dimensions [out, r], got shape {list(u.shape)}")
    if vh.dim() != 2 or vh.shape[0] != u.shape[1]:
        raise ValueError(f"vh: expected shape [{u.shape[1]}, in] (the rank of u), got {list(vh.shape)}")
    out_features, rank = u.shape
    x = checks.check_activations(x, vh.shape[1])
    floats = (torch.float64, *checks.ACTIVATION_DTYPES)
    for name, factor in (("u", u), ("vh", vh)):
        checks.check_dtype(name, factor, (x.dtype,))
        checks.check_frozen(name, factor)
    for name, value in (("s", s), ("z", z)):
        checks.check_dtype(name, checks.check_tensor(name, value, "[r]"), floats)
    for name, value in (("u", u), ("vh", vh), ("s", s), ("z", z)):
        checks.check_device(name, value, x, "x")
    checks.check_shape("s", s, (rank,), "rank")
    checks.check_bias(bias, x, out_features)
    if expert_ids is None:
        checks.check_shape("z", z, (rank,), "rank; [E, rank] needs expert_ids")
        scales = (s.float() * z.float()).unsqueeze(0)
        slots = torch.zeros(1, dtype=torch.int64, device=x.device)
    else:
        if z.dim() != 2 or z.shape[1] != rank:
            raise ValueError(f"z: expected shape [E, {rank}] with expert_ids, got {list(z.shape)}")
        scales = s.float() * z.float()
        slots = checks.check_ids("expert_ids", expert_ids, x, z.shape[0])
    return ops.call(ops.factored_linear, x, [u], [vh], None, scales, slots, bias, out_features, False, None, None)[0]
