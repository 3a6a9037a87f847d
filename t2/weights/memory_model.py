"""Bytes and operations of one matrix, one layer and one token: the terms of a model's estimate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from t2kernels.decomposition import ROWS
from t2kernels.packing import BESIDE, BLOCK_BYTES, BLOCK_TERMS, INT4, PANEL
from t2kernels.weights import float16_rank

SCALED = (torch.int8, torch.uint8, INT4)
"""Formats with a scale for each row of W, or each component."""
ACTIVATIONS_OF = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose activations `Architecture.layer_activations` describes."""


def factor_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of `FactoredWeight.pack(...)`: both factors, the singular values, the components' scales."""
    rank = min(out_features, in_features)
    head = float16_rank(rank) if dtype == torch.int8 else 0
    parts = [(head, torch.float16), (rank - head, dtype)] if head else [(rank, dtype)]
    total = 4 * rank * (2 if dtype in SCALED else 1)
    for components, stored in parts:
        total += _panel_bytes(out_features, components, stored) + _panel_bytes(components, in_features, stored)
    return total


def dense_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of `DenseWeight.pack(...)`: W, and the scales of its rows."""
    scales = 4 * out_features if dtype in SCALED else 0
    return _panel_bytes(out_features, in_features, dtype) + scales


def delta_bytes(out_features: int, in_features: int, components: int, dtype: torch.dtype) -> int:
    """Bytes of `DeltaWeight.pack(...)`: W, and both factors and the singular values of the support's components."""
    stored = BESIDE.get(dtype, dtype)
    factors = _panel_bytes(out_features, components, stored) + _panel_bytes(components, in_features, stored)
    scales = 4 * components * (2 if stored in SCALED else 1)
    return dense_bytes(out_features, in_features, dtype) + factors + scales


def _panel_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    if dtype in BLOCK_BYTES:
        return -(-n // PANEL) * -(-k // BLOCK_TERMS) * BLOCK_BYTES[dtype]
    k += k % 2 if dtype in (torch.bfloat16, torch.int8) else 0
    return -(-n // PANEL) * PANEL * k * dtype.itemsize


def disk_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """A file of the factor cache without its header of a few hundred bytes: float32 factors, and W as it was."""
    rank = min(out_features, in_features)
    return 4 * rank * (out_features + in_features + 1) + dtype.itemsize * out_features * in_features


def decompose_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Most that is held while one matrix is read, decomposed and saved (`t2kernels.decompose`, on a CPU).

    Beside W: during `eigh` the Gram matrix, its eigenvectors and LAPACK's workspace, 4 n^2 doubles in all; then
    the larger factor in float64 with rows of W; where W is ill-conditioned, that with its QR factors; then it in
    float64 and float32 with the smaller one; then both, and their bytes in the file.
    """
    small, large = sorted((out_features, in_features))
    weight = dtype.itemsize * small * large
    eigh = 32 * small**2
    product = 8 * small * large + 8 * small**2 + 8 * min(ROWS, large) * small
    orthogonal = 16 * small * large + 16 * small**2 + 64 * small
    factors = 12 * small * large + 8 * small**2
    saving = 2 * 4 * small * (small + large) + weight
    return weight + max(eigh, product, orthogonal, factors, saving)


def decompose_flops(out_features: int, in_features: int) -> tuple[float, float, float]:
    """(eigenproblem, float64 products, float32 products) of one matrix: n^3, and multiply-adds times 2."""
    small, large = sorted((out_features, in_features))
    return float(small**3), 3.0 * large * small**2, 2.0 * large * small**2


@dataclass(frozen=True)
class Rates:
    """This machine's speed at decomposing: units of `decompose_flops` a second, from a probe of about two seconds."""

    eigh: float
    float64: float
    float32: float

    @classmethod
    def measure(cls, size: int = 1024) -> Rates:
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(size, size, generator=generator)
        gram = (matrix.double() @ matrix.double().T) / size
        eigh = _seconds(lambda: torch.linalg.eigh(gram))
        double = _seconds(lambda: gram @ gram)
        single = _seconds(lambda: matrix @ matrix)
        return cls(size**3 / eigh, 2 * size**3 / double, 2 * size**3 / single)

    def seconds(self, out_features: int, in_features: int) -> float:
        """One matrix, without reading, hashing and writing it."""
        eigh, double, single = decompose_flops(out_features, in_features)
        return eigh / self.eigh + double / self.float64 + single / self.float32


def _seconds(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Architecture:
    """The sizes that activations and the cache of keys and values depend on."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norms_of_heads: bool

    @classmethod
    def of(cls, config: Any, model: nn.Module) -> Architecture:
        text = config.get_text_config(decoder=True)
        heads = int(text.num_attention_heads)
        hidden = int(text.hidden_size)
        return cls(
            model_type=str(text.model_type),
            layers=int(text.num_hidden_layers),
            hidden=hidden,
            intermediate=int(getattr(text, "intermediate_size", None) or 4 * hidden),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
            vocabulary=int(text.vocab_size),
            norms_of_heads=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        )

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    def layer_activations(self, ranks: float, rows: int, new: int, keys: int, dtype: torch.dtype) -> float:
        """Bytes that a decoder layer of Llama's kind keeps in a pass for the backward pass.

        Let a pass have `rows` sequences of T = `new` tokens that look at K = `keys` keys each, n = rows T and
        m = rows K, and e the bytes of `dtype`. With H heads of d numbers, hidden size h and intermediate size i:

            4 n ranks               t = x Vh^T of each decomposed matrix, float32 (t2kernels/ops.py); neither x nor W'
            2 n (4 h + 4)           the input of both norms in float32, and its root mean square
            e n 2 H d + 4 n H       queries, the output of attention and its log-sum-exp
            e m 2 H d               keys and values, repeated for all heads, as attention with a mask needs them
            e n K                   the mask in the dtype of the queries
            3 e n i                 the gate, its activation and the up projection

        and where queries and keys have norms of their own (Qwen3), 4 n (H + H_kv) (d + 1) more.

        Args:
            ranks: the sum of the ranks of the layer's decomposed matrices.
        """
        e, n, m, wide = dtype.itemsize, rows * new, rows * keys, self.heads * self.head_dim
        norms = 2 * n * (4 * self.hidden + 4)
        if self.norms_of_heads:
            norms += 4 * n * (self.heads + self.kv_heads) * (self.head_dim + 1)
        attention = e * n * 2 * wide + 4 * n * self.heads + e * m * 2 * wide + e * rows * new * keys
        return 4 * n * ranks + norms + attention + 3 * e * n * self.intermediate

    def transient(self, tokens: int, dtype: torch.dtype) -> float:
        """Bytes that a layer's forward or backward pass holds for a moment: gradients of its widest part."""
        return tokens * dtype.itemsize * (3 * self.intermediate + 2 * self.hidden)
