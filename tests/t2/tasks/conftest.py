from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet"])
def write(request, tmp_path: Path) -> Callable[..., Path]:
    """write(rows, "folder/train") writes a file in each format and returns its path."""

    def write_rows(rows: list[dict[str, Any]], name: str) -> Path:
        path = tmp_path / f"{name}.{request.param}"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if request.param == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif request.param == "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(lines)
        return path

    return write_rows
