"""Factors divided over processes by FSDP2: each process keeps a share of a block, which is whole only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from t2.model.layers import RoutedLinear


class Sharding:
    """Divides the blocks of a model, the entries of its `nn.ModuleList`s, each as soon as its targets are decomposed.

    No process ever holds more than its share of the blocks and one block whole. What is in no block (embeddings, the
    output embedding, the last norm) stays whole in every process, and so does z.

    Args:
        targets: names of the layers that are to be decomposed.
        mesh: one-dimensional, over the processes that share.

    Raises:
        ValueError: a model of two stacks of blocks, or of none.
    """

    def __init__(self, model: nn.Module, targets: Iterable[str], mesh: DeviceMesh) -> None:
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"shard: expected a model with one stack of blocks, got {type(model).__name__}")
        self._model, self._mesh = model, mesh
        self._waiting: dict[str, set[str]] = {}
        self._block_of = {name: block for name in targets if (block := block_of(model, name)) is not None}
        for name, block in self._block_of.items():
            self._waiting.setdefault(block, set()).add(name)
        if not self._waiting:
            raise ValueError(f"shard: expected a model with an nn.ModuleList of blocks, got {type(model).__name__}")

    def placed(self, name: str) -> None:
        """A target has been decomposed; its block is divided if that was the last one in it."""
        block = self._block_of.get(name)
        if block is None:
            return
        self._waiting[block].remove(name)
        if not self._waiting[block]:
            self._divide(self._model.get_submodule(block))

    def _divide(self, block: nn.Module) -> None:
        for module in block.modules():
            if isinstance(module, RoutedLinear):
                module.weight.as_parameters()
        fully_shard(block, mesh=self._mesh)
        assert isinstance(block, FSDPModule)
        block.unshard()  # makes the whole tensors now: made in inference mode, they could not be trained with
        block.reshard()

    def finish(self) -> None:
        """All targets have been decomposed: the module around the blocks asks for each one before its turn."""
        parents = {block.rpartition(".")[0].rpartition(".")[0] for block in self._waiting}
        around = self._model.get_submodule(parents.pop()) if len(parents) == 1 else self._model
        blocks = [self._model.get_submodule(block) for block in self._waiting]
        within = {id(parameter) for block in blocks for parameter in block.parameters()}
        rest = {parameter for parameter in around.parameters() if id(parameter) not in within}
        fully_shard(around, mesh=self._mesh, ignored_params=rest)


def block_of(model: nn.Module, name: str) -> str | None:
    """The outermost entry of an `nn.ModuleList` around a module, or None: "model.layers.3" of its q_proj."""
    module, path = model, list[str]()
    for part in name.split("."):
        entry = isinstance(module, nn.ModuleList)
        module = module.get_submodule(part)
        path.append(part)
        if entry:
            return ".".join(path)
    return None


@contextmanager
def in_step(model: nn.Module, mesh: DeviceMesh | None, run: Callable[[], object]) -> Iterator[None]:
    """Within the block, processes that share a model may call it a different number of times, without gradient.

    A sharded model can only run in all of its processes at once. So those that leave the block early call `run`, a
    forward pass of any inputs, as often as others still run the model.

    Args:
        model: whose `forward` is called, for a transformers model itself, not what is around it.
        mesh: of the processes; None where the model is not sharded: nothing happens.
    """
    if mesh is None:
        yield
        return

    def runs(here: bool) -> bool:
        count = torch.tensor([here], dtype=torch.int32, device=mesh.device_type)
        dist.all_reduce(count, group=mesh.get_group())
        return bool(count)

    def announce(module: nn.Module, inputs: object) -> None:
        runs(True)

    hook = model.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    while runs(False):
        run()
