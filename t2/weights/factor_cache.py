"""W = U diag(s) Vh, once per matrix: the decomposition, its cache, and the loop over a whole model."""

from __future__ import annotations

import hashlib
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from t2.weights.files import FileFormatError, open_safetensors, raw_bytes, write_safetensors
from t2kernels.decomposition import ALGORITHM, ROWS, Factors, check_weight, decompose
from t2kernels.files import cache_root

FORMAT, FORMAT_VERSION = "t2-factors", "2"  # of the files; 1 had no checksum
KEYS = "t2-factors-1"  # of the names: experts know their base by them, so they outlive versions of the files
MAX_ERROR = 1e-5  # reconstruction error above which stored factors are not a decomposition of their weight
LARGE = 1 << 22  # entries of a matrix that all threads work on together
STALE_SECONDS = 3600  # temporary files of killed processes are swept after this


def reconstruction_error(weight: Tensor, factors: Factors) -> float:
    """Relative Frobenius error ||W - U diag(s) Vh|| / ||W||, computed in float32; 0 / 0 counts as 0.

    Raises:
        TypeError, ValueError: `weight` is not a 2-D float tensor, or `factors` do not have its shapes.
    """
    check_weight(weight)
    (out_features, in_features), rank = weight.shape, min(weight.shape)
    shapes = tuple(tuple(t.shape) for t in factors)
    if shapes != ((out_features, rank), (rank,), (rank, in_features)):
        raise ValueError(
            f"factors have shapes {shapes}, expected (({out_features}, {rank}), ({rank},), ({rank}, {in_features}))"
        )
    w, (u, s, vh) = weight.detach(), factors
    difference = norm = 0.0
    for rows, u_rows in zip(w.split(ROWS), u.split(ROWS), strict=True):
        rows = rows.float()
        norm += float(rows.norm(dtype=torch.float64) ** 2)
        difference += float((rows - (u_rows * s) @ vh).norm(dtype=torch.float64) ** 2)
    return (difference / norm if norm else difference) ** 0.5


def weight_key(weight: Tensor) -> str:
    """Name of a weight by its content: 64 hex digits over dtype, shape, values and the algorithm's version.

    Strides, device, names and paths play no part.

    Raises:
        TypeError, ValueError: `weight` is not a 2-D float tensor with data.
    """
    check_weight(weight)
    head = f"{KEYS}|{ALGORITHM}|{weight.dtype}|{tuple(weight.shape)}|"
    digest = hashlib.sha256(head.encode())
    digest.update(raw_bytes(weight))
    return digest.hexdigest()


def factors_checksum(key: str, factors: Factors) -> str:
    """XXH3 (128 bits) over the key, and dtype, shape and bytes of u, s and vh: finds damage, and another matrix's file.

    About 5 GB/s on one core, where the file is in the page cache.
    """
    digest = xxhash.xxh3_128(key.encode())
    for name, factor in zip(Factors._fields, factors, strict=True):
        digest.update(f"|{name} {factor.dtype} {tuple(factor.shape)}|".encode())
        digest.update(raw_bytes(factor))
    return str(digest.hexdigest())


class OldFactorsError(FileFormatError):
    """A file of the factor cache is of an older version: as good as absent."""


