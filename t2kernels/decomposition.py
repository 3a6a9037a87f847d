from typing import NamedTuple
import torch
from torch import Tensor
class Factors(NamedTuple):
    u: Tensor
    s: Tensor
    vh: Tensor
def decompose(w):
    return Factors(*[t.contiguous() for t in torch.linalg.svd(w.float(), full_matrices=False)])
