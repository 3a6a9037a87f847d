"""The `t2 decompose` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from t2.cli.options import OPTIONAL, Model, ModelDtype, Stream, Targets
from t2.cli.options import target_modules as as_targets


def run(
    model: Model,
    target_modules: Targets = ("all-linear",),
    cache_dir: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint=OPTIONAL)] = None,
    verify: bool = False,
    model_dtype: ModelDtype = "float32",
    stream: Stream = "auto",
    workers: Annotated[int | None, arg(metavar="N", help_behavior_hint=OPTIONAL)] = None,
) -> int:
    """Decompose the target matrices of a model into the factor cache; an interrupted run continues where it stopped.

    Example: t2 decompose smollm2-135m-instruct --target-modules q_proj v_proj

    Under torchrun, on one machine or several that share the cache, each process decomposes its share of the matrices.

    Args:
        cache_dir: Factor cache; the default is $T2_CACHE or ~/.cache/t2.
        verify: Read every file back and check its factors against the weight.
        workers: Matrices at a time in each process, which share its threads; by default as many as suit their size.
    """
    import os

    import torch
    from rich.console import Console
    from rich.table import Table

    from t2.weights.factor_cache import FactorCache, decompose_weights
    from t2.weights.streaming import target_weights

    out, cache = Console(), FactorCache(cache_dir)
    weights = target_weights(model, as_targets(target_modules), stream=stream, dtype=getattr(torch, model_dtype))
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    weights = {name: weights[name] for name in list(weights)[rank::processes]}
    done = decompose_weights(weights, cache, progress=rank == 0, workers=workers)
    if verify:
        for entry in done.values():
            cache.verify(entry.key)
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        shapes.setdefault((rows, columns), []).append(name)
    table = Table("matrices", "out x in", "rank", "largest relative error", "new", "seconds each")
    for (rows, columns), names in shapes.items():
        entries = [done[name] for name in names]
        new = [entry.seconds for entry in entries if not entry.cached]
        table.add_row(
            str(len(names)),
            f"{rows} x {columns}",
            str(min(rows, columns)),
            f"{max(entry.error for entry in entries):.1e}",
            str(len(new)),
            f"{sum(new) / len(new):.3f}" if new else "",
        )
    if processes == 1:
        out.print(table)
    total = sum(entry.rank for entry in done.values())
    verified = ", each verified" if verify else ""
    process = f"process {rank + 1} of {processes}: " if processes > 1 else ""
    out.print(f"{process}{len(done)} matrices in {cache.directory}{verified}; an expert has {total:,} parameters")
    return 0
