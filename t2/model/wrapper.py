"""The module around a model: its attributes, casts and signature, and the way back to a plain model."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, TypeVar

from torch import Tensor, nn

from t2.experts.layout import Layout
from t2.experts.registry import ExpertChoice, ExpertRegistry
from t2.experts.slots import SlotTable
from t2.model.decomposed import DecomposedLayers
from t2.model.routing import Router, TrainedRoute
from t2.weights.fused_experts import fuse

Wrapper = TypeVar("Wrapper", bound="WrapperModule")


class WrapperModule(nn.Module):
    """Behaves as the module `model` in it, and gives plain models back.

    Attributes that it lacks are the wrapped model's; decomposed layers follow casts and moves. It can be neither
    copied, pickled nor saved: plain models can.
    """

    model: nn.Module
    decomposed: DecomposedLayers
    z: nn.Parameter | None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "decomposed"):
                raise
            return getattr(self.model, name)

    def _apply(self, fn: Any, recurse: bool = True) -> WrapperModule:
        z = self._parameters.pop("z", None)  # float32 whatever the model is cast to: small steps would be lost
        try:
            super()._apply(fn, recurse)
        finally:
            if z is not None:
                self._parameters["z"] = z
        if self.decomposed.layers:
            self.decomposed.follow_device()
            if z is not None:
                z.data = z.data.to(self.sigma.device)
                if z.grad is not None:
                    z.grad.data = z.grad.data.to(self.sigma.device)
                self.router.default = TrainedRoute(z, self.slot_table)
        return self

    # State

    @property
    def layout(self) -> Layout:
        """The decomposed matrices, in the order of an expert's vector."""
        return self.decomposed.layout

    @property
    def bank(self) -> ExpertRegistry:
        """The experts by name; an expert added to it or removed from it is served, or isn't, from then on."""
        return self.decomposed.registry

    @property
    def router(self) -> Router:
        """The current route of each thread or task."""
        return self.decomposed.router

    @property
    def slot_table(self) -> SlotTable:
        """The scales of all experts in use, sigma * z [slots, R] or in the delta form sigma (z - 1) [slots, K]."""
        return self.decomposed.table

    @property
    def sigma(self) -> Tensor:
        """The singular values [R] float32 of all decomposed matrices, in the order of the layout."""
        return self.slot_table.sigma

    def z_of(self, choice: ExpertChoice) -> Tensor:
        """The vector z [R] float32 that a request with this choice runs with; a given tensor keeps its gradient."""
        return self.bank.z_of(choice)

    def _check_wrapped(self) -> None:
        if not self.decomposed.layers:
            raise RuntimeError("this SVFModel has been unloaded from its model; wrap the model again")

    # Back to plain models

    def merged_copy(self, expert: ExpertChoice) -> nn.Module:
        """A plain copy of the model with this expert built in: W + U diag(sigma (z - 1)) Vh in every target layer.

        The copy has nothing of t2 in it; `save_pretrained` works. At z = 1 it is the base, bit for bit.
        """
        self._check_wrapped()
        return self.decomposed.merged_copy(self.z_of(expert).detach())

    def merge_and_unload(self, expert: ExpertChoice) -> nn.Module:
        """The wrapped model itself as a plain model with this expert built in; this wrapper is unusable afterwards.

        The weights are those of `merged_copy`, without a second copy of the rest of the model.
        """
        self._check_wrapped()
        self.decomposed.remove(self.z_of(expert).detach())
        fuse(self.model)
        return self.model

    def unload(self) -> nn.Module:
        """The base model, bit for bit as it was; this wrapper is unusable afterwards."""
        self._check_wrapped()
        self.decomposed.remove()
        fuse(self.model)
        return self.model

    def merge(self, expert: ExpertChoice) -> nn.Module:
        """The old name of `merged_copy`."""
        warnings.warn("merge is now merged_copy; the old name goes with the next release", DeprecationWarning, 2)
        return self.merged_copy(expert)

    def detach(self) -> nn.Module:
        """The old name of `unload`."""
        warnings.warn("detach is now unload; the old name goes with the next release", DeprecationWarning, 2)
        return self.unload()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises TypeError: nothing could say which experts a copy shares with this model."""
        raise TypeError(
            "an SVFModel can be neither copied nor pickled: merged_copy(expert) gives a plain copy with an expert "
            "built in, unload() the base, bank.save() writes the experts; wrap another copy of the base for a second "
            "one"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises TypeError: a model on disk is a plain one, an expert a file of its own."""
        raise TypeError(
            "save_pretrained: expected a plain model, got one with decomposed layers; save `merged_copy(expert)` for a "
            "model with an expert built in, `unload()` for the base, or the expert itself with `Expert.save`"
        )


def with_signature(kind: type[Wrapper], model: type[nn.Module]) -> type[Wrapper]:
    """A subclass whose `forward` shows the arguments of the wrapped model's, as trainers read them there."""

    @functools.wraps(kind.forward)
    def of_model(self: Wrapper, *args: Any, experts: Any = None, **kwargs: Any) -> Any:
        return kind.forward(self, *args, experts=experts, **kwargs)

    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.name != "experts"]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    experts = inspect.Parameter("experts", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*(p for p in parameters if p not in rest), experts, *rest]
    of_model.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type(f"SVF{model.__name__}", (kind,), {"forward": of_model, "__module__": kind.__module__})
