"""Experts: one vector z over all singular values of a model, and banks of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2.experts.layout import Layout
from t2.experts.mixes import mix_rows
from t2.weights.files import FileFormatError, file_errors, parse_json, read_safetensors, write_safetensors

FORMAT_VERSION = "1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that a z may be given in; it is kept as float32."""


def check_z(name: str, z: object, shape: tuple[int, ...]) -> Tensor:
    """`z` itself, if it is a float tensor of this shape whose values are finite in float32.

    Raises:
        TypeError: no tensor, or one of another dtype than `FLOATS`. ValueError: another shape, or values that float32
            cannot hold.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(z).__name__}")
    if z.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float dtype of at least 16 bits, got {z.dtype}")
    if tuple(z.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} (one number per singular value), got {list(z.shape)}")
    if not bool((finite := torch.isfinite(z.detach().float())).all()):
        raise ValueError(
            f"{name}: expected finite values, got {int((~finite).sum())} NaN or infinite ones (as float32)"
        )
    return z


class Expert:
    """One expert: z [R] float32, which multiplies the singular values of its base model (arXiv 2501.06252, 3.1).

    z = 1 is the base model. `metadata` holds strings of the user's own (data, command, scores) and is saved along.
    """

    def __init__(self, z: Tensor, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.z = check_z("z", z, (layout.R,)).detach().to("cpu", torch.float32).clone()
        self.layout = layout
        self.metadata = dict(metadata or {})
        if not all(isinstance(text, str) for pair in self.metadata.items() for text in pair):
            raise TypeError(f"metadata: expected strings by name, got {self.metadata!r:.80}")

    @classmethod
    def random(cls, layout: Layout, std: float = 0.1, seed: int = 0) -> Expert:
        """z = 1 + std * N(0, 1): an expert that has learnt nothing, for tests and throughput."""
        noise = torch.randn(layout.R, generator=torch.Generator().manual_seed(seed))
        return cls(1.0 + std * noise, layout)

    def __getitem__(self, name: str) -> Tensor:
        """The z of one matrix, a view [rank]."""
        return self.z[self.layout.window(name)]

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a safetensors file, whole or not at all; OSError names the path.

        `dtype`: of z in the file; float16 halves it, and rounds z to 11 bits.
        """
        if dtype not in (torch.float32, torch.float16):
            raise TypeError(f"dtype: expected float32 or float16, got {dtype}")
        _write(path, "expert", {"z": self.z.to(dtype)}, self.layout, {"metadata": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> Expert:
        """Reads a file that `save` wrote; FileFormatError says what is wrong with one that is not."""
        z, layout, metadata = _read(path, "expert", "z")
        about = parse_json(metadata.get("metadata", "{}"), f"{path}: metadata")
        if not isinstance(about, dict):
            raise FileFormatError(f"{path}: metadata: expected strings by name, got {about!r:.80}")
        with file_errors(path):
            return cls(z, layout, about)

    def __repr__(self) -> str:
        return f"Expert(R={self.layout.R}, base={self.layout.base_model!r}, |z - 1|={float((self.z - 1).norm()):.3g})"


class ExpertBank:
    """Named experts of one base model: a matrix [E, R], one row each, in the order they were added."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._rows: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self._rows)

    @property
    def matrix(self) -> Tensor:
        """[E, R] float32, a copy."""
        return torch.stack(list(self._rows.values())) if self._rows else torch.empty(0, self.layout.R)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._rows))

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Expert:
        return Expert(self._row(name), self.layout)

    def add(self, name: str, expert: Expert, *, replace: bool = False, strict: bool = True) -> None:
        """Adds an expert under a new name, or in place of the one that has it with `replace`.

        Raises ValueError for a name that is taken, empty, or an expert whose layout (or, unless `strict` is False,
        base weights) is not the bank's.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a non-empty string, got {name!r}")
        if not isinstance(expert, Expert):
            raise TypeError(f"expert: expected a t2.Expert, got {type(expert).__name__}")
        if name in self._rows and not replace:
            raise ValueError(f"name: expected one not yet in the bank, got {name!r}; replace=True replaces it")
        self.layout.check_same(expert.layout, f"expert {name!r}", same_base=strict)
        self._rows[name] = expert.z.clone()

    def remove(self, name: str) -> None:
        self._row(name)
        del self._rows[name]

    def mix(self, weights: Mapping[str, float] | Tensor) -> Tensor:
        """sum_k alpha_k z_k (arXiv 2501.06252, section 3.2), the weights taken as they are, not normalised.

        Args:
            weights: a weight per name, which gives [R]; or alpha [B, E] in the order of `names`, which gives [B, R].
        """
        if isinstance(weights, Tensor):
            if weights.dim() != 2 or weights.shape[1] != len(self):
                raise ValueError(f"weights: expected shape [B, {len(self)}] (experts), got {list(weights.shape)}")
            mixed = mix_rows(check_z("weights", weights, tuple(weights.shape)).cpu(), self.matrix)
            return check_z("weights: the mix", mixed, tuple(mixed.shape))
        if not weights:
            raise ValueError("weights: expected at least one expert in a mix, got none")
        alpha = torch.tensor([float(weight) for weight in weights.values()])
        if not bool(torch.isfinite(alpha).all()):
            raise ValueError(f"weights: expected finite numbers, got {dict(weights)}")
        mixed = mix_rows(alpha[None], torch.stack([self._row(name) for name in weights]))[0]
        return check_z("weights: the mix", mixed, tuple(mixed.shape))

    def save(self, path: str | Path) -> None:
        """Writes all experts to one safetensors file, whole or not at all."""
        _write(path, "bank", {"z": self.matrix}, self.layout, {"experts": json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> ExpertBank:
        """Reads a file that `save` wrote; FileFormatError says what is wrong with one that is not."""
        matrix, layout, metadata = _read(path, "bank", "z")
        names = parse_json(metadata.get("experts", "[]"), f"{path}: experts")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FileFormatError(f"{path}: experts: expected a list of names, got {names!r:.80}")
        bank = ExpertBank(layout)
        if tuple(matrix.shape) != (len(names), layout.R):
            raise FileFormatError(f"{path}: expected z of shape [{len(names)}, {layout.R}], got {list(matrix.shape)}")
        for name, z in zip(names, matrix, strict=True):
            with file_errors(f"{path}: expert {name!r}"):
                bank.add(name, Expert(z, layout))
        return bank

    def _row(self, name: str) -> Tensor:
        if name not in self._rows:
            raise ValueError(f"expert: expected one of {self.names or 'none: the bank is empty'}, got {name!r}")
        return self._rows[name]


def _write(path: str | Path, kind: str, tensors: dict[str, Tensor], layout: Layout, extra: dict[str, str]) -> None:
    header = {"format": f"t2-{kind}", "format_version": FORMAT_VERSION}
    write_safetensors(path, tensors, header | layout.to_metadata() | extra)


def _read(path: str | Path, kind: str, tensor: str) -> tuple[Tensor, Layout, dict[str, str]]:
    tensors, metadata = read_safetensors(path, kind)
    found = metadata.get("format"), metadata.get("format_version")
    if found != (f"t2-{kind}", FORMAT_VERSION) or tensor not in tensors:
        raise FileFormatError(f"{path}: expected a t2-{kind} file of version {FORMAT_VERSION}, got {found}")
    layout = Layout.from_metadata(metadata, str(path))
    z = tensors[tensor]
    if z.dtype not in FLOATS or z.dim() == 0 or z.shape[-1] != layout.R:
        raise FileFormatError(f"{path}: expected float z of length {layout.R}, got {z.dtype} {list(z.shape)}")
    return z, layout, metadata
