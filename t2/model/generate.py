"""Options of a `generate` call that decide its key-value cache and whether it can run in inference mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from t2.model.kv_cache import growing_cache


def returns_more_than_tokens(model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether more than tokens outlives the call: tensors made in inference mode would be of less use."""
    return kwargs.get("past_key_values") is not None or _option(model, kwargs, "return_dict_in_generate")


def with_growing_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's options with a cache that grows in place, unless they ask for another cache or none."""
    if (
        _option(model, kwargs, "use_cache") is False
        or _option(model, kwargs, "cache_implementation") not in (None, "dynamic")
        or _option(model, kwargs, "prompt_lookup_num_tokens") is not None
        or kwargs.get("assistant_model") is not None
    ):
        return kwargs
    cache = growing_cache(model)
    if cache is None:
        return kwargs
    named = _option(model, kwargs, "cache_implementation") is not None
    return kwargs | {"past_key_values": cache} | ({"cache_implementation": None} if named else {})


def _option(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> Any:
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(getattr(model, "generation_config", None), name, None) if given is None else given
