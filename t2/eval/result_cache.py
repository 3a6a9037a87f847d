"""On-disk cache of results: one JSON file per value, keyed by everything that the value depends on."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from t2kernels.files import strict_json, write_text

Key = Mapping[str, Any]
"""Everything that a value depends on, as JSON; "kind" and "label" also appear in the file name."""


class ResultCache:
    """Values by key in a folder. Writes are atomic; an unreadable file counts as a cache miss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Key, suffix: str = ".json") -> Path:
        """File of a key, whether it exists or not."""
        name = re.sub(r"\W+", "-", f"{key['kind']} {key['label']}".strip())
        return self.folder / f"{name}-{_digest(_text(key))[:24]}{suffix}"

    def find(self, key: Key) -> Any | None:
        """The value of a key, or None; a warning names a damaged file."""
        path = self.path(key)
        try:
            content = strict_json(path.read_bytes(), finite=False)
            if content["key"] != json.loads(_text(key)):
                raise ValueError("the key is another one")
            digest = _digest(json.dumps(content["value"]))
            if content.get("digest", digest) != digest:
                raise ValueError("the digest is another value's")
            return content["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            warnings.warn(f"{path} is damaged, and measured anew ({error})", RuntimeWarning, stacklevel=2)
            return None

    def put(self, key: Key, value: Any) -> Any:
        """Store a value, and return it in the form that `find` gives."""
        kept = json.loads(json.dumps(value))
        text = json.dumps({"key": key, "value": kept, "digest": _digest(json.dumps(kept))})
        write_text(self.path(key), text + "\n")
        return kept


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's content as float32."""
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def texts_digest(*texts: Any) -> str:
    """SHA-256 of a sequence of values, each as text."""
    return _digest(json.dumps([str(text) for text in texts]))


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