class FactorCache:
    """Decomposed weights on disk, one `<weight_key>.safetensors` each; safe to share between processes.

    A file holds the original `weight` in its own dtype beside `u`, `s` and `vh`, so that the base model can
    be given back bit for bit while the dense weights are not in memory. Files appear whole or not at all.

    Factors are checked by a checksum, and the weight by its key, whenever they are read: a damaged file, or one of
    another matrix, is never used. The checksum is 4% of a cached load of SmolLM2-135M (0.12 of 3.0 s on one core, for
    585 MB of factors).

    `directory` defaults to `cache_root() / "factors"`; it is created by the first write.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = cache_root() / "factors" if directory is None else Path(directory)

    def __repr__(self) -> str:
        return f"FactorCache({str(self.directory)!r})"

    def path(self, key: str) -> Path:
        """The file of `key`. Raises ValueError for a string that is not a `weight_key`."""
        if not (isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key)):
            raise ValueError(f"key is {key!r}, expected the 64 hex digits of t2.weights.factor_cache.weight_key")
        return self.directory / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Whether a whole file of this version is there, by its header and size: truncated is absent."""
        try:
            self._metadata(key)
        except (FileNotFoundError, FileFormatError):
            return False
        return True

    def find(self, key: str) -> float | None:
        """The reconstruction error of a file that is there, by its header and size; None where it has to be computed.

        A file that is damaged is named in a warning; one of an older version is as good as absent.
        """
        try:
            return self.error(key)
        except (FileNotFoundError, OldFactorsError):
            return None
        except FileFormatError as problem:
            _warn(problem)
            return None

    def load(self, key: str) -> Factors:
        """The factors of `key`, checked against their checksum. Raises FileNotFoundError or FileFormatError."""
        checksum = self._metadata(key)["checksum"]
        with open_safetensors(self.path(key), "factors") as file:
            factors = Factors(*(file.get_tensor(name) for name in Factors._fields))
        if factors_checksum(key, factors) != checksum:
            raise FileFormatError(
                f"factors {self.path(key)}: u, s and vh are not those that were saved (their checksum differs); {REDO}"
            )
        return factors

    def load_or_redo(self, key: str, source: Tensor | Callable[[], Tensor] | None = None) -> Factors:
        """The factors of `key`; those of a file that is damaged are computed again, with a warning that names it.

        `source` is the weight [out, in], or reads it. Without one the weight in the file itself is taken, if that is
        sound. The file is written anew if the folder can be written. Threads are as many as there were the first time,
        on which the last bits of factors depend.

        Raises:
            FileNotFoundError: nothing is stored under `key`.
            FileFormatError: the file is damaged, and there is no weight with this key to compute it from.
        """
        threads = None
        try:
            threads = self._metadata(key).get("threads")
            return self.load(key)
        except FileFormatError as problem:
            weight = self.load_weight_or(key, source)
            _warn(problem)
        with _threads(threads):
            factors = decompose(weight)
            with suppress(OSError):
                self.save(key, weight, factors, reconstruction_error(weight, factors))
        return factors

    def load_weight_or(self, key: str, source: Tensor | Callable[[], Tensor] | None = None) -> Tensor:
        """The original weight from the file, or from `source` where the file is damaged or missing.

        Raises FileNotFoundError or FileFormatError where neither has the weight of this key.
        """
        try:
            return self.load_weight(key)
        except (FileNotFoundError, FileFormatError):
            if source is None:
                raise
            weight = source if isinstance(source, Tensor) else source()
            if weight_key(weight) != key:
                raise
            return weight

    def load_weight(self, key: str) -> Tensor:
        """The original weight, checked against `key`. Raises FileNotFoundError or FileFormatError."""
        self._metadata(key)
        with open_safetensors(self.path(key), "factors") as file:
            weight: Tensor = file.get_tensor("weight")
        if weight_key(weight) != key:
            raise FileFormatError(f"factors {self.path(key)}: the stored weight is not the one of this key; {REDO}")
        return weight

    def error(self, key: str) -> float:
        """The reconstruction error when `key` was saved. Raises FileNotFoundError or FileFormatError."""
        return float(self._metadata(key)["reconstruction_error"])

    def save(self, key: str, weight: Tensor, factors: Factors, error: float) -> None:
        """Write one weight and its factors atomically.

        Raises:
            ValueError: `key` is not a weight key.
            OSError: the file cannot be written; the message names it and the cause.
        """
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "algorithm": ALGORITHM,
            "reconstruction_error": repr(float(error)),
            "checksum": factors_checksum(key, factors),
            "threads": str(torch.get_num_threads()),
        }
        write_safetensors(self.path(key), {"weight": weight, **factors._asdict()}, metadata)

    def verify(self, key: str) -> None:
        """Re-check a file fully: the weight against `key`, shapes, and that the factors still reconstruct it.

        Raises:
            FileNotFoundError: nothing is stored under `key`.
            FileFormatError: the file is damaged; the message says how.
        """
        weight, factors, stored = self.load_weight(key), self.load(key), self.error(key)
        try:
            error = reconstruction_error(weight, factors)
        except ValueError as problem:
            raise FileFormatError(f"factors {self.path(key)}: {problem}; {REDO}") from problem
        if not error <= max(MAX_ERROR, 2 * stored):
            raise FileFormatError(
                f"factors {self.path(key)}: reconstruction error {error:.1e}, was {stored:.1e} when saved; {REDO}"
            )

    def check_writable(self) -> None:
        """Raise an OSError that names the folder if it cannot be written; meant for before long work."""
        probe = self.directory / f".probe-{id(self):x}-{time.monotonic_ns():x}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"cache folder {self.directory} is not writable: {error.strerror or error}") from error

    def _metadata(self, key: str) -> dict[str, str]:
        path = self.path(key)
        with open_safetensors(path, "factors") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
        found = metadata.get("format"), metadata.get("version")
        if found != (FORMAT, FORMAT_VERSION) or names != {"weight", *Factors._fields}:
            kind = OldFactorsError if found[0] == FORMAT else FileFormatError
            raise kind(f"factors {path}: format {found}, expected {(FORMAT, FORMAT_VERSION)}; {REDO}")
        try:
            sound = 0 <= float(metadata["reconstruction_error"]) < math.inf and metadata["checksum"]
        except (KeyError, ValueError):
            sound = False
        if not sound:
            raise FileFormatError(f"factors {path}: expected a reconstruction_error and a checksum, got none; {REDO}")
        return metadata


