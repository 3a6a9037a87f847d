"""Experts: one vector z over all singular values of a model, and banks of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2.layout import Layout
from t2.storage import FileFormatError, open_safetensors, parse_json, read_safetensors, write_safetensors

FORMAT_VERSION = "1"
Z_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_z(name: str, z: object, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"{name}: expected a float dtype, got {z.dtype}")
    if tuple(z.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} (one number per singular value), got {list(z.shape)}")
    if z.dtype not in Z_DTYPES:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {z.dtype}")
    infinite = ~torch.isfinite(z.detach().float())
    if bool(infinite.any()):
        raise ValueError(f"{name}: expected values that are finite in float32, got {int(infinite.sum())} that are not")
    return z


class Expert:
    """One expert: z [R] float32, which multiplies the singular values of its base model (arXiv 2501.06252, 3.1).

    z = 1 is the base model. `metadata` holds strings of the user's own (data, command, scores) and is saved along.
    """

    def __init__(self, z: Tensor, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self.z = check_z("z", z, (layout.R,)).detach().to("cpu", torch.float32).clone()
        self.layout = layout
        self.metadata = dict(metadata or {})

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
        z, layout, metadata = _read(path, "expert", "z", ())
        own = parse_json(metadata.get("metadata", "{}"), f"{path}, metadata")
        if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
            raise FileFormatError(f"{path}, metadata: expected strings by name, got {own!r:.80}")
        return cls(z, layout, own)

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
            return check_z("weights", weights, tuple(weights.shape)).float() @ self.matrix
        if not weights:
            raise ValueError("weights: expected at least one expert in a mix, got none")
        alpha = torch.tensor([float(weight) for weight in weights.values()])
        if not bool(torch.isfinite(alpha).all()):
            raise ValueError(f"weights: expected finite numbers, got {dict(weights)}")
        return alpha @ torch.stack([self._row(name) for name in weights])

    def save(self, path: str | Path) -> None:
        """Writes all experts to one safetensors file, whole or not at all."""
        _write(path, "bank", {"z": self.matrix}, self.layout, {"experts": json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | Path) -> ExpertBank:
        """Reads a file that `save` wrote; FileFormatError says what is wrong with one that is not."""
        header = _metadata(path, "bank")
        names = parse_json(header.get("experts", "[]"), f"{path}, experts")
        if (
            not isinstance(names, list)
            or not all(isinstance(n, str) and n for n in names)
            or len(set(names)) < len(names)
        ):
            raise FileFormatError(f"{path}, experts: expected a list of distinct names, got {names!r:.80}")
        matrix, layout, _ = _read(path, "bank", "z", (len(names),))
        bank = ExpertBank(layout)
        for name, z in zip(names, matrix, strict=True):
            bank.add(name, Expert(z, layout))
        return bank

    def _row(self, name: str) -> Tensor:
        if name not in self._rows:
            raise ValueError(f"expert: expected one of {self.names or 'none: the bank is empty'}, got {name!r}")
        return self._rows[name]


def _write(path: str | Path, kind: str, tensors: dict[str, Tensor], layout: Layout, extra: dict[str, str]) -> None:
    header = {"format": f"t2-{kind}", "format_version": FORMAT_VERSION}
    write_safetensors(path, tensors, header | layout.to_metadata() | extra)


def _metadata(path: str | Path, kind: str) -> dict[str, str]:
    """The metadata of a file, which has to be of this kind."""
    with open_safetensors(path, kind) as file:
        metadata: dict[str, str] = file.metadata() or {}
    found = metadata.get("format"), metadata.get("format_version")
    if found != (f"t2-{kind}", FORMAT_VERSION):
        raise FileFormatError(f"{path}: expected a t2-{kind} file of version {FORMAT_VERSION}, got {found}")
    return metadata


def _read(path: str | Path, kind: str, tensor: str, rows: tuple[int, ...]) -> tuple[Tensor, Layout, dict[str, str]]:
    """A file's tensor [*rows, R], finite and float, its layout and its metadata."""
    metadata = _metadata(path, kind)
    layout = Layout.from_metadata(metadata, path)
    tensors, _ = read_safetensors(path, kind)
    if tensor not in tensors:
        raise FileFormatError(f"{path}: expected a tensor {tensor!r}, got {sorted(tensors)}")
    try:
        return check_z(tensor, tensors[tensor], (*rows, layout.R)), layout, metadata
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path}, {error}") from error
