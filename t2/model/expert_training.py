"""One expert as the trainable parameter of a wrapped model, for any loop that trains an nn.Module."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from t2.experts.expert import Expert
from t2.experts.registry import ExpertChoice
from t2.model.routing import TrainedRoute
from t2.model.wrapper import WrapperModule


class ExpertTrainingMixin(WrapperModule):
    """The part of `SVFModel` that trains: one expert as its parameter `z`."""

    def start_training(self, start: ExpertChoice = None) -> nn.Parameter:
        """Makes an expert the one trainable parameter `z` [R] of this module, [K] in the delta form, and returns it.

        Until `finish_training` it takes the base's place: calls without `experts` outside a `route` run with it, those
        of the wrapped model included, and a backward pass reaches it. So any loop that trains an nn.Module trains the
        expert, transformers' and TRL's trainers among them. Nothing else of the model requires grad.

        Args:
            start: initial z; None is the base, z = 1.
        """
        self._check_wrapped()
        if self.z is not None:
            raise RuntimeError("an expert is in training already; finish_training() ends that")
        table = self.slot_table
        first = self.z_of(start).detach().to(self.sigma.device)
        table.scales_of(first)  # an error where it differs from the base off the support
        first = table.columns_of(first).clone()
        self.__dict__["_trainable_before"] = [p for p in self.parameters() if p.requires_grad]
        self.requires_grad_(False)
        self.z = nn.Parameter(first)
        self.router.default = TrainedRoute(self.z, table)
        return self.z

    def finish_training(self, metadata: Mapping[str, str] | None = None) -> Expert:
        """The expert trained since `start_training`; calls without `experts` are the base's again.

        Parameters require grad again that did before.
        """
        if self.z is None:
            raise RuntimeError("no expert is in training; start_training() begins that")
        trained = Expert(self.slot_table.with_columns(self.z.detach()), self.layout, metadata)
        self.z, self.router.default = None, None
        for parameter in self.__dict__.pop("_trainable_before"):
            parameter.requires_grad_()
        return trained

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The wrapped model's method; layers run again in the backward pass find the route of their forward pass.

        Raises:
            ValueError: reentrant checkpoints are asked for, which have no place for a route.
        """
        arguments = {"use_reentrant": False} | dict(activation_checkpointing_kwargs or {})
        if arguments["use_reentrant"]:
            raise ValueError("use_reentrant: expected False, got True")
        model: Any = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(arguments | {"context_fn": self._checkpoint_contexts}, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The name of `activation_checkpointing_enable` before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of the forward pass and of its repetition, which may be in another thread."""
        route = self.router.current
        return self.router.within(route), self.router.within(route)
