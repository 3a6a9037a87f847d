"""The options of a wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from t2.experts.support import Chosen
from t2kernels import Factors
from t2kernels.packing import DENSE_STORAGE_DTYPES, GPU_STORAGE_DTYPES, LEVELS

FactorSource = Callable[[str, Tensor], Factors] | Mapping[str, Callable[[], Factors]]
"""Factors made elsewhere: a function (name, weight [out, in]) -> factors, or functions without arguments by name."""


@dataclass(frozen=True)
class SVFConfig:
    """Options of `SVFModel`.

    target_modules: "all-linear" (all but the output embedding), "attention" or "mlp" (layers below a module of that
        name), a regular expression for the whole name, or a list of name suffixes such as ["q_proj", "v_proj"]. In a
        model that reads images, only layers of its language model count.
    dtype: storage of the factors: float32, bfloat16, float16, int8, or on a GPU float8_e4m3fn; None keeps each
        weight's own. In the delta form this is the storage of W too, and can on a CPU be uint8 or int4: 8 or 4 bits
        with a scale and a minimum for every 32 terms, as in GGUF's Q4_1, whose weights int4 holds exactly. Components
        are uint8 beside int4, bfloat16 beside float8.
    bf16_products: rounds activations to bfloat16 before they meet bfloat16 factors, where the processor has that dot
        product: twice the arithmetic, for a drift that `docs/cpu.md` shows.
    pack_others: also runs linear layers beside the targets, the output embedding first of all, on the same kernels,
        stored as `dtype`. Logits come straight out of them, so beside int8 and float8 they keep their dtype (float32
        becomes float16), and beside int4 they are uint8. Modules before the language model of one that reads images
        stay as they are.
    cache: True keeps factors (and the base weights, which merging and unloading need) in `cache_dir` instead of
        computing them at every start; False holds the base weights in memory beside the factors.
    cache_dir: folder of the cache; None is `t2kernels.files.cache_root() / "factors"`.
    slots: rows of the slot table, 4 R bytes each (4 K in the delta form): the base, every expert, and the mixes of
        running batches have one. None is 64 on a GPU (185 MB for Llama-3-8B) and 8 elsewhere. A full table doubles
        (`SVFModel.table_generation`).
    verify: runs a short probe through the model before and after (`t2.model.verify`): a dozen forward passes of 20
        tokens. Layers that fail it are left out with a warning; a model whose outputs it changes is refused. Where
        weights are read one by one there are no outputs to compare with: only rows of a mixed batch are checked.
    progress: shows a progress bar while decomposing.
    form: "factored" runs U diag(sigma z) Vh, with z free at every component. "delta" runs W x and adds what experts
        change at the components of `support`: the base is the dense model bit for bit, at its speed and a little more.
    shard: a one-dimensional DeviceMesh over processes that each keep a share of the factors (`t2.model.sharding`), by
        FSDP2; every process wraps its own copy of the model, and all call it together. For training: the model can
        then be neither merged nor unloaded.
    tensor_parallel: a one-dimensional DeviceMesh over processes that run every batch together, each its part of the
        layers (`t2.model.tensor_parallel`): all of them call the model with the same inputs. Needs `cache`.
    support: of the delta form: a number of components of each matrix or a share of them, the leading ones; a file or
        folder of experts or a file of `t2.experts.support.save`; or positions in z (`t2.experts.support.resolve`).
    """

    target_modules: str | Sequence[str] = "all-linear"
    dtype: torch.dtype | None = None
    bf16_products: bool = False
    pack_others: bool = True
    cache: bool = True
    cache_dir: Path | str | None = None
    slots: int | None = None
    verify: bool = True
    progress: bool = True
    form: Literal["factored", "delta"] = "factored"
    support: Chosen | None = None
    shard: DeviceMesh | None = None
    tensor_parallel: DeviceMesh | None = None

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes that the model is divided over, one way or the other."""
        return self.shard or self.tensor_parallel

    def check(self) -> None:
        """Raises TypeError or ValueError for an option of another kind."""
        if self.dtype not in (None, *GPU_STORAGE_DTYPES, *DENSE_STORAGE_DTYPES):
            raise TypeError(f"dtype: expected None, float32, bfloat16, float16, int8, uint8 or int4, got {self.dtype}")
        if self.form not in ("factored", "delta"):
            raise ValueError(f"form: expected 'factored' or 'delta', got {self.form!r}")
        if self.dtype in LEVELS and self.form != "delta":
            raise ValueError(
                f"dtype: expected {self.dtype} in the delta form only: factors lose too much, got {self.form}"
            )
        if (self.support is not None) != (self.form == "delta"):
            expected = "components, a share, a file or positions" if self.form == "delta" else "None, as z is free"
            raise ValueError(f"support: expected {expected} in the {self.form} form, got {self.support!r:.80}")
        for name in ("shard", "tensor_parallel"):
            mesh = getattr(self, name)
            if mesh is not None and (not isinstance(mesh, DeviceMesh) or mesh.ndim != 1):
                raise TypeError(f"{name}: expected None or a one-dimensional DeviceMesh, got {mesh!r:.80}")
        if self.shard is not None and self.tensor_parallel is not None:
            raise ValueError("shard, tensor_parallel: expected one of them, got both")
        if self.tensor_parallel is not None and not self.cache:
            raise ValueError("cache: expected True where layers are divided over processes, got False")
        if self.slots is not None and (not isinstance(self.slots, int) or self.slots < 1):
            raise ValueError(f"slots: expected None or an integer >= 1, got {self.slots!r}")
