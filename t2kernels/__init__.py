"""SVF kernels: U diag(sigma * z) Vh x for one expert or a different one per row, never building the matrix.

`svf_linear` works on plain tensors, `FactoredWeight`, `DeltaWeight` and `DenseWeight` on packed ones, `linear_group` on
several layers that share their input, `SVFLinear` is the module, `decode_attention` what stands between them when a
model answers, `backends()` tells which kernels this installation runs.
`t2kernels.planner` knows when another form than the factored one is faster, `t2kernels.limits` what the machine can do.
"""

from t2kernels.attention import decode_attention
from t2kernels.backends import backends, build_info, select_instruction_set
from t2kernels.decomposition import Factors, decompose
from t2kernels.functional import svf_linear
from t2kernels.modules import SVFLinear
from t2kernels.weights import DeltaWeight, DenseWeight, FactoredWeight, linear_group

__all__ = [
    "DeltaWeight",
    "DenseWeight",
    "FactoredWeight",
    "Factors",
    "SVFLinear",
    "backends",
    "build_info",
    "decode_attention",
    "decompose",
    "linear_group",
    "select_instruction_set",
    "svf_linear",
]
