"""The tensors of a checkpoint folder, one or several safetensors files, read one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2.weights.files import FileFormatError, open_safetensors
from t2kernels.files import strict_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def _is_shard(file: str) -> bool:
    return file.endswith(".safetensors") and file == Path(file).name and "\0" not in file


def is_sharded(folder: Path) -> bool:
    """Whether the folder's weights are several files."""
    return (folder / INDEX).is_file()


class Shards:
    """The tensors of a folder as `save_pretrained` writes it: `model.safetensors`, or shards and their index.

    All headers are read at once, so that a missing or truncated file is found before long work; tensors are read when
    they are asked for.

    Raises:
        FileNotFoundError: a shard that the index names is missing.
        FileFormatError: there are no safetensors, a file is truncated or corrupt, or the index does not fit its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        listed = self._listed()
        for path in dict.fromkeys(listed.values()) if listed else [folder / SINGLE]:
            with open_safetensors(path, "shard") as file:
                for name in file.keys():  # noqa: SIM118  # the handle is no mapping
                    self._files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
        for name, path in listed.items():
            if self._files.get(name) != path:
                raise FileFormatError(
                    f"{folder / INDEX}: expected {name} in {path.name}, which does not hold it ({path})"
                )

    def _listed(self) -> dict[str, Path]:
        """The file of each tensor by the index; empty where there is a single file."""
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / SINGLE).is_file():
                raise FileFormatError(
                    f"folder {self.folder}: expected {SINGLE} or {INDEX}, found neither; weights load from safetensors "
                    "only, never pickle"
                )
            return {}
        try:
            content = strict_json(path.read_bytes())
        except ValueError as error:
            raise FileFormatError(f"{path}: expected an index with a weight_map, got no JSON ({error})") from error
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names:
            raise FileFormatError(f"{path}: expected an index with a weight_map, got one without")
        if not all(isinstance(file, str) and _is_shard(file) for file in names.values()):
            raise FileFormatError(f"{path}: expected a weight_map to files of its own folder, got {names!r:.80}")
        for file in dict.fromkeys(names.values()):
            if not (self.folder / file).is_file():
                raise FileNotFoundError(f"shard {self.folder / file} does not exist, which {path} names")
        return {name: self.folder / file for name, file in names.items()}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor, or its entry `index`, mapped from its file. Raises KeyError for a name that is not there."""
        with open_safetensors(self._files[name], "shard") as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        return tensor


@dataclass(frozen=True)
class Lazy:
    """A tensor of a checkpoint that transformers reads by `[...]`, as it does from its own file handles."""

    shards: Shards
    name: str

    def __getitem__(self, index: object) -> Tensor:
        return self.shards.read(self.name)


@dataclass(frozen=True)
class StoredWeight:
    """A layer's weight [out, in] in a checkpoint: a function that reads it in the dtype of the model.

    transposed: whether the checkpoint holds [in, out], as GPT-2's Conv1D does.
    index: of the matrix in a tensor that holds several.
    rows: of the matrix that are the layer's, after it was transposed; default all.
    """

    shards: Shards
    name: str
    dtype: torch.dtype
    transposed: bool = False
    index: int | None = None
    rows: slice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.shards.shapes[self.name][0 if self.index is None else 1 :]
        rows, *columns = shape[::-1] if self.transposed else shape
        return (rows if self.rows is None else len(range(rows)[self.rows])), *columns

    def __call__(self) -> Tensor:
        weight = self.shards.read(self.name, self.index).to(self.dtype)
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[self.rows]
