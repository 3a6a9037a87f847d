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
) -> int:
    """Decompose the target matrices of a model into the factor cache; an interrupted run continues where it stopped.

    Example: t2 decompose smollm2-135m-instruct --target-modules q_proj v_proj

    Args:
        cache_dir: Factor cache; the default is $T2_CACHE or ~/.cache/t2.
        verify: Read every file back and check its factors against the weight.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from t2.weights.factor_cache import FactorCache, decompose_weights
    from t2.weights.streaming import target_weights

    out, cache = Console(), FactorCache(cache_dir)
    weights = target_weights(model, as_targets(target_modules), stream=stream, dtype=getattr(torch, model_dtype))
    done = decompose_weights(weights, cache)
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
    out.print(table)
    total = sum(entry.rank for entry in done.values())
    verified = ", each verified" if verify else ""
    out.print(f"{len(done)} matrices in {cache.directory}{verified}; an expert has {total:,} parameters")
    return 0
