"""The tensors of a checkpoint by the names that the model has for them: what transformers renames and joins on loading.

Mixtures of experts are published with a tensor for each expert's matrix, and transformers joins them. Here their names
are kept, so that they are read one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel


@dataclass
class TensorNames:
    """Names in a checkpoint by names in a model.

    own: tensors that are as in the model.
    joined: of a tensor [experts, out, in] that is made of matrices, these by part (gate, up) and expert.
    """

    own: dict[str, str] = field(default_factory=dict)
    joined: dict[str, dict[tuple[int, int], str]] = field(default_factory=dict)


def tensor_names(model: PreTrainedModel, names: Iterable[str]) -> TensorNames:
    """The names of a checkpoint's tensors, for the model they are of (on the meta device). Others are left out.

    Tensors that transformers makes in other ways than by joining experts' matrices are left out too.
    """
    expected, found = model.state_dict(keep_vars=True).keys(), TensorNames()
    transforms = _transforms(model)
    for name in names:
        renamed, converter, pattern = name, None, None
        for transform in transforms:
            if converter is not None:
                break
            renamed, matched = transform.rename_source_key(renamed)
            if matched is not None and hasattr(transform, "operations"):
                converter, pattern = transform, matched
        renamed = _with_prefix(renamed, expected, model.base_model_prefix)
        if renamed not in expected:
            continue
        if converter is None:
            found.own[renamed] = name
        elif pattern is not None and _joins_experts(converter):
            number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
            if number is not None:
                key = converter.source_patterns.index(pattern), int(number[1])
                found.joined.setdefault(renamed, {})[key] = name
    return found


def _transforms(model: PreTrainedModel) -> list[Any]:
    """transformers' own list: renamings, then converters; empty where a version keeps it elsewhere."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    found: list[Any] = get_model_conversion_mapping(model)
    return sorted(found, key=lambda transform: hasattr(transform, "operations"))


def _with_prefix(name: str, expected: Iterable[str], prefix: str) -> str:
    """A tensor of the bare model under the name that it has in the whole one, or the other way round."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in expected:
            return candidate
    return name


def _joins_experts(converter: Any) -> bool:
    """Whether a converter stacks the experts' matrices, and puts gate above up where there are two patterns."""
    steps = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    both = [("Concatenate", 1)] if len(converter.source_patterns) > 1 else []
    one_number = all(pattern.count("*") == 1 for pattern in converter.source_patterns)
    return one_number and len(converter.target_patterns) == 1 and steps == [("MergeModulelist", 0), *both]
