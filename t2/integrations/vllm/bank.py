"""Experts of a bank folder as vLLM's adapters: one folder per content, found by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from t2.adaptation.bank_folder import CLASSIFIER
from t2.experts import support
from t2.experts.expert import Expert
from t2.experts.layout import Layout
from t2.experts.mixes import mix_rows, parse_mix
from t2.tasks.classify import BASE
from t2.weights.files import atomic_directory, read_safetensors
from t2kernels.files import cache_root, delete_unused

BANK, SUPPORT = "T2_BANK", "T2_SUPPORT"
"""Environment variables: the bank's folder; the support of the delta form, default that of the bank's experts."""
SUFFIX = ".safetensors"
ROWS = 3
"""Rows of bfloat16 numbers whose sum is a float32 number exactly."""
FORMAT = 2
"""Of the adapters; part of the hash that names their folders."""
MOST_MIXES = 1000
"""Mixes that one process makes: each is a folder on disk, and vLLM keeps its name."""


def split_exactly(values: Tensor) -> Tensor:
    """Rows [3, n] of numbers that bfloat16 holds, whose sum is `values` [n] float32.

    vLLM casts adapters to the model's dtype, and a scale near 1 does not survive that: so adapters hold z - 1, and
    hold it in parts.
    """
    rows = []
    for _ in range(ROWS):
        rows.append(values.bfloat16().float())
        values = values - rows[-1]
    return torch.stack(rows)


def base_bits(fingerprint: str, rank: int) -> Tensor:
    """A row [rank] of zeros and ones that tells one base's weights from another's, in any dtype."""
    digest = hashlib.sha256(fingerprint.encode()).digest()
    bits = torch.tensor([byte >> i & 1 for byte in digest for i in range(8)], dtype=torch.float32)
    return bits.repeat(-(-rank // len(bits)))[:rank]


def suffixes(layout: Layout) -> list[str]:
    """Last parts of the names of the matrices."""
    return sorted({name.rpartition(".")[2] for name in layout.names})


def write_adapter(expert: Expert, folder: Path | str) -> None:
    """Writes an expert in the form of a LoRA adapter, whole or not at all.

    The A of each matrix holds z - 1, and a row of bits by which vLLM's layers know whose weights it is for.
    """
    tensors = {}
    for name, rank in zip(expert.layout.names, expert.layout.ranks, strict=True):
        rows = (*split_exactly(expert[name] - 1), base_bits(expert.layout.fingerprint, rank))
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.stack(rows)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(1, 1)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": suffixes(expert.layout), "bias": "none"}
    with atomic_directory(folder) as temporary:
        save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        (temporary / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Adapter:
    """An expert's folder in the form that vLLM reads, named by its content."""

    name: str
    path: Path

    @property
    def number(self) -> int:
        """vLLM's lora_int_id, by content, and beyond those that it counts up itself."""
        return (1 << 62) + int(self.path.name[:15], 16)