REDO = "delete the file to have it computed again"


def _warn(problem: FileFormatError) -> None:
    warnings.warn(f"{problem}".removesuffix(f"; {REDO}") + ": computed again", RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class Decomposed:
    """One weight: its cache key, rank, reconstruction error, seconds of work, and whether it was cached."""

    key: str
    rank: int
    error: float
    seconds: float
    cached: bool


def decompose_weights(
    weights: Mapping[str, Tensor | Callable[[], Tensor]],
    cache: FactorCache,
    *,
    progress: bool = True,
    workers: int | None = None,
) -> dict[str, Decomposed]:
    """Bring every weight into `cache`: hash it, and if it is not there decompose it and save it at once.

    Weights are tensors [out, in] or functions that return one, called when its turn comes; a function's `shape`, if
    it has one, is that of its tensor. Since each
    finished matrix is a whole file, an interrupted run goes on where it stopped, and several processes may
    run at once.

    `workers` matrices are worked on side by side, each with its share of torch's threads. Default: one worker per
    thread, at most 4; a single one with all threads where a weight has over 4 million entries, since LAPACK uses its
    threads well there and only one matrix is in memory.
    Memory beyond `weights` is what `decompose` holds for one matrix, per worker.

    Returns one `Decomposed` per weight, in the order of `weights`.

    Raises:
        TypeError, ValueError: an argument of another type, `workers` less than 1, or a weight that cannot
            be decomposed (the message names it).
        OSError: a weight is missing and the cache folder not writable (found before it is decomposed), or a file
            cannot be written.
    """
    if not isinstance(weights, Mapping) or not isinstance(cache, FactorCache):
        raise TypeError(
            f"weights is {type(weights).__name__} and cache {type(cache).__name__}, expected a mapping of "
            "names to tensors (or functions that return one) and a FactorCache"
        )
    threads = torch.get_num_threads()
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers is {workers!r}, expected None or an integer of at least 1")
    large = any(prod(getattr(weight, "shape", ())) > LARGE for weight in weights.values())
    count = min(workers or (1 if large else min(threads, 4)), max(1, len(weights)))
    _sweep(cache.directory)

    def work(name: str) -> Decomposed:
        start, source = time.perf_counter(), weights[name]
        try:
            weight = source if isinstance(source, Tensor) else source()
            key = weight_key(weight)
            error = cache.find(key)
            cached = error is not None
            if error is None:
                cache.check_writable()
                factors = decompose(weight)
                error = reconstruction_error(weight, factors)
                cache.save(key, weight, factors, error)
        except (TypeError, ValueError) as problem:
            kind = TypeError if isinstance(problem, TypeError) else ValueError
            raise kind(f"weights[{name!r}]: {problem}") from problem
        return Decomposed(key, min(weight.shape), error, time.perf_counter() - start, cached)

    done: dict[str, Decomposed] = {}
    pool = ThreadPoolExecutor(count, "decompose", torch.set_num_threads, (max(1, threads // count),))
    try:
        futures = {pool.submit(work, name): name for name in weights}
        with tqdm(total=len(weights), desc="decompose", unit="matrix", disable=not progress) as bar:
            for future in as_completed(futures):
                name = futures[future]
                done[name] = future.result()
                bar.set_postfix_str(f"{name} error {done[name].error:.0e}", refresh=False)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's call also sets the default of threads started later
    return {name: done[name] for name in weights}


@contextmanager
def _threads(told: str | None) -> Iterator[None]:
    """Within the block torch works with so many threads, if the text is a number that makes sense."""
    before = torch.get_num_threads()
    if told is not None and re.fullmatch("[1-9][0-9]{0,2}", told):
        torch.set_num_threads(int(told))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sweep(directory: Path) -> None:
    """Remove temporary files that killed processes left behind."""
    for path in directory.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except OSError:
            continue  # finished or swept by another process