class Bank:
    """The experts NAME.safetensors of a folder.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{BANK}: expected a folder of experts, got {self.folder}")
        self._adapters = cache_root() / "vllm-adapters"
        self._made: dict[tuple[str, tuple[tuple[int, int], ...]], Adapter] = {}

    @classmethod
    def from_environment(cls) -> Bank:
        folder = os.environ.get(BANK)
        if not folder:
            raise ValueError(f"{BANK}: expected the folder of the bank in this environment variable, got none")
        return cls(folder)

    @property
    def names(self) -> list[str]:
        """All experts, in order."""
        names = (path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(name for name in names if not name.startswith(".") and name != CLASSIFIER)

    @property
    def layout(self) -> Layout | None:
        """Layout of the experts; None where there are none."""
        for name in self.names:
            path = self.folder / f"{name}{SUFFIX}"
            return Layout.from_metadata(read_safetensors(path, "expert")[1], str(path))
        return None

    @property
    def target_modules(self) -> list[str]:
        """Last parts of the names of the experts' matrices."""
        return [] if self.layout is None else suffixes(self.layout)

    def _file(self, name: str) -> Path | None:
        file = self.folder / f"{name}{SUFFIX}"
        plain = bool(name) and "\0" not in name and Path(name).name == name and not name.startswith(".")
        return file if plain and file.is_file() else None

    def find(self, name: str) -> Adapter | None:
        """The adapter of an expert or a mix by name, made if need be; None where the bank has no such expert.

        Raises:
            OSError, ValueError, TypeError: a file cannot be read, or experts do not fit each other.
        """
        file, weights = self._file(name), None
        files = [file]
        if file is None:
            weights = parse_mix(name)
            if weights is None:
                return None
            files = [self._file(part) for part in weights if part != BASE]
        try:
            stamps = tuple((about.st_mtime_ns, about.st_size) for path in files if path and (about := path.stat()))
        except FileNotFoundError:
            return None
        if len(stamps) < len(files) or not files:
            return None
        known = self._made.get((name, stamps))
        if known is None or not known.path.is_dir():
            if weights is not None and sum(":" in made for made, _ in self._made) >= MOST_MIXES:
                raise ValueError(f"mix: expected at most {MOST_MIXES} different ones until vLLM starts again")
            experts = [Expert.load(path) for path in files if path]
            known = Adapter(name, self._write(experts[0] if weights is None else _mixed(experts, weights)))
            self._made = {key: made for key, made in self._made.items() if key[0] != name}
            self._made[name, stamps] = known
        return known

    def _write(self, expert: Expert) -> Path:
        layout = expert.layout
        about = json.dumps([layout.names, layout.ranks, layout.fingerprint, FORMAT]).encode()
        content = hashlib.sha256(about + expert.z.numpy().tobytes()).hexdigest()
        folder = self._adapters / content[:32]
        if folder.is_dir():
            os.utime(folder)
        else:
            delete_unused(self._adapters.glob("*"))
            write_adapter(expert, folder)
        return folder


def _mixed(experts: Sequence[Expert], weights: dict[str, float]) -> Expert:
    layout, given = experts[0].layout, iter(experts)
    rows = []
    for name in weights:
        expert = None if name == BASE else next(given)
        if expert is not None:
            layout.check_same(expert.layout, f"expert {name!r}")
        rows.append(torch.ones(layout.R) if expert is None else expert.z)
    return Expert(mix_rows(torch.tensor([list(weights.values())]), torch.stack(rows))[0], layout)


def lora_request(name: str, bank: Bank | None = None) -> Any:
    """vLLM's `LoRARequest` for an expert or a mix of the bank, for `LLM.generate(..., lora_request=...)`.

    Args:
        bank: default that of `T2_BANK`.

    Raises:
        KeyError: the bank has no such expert. OSError, ValueError, TypeError: its file cannot be used.
    """
    from vllm.lora.request import LoRARequest

    bank = Bank.from_environment() if bank is None else bank
    adapter = bank.find(name)
    if adapter is None:
        raise KeyError(f"name: expected an expert of {bank.folder} or a mix of such, got {name!r}")
    return LoRARequest(lora_name=name, lora_int_id=adapter.number, lora_path=str(adapter.path))


def set_support() -> None:
    """Writes the support of the bank's files to one and names it in `T2_SUPPORT`, if that names none yet.

    The classification expert's is part of it. The processes that vLLM starts then have one support, whatever comes into
    the bank meanwhile.
    """
    if os.environ.get(SUPPORT) or not os.environ.get(BANK):
        return
    bank = Bank.from_environment()
    layout = bank.layout
    if layout is None:
        return
    positions = support.load(bank.folder, layout)
    if not len(positions):
        return
    key = hashlib.sha256(layout.fingerprint.encode() + positions.numpy().tobytes()).hexdigest()
    path = cache_root() / "vllm-adapters" / f"support-{key[:32]}{SUFFIX}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        support.save(path, positions, layout)
    os.environ[SUPPORT] = str(path)
