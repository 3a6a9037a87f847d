"""`SVFModel`: a model whose every request may use an expert of its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from t2.experts.expert import Expert
from t2.experts.registry import ExpertChoice, as_choices
from t2.model.config import FactorSource, SVFConfig
from t2.model.decomposed import DecomposedLayers, WeightReaders
from t2.model.expert_training import ExpertTrainingMixin
from t2.model.first_pass import FirstPass, Strategy
from t2.model.generate import returns_more_than_tokens, with_growing_cache
from t2.model.layers import RoutedLinear
from t2.model.moe import RoutedExperts
from t2.model.requests import check_count, routed
from t2.model.serving_plan import ServingPlan, make_plan, measure_plan
from t2.model.wrapper import WrapperModule, with_signature
from t2.model.wrapping import VerifiedWrapping
from t2.weights.fused_experts import fuse, unfuse
from t2.weights.quantized import finish_loading
from t2.weights.targets import (
    PATTERNS,
    Coverage,
    Unsuitable,
    block_weights,
    is_meant,
    select_targets,
    unsuitable_layers,
)
from t2kernels.planner import CostModel

LARGE_SHARE = 0.9
"""Share of the weights that `target_modules` means below which a model warns about what stays dense."""


class SVFModel(ExpertTrainingMixin, WrapperModule):
    """Replaces the target layers of `model`, in place, by decomposed ones that share one slot table.

    `model` is any nn.Module; `generate` needs one that has it. The dense weights of the targets leave memory;
    `unload()` puts them back bit for bit. Everything is checked and decomposed before the model is changed.

    Args:
        config: options; default `SVFConfig()`.
        weights: functions that read the target weights [out, in], by module name, for a model that has these on the
            meta device and all else in memory: `t2.load_factored` makes both from a checkpoint. Needs a cache.
        factors: factors made elsewhere, in place of a decomposition: a function (name, weight [out, in]) -> Factors,
            or functions without arguments by module name. Needs `cache=False`. Experts belong to these factors, not to
            the weights: the layout's fingerprint is theirs.
        example_inputs: keyword arguments of a forward pass of at least two requests, for `SVFConfig.verify`. Default:
            made from the model's config, or from its first layers.

    Raises:
        TypeError, ValueError: an argument of another kind, or a model that has no layer to decompose.
        VerificationError: the model would answer otherwise when wrapped. It is as it was before.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SVFConfig | None = None,
        *,
        weights: WeightReaders | None = None,
        factors: FactorSource | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = config or SVFConfig()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        config.check()
        if any(isinstance(module, RoutedLinear) for module in model.modules()):
            raise ValueError("model: expected a plain model, got one that is wrapped already; unload() it first")
        if weights is not None and not config.cache:
            raise ValueError("cache: expected True where weights are read one by one, got False")
        if factors is not None and config.cache:
            raise ValueError("cache: expected False where factors are given, got True")
        meant = config.target_modules
        try:
            finish_loading(model)
            unfuse(model, meant, RoutedExperts, on_meta=weights is not None)
            self._wrap(model, config, weights, factors, example_inputs)
        except BaseException:
            fuse(model)
            raise
        if self.left_out:
            warnings.warn(f"these layers stay dense: {self.left_out}", stacklevel=2)
        if isinstance(meant, str) and meant in PATTERNS and self.coverage.share < LARGE_SHARE:
            warnings.warn(f"target_modules={meant!r}: {self.coverage}", stacklevel=2)

    def _wrap(
        self,
        model: nn.Module,
        config: SVFConfig,
        weights: WeightReaders | None,
        factors: FactorSource | None,
        example_inputs: Mapping[str, Any] | None,
    ) -> None:
        meant = config.target_modules
        targets = select_targets(model, meant, on_meta=weights is not None)
        decomposed = DecomposedLayers(model, config, targets, weights, factors)
        self.svf_config = config
        self.z: nn.Parameter | None = None
        self.left_out = Unsuitable({n: why for n, why in unsuitable_layers(model).items() if is_meant(n, meant)})
        """Layers that `target_modules` names but that stay dense, and why."""
        self.model = model
        self.decomposed = decomposed
        self._first_pass = FirstPass()
        self.__class__ = with_signature(type(self), type(model))
        blocks = block_weights(model, meant)
        self._wrapping = VerifiedWrapping(decomposed, targets, self.left_out)
        self._wrapping.wrap(targets, example_inputs)
        self.coverage = Coverage.of(blocks, decomposed.layers)
        """The share of the blocks' weights that became factors."""

    # State

    @property
    def table_generation(self) -> int:
        """Number of times the slot table has moved, because it was full or the model went to another device.

        CUDA graphs that were captured at another generation read a table that is no longer there: capture them again.
        `SVFConfig.slots` makes room beforehand. Compiled models follow by themselves, and are compiled once more.
        """
        return self.slot_table.generation

    @property
    def factored_layers(self) -> dict[str, RoutedLinear]:
        """The decomposed layers by module name; `weight` of each has the packed factors."""
        return self.decomposed.routed

    @property
    def support(self) -> Tensor | None:
        """The positions [K] in z that experts may change, in the delta form; None in the factored form: all."""
        return self.slot_table.support

    def take_support(self, positions: Tensor) -> None:
        """Turns a model of the factored form into one of the delta form with this support (`SVFConfig.support`).

        Weights are packed anew, matrix by matrix. The experts stay; no request may be running. So a support may be
        chosen by what the factored form shows, its gradients or experts that were trained in it.

        Args:
            positions: in z, int64 [K], increasing.

        Raises:
            ValueError: a model of the delta form, an expert in training, or experts that change other components.
        """
        self._check_wrapped()
        if self.support is not None or self.z is not None:
            found = "an expert in training" if self.z is not None else "one of the delta form"
            raise ValueError(f"take_support: expected a model of the factored form, got {found}")
        self.decomposed.take_support(positions)
        self.svf_config = self.decomposed.config

    @property
    def weight_keys(self) -> dict[str, str]:
        """The key of each decomposed weight in the factor cache, by module name."""
        return {name: layer.key for name, layer in self.decomposed.layers.items()}

    def extra_repr(self) -> str:
        text = f"matrices={len(self.layout.names)}, R={self.layout.R}, experts={len(self.bank)}"
        if self.support is not None:
            text += f", delta form with K={len(self.support)}"
        return f"{text}, {self.coverage}" if self.coverage.share < LARGE_SHARE else text

    # Experts

    def add_expert(self, name: str, expert: Expert, *, replace: bool = False, strict: bool = True) -> None:
        """Makes an expert available to requests under `name`; safe while other requests run.

        `replace` puts it in place of the one that has the name: running requests finish with the old one.
        `strict=False` accepts an expert that was made for other weights of the same layout.
        """
        self._check_wrapped()
        self.bank.add(name, expert, replace=replace, strict=strict)

    def remove_expert(self, name: str) -> None:
        """Takes an expert away from new requests; requests that run with it finish with it."""
        self._check_wrapped()
        self.bank.remove(name)

    def route(
        self, experts: ExpertChoice | Sequence[ExpertChoice], plan: ServingPlan | None = None
    ) -> AbstractContextManager[None]:
        """Within the block, request i of a batch runs with `experts[i]`.

        A batch of B entries also serves k * B rows (beams, return sequences), each entry repeated k times in place.
        A single choice that is not a list serves every row. Where an entry is a tensor that requires grad, the
        gradient reaches it; activation checkpointing is turned on by this model's `activation_checkpointing_enable`, or
        else backward is called inside the block. Routes belong to the thread or task that entered them, and may be
        nested.

        Batches of one size that run one after the other have their slots at the same address, and all experts are rows
        of one table. So a model that was compiled, and a CUDA graph that was captured inside of a route, run with the
        experts of the route around them, until `table_generation` changes. Enter the route before the capture.

        With a `plan` (inference only) layers run in the form it chose; a ValueError says if it was made for others.

        Raises:
            RuntimeError: the block has ended, and no layer has run with its experts. The model may have run in another
                thread, where the route is not in force.
        """
        self._check_wrapped()
        return routed(self.decomposed, experts, plan)

    # Running

    def forward(self, *args: Any, experts: ExpertChoice | Sequence[ExpertChoice] = None, **kwargs: Any) -> Any:
        """The model's forward pass; `experts` as in `route`, one entry per row of the batch.

        Without `experts` an enclosing `route` stays in force, and outside one the base model answers.
        """
        if experts is None:
            self._check_wrapped()
            if torch.compiler.is_dynamo_compiling():
                return self.model(*args, **kwargs)
            self.decomposed.refresh()
            with self.router.held():
                return self.model(*args, **kwargs)
        check_count(experts, args, kwargs)
        self.decomposed.refresh()
        if not self._wrapping.verified and len(as_choices(experts)) > 1:
            self._wrapping.verify_call(args, kwargs)
        with self.route(experts):
            return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        experts: ExpertChoice | Sequence[ExpertChoice] = None,
        plan: ServingPlan | None = None,
        adapt: Strategy | str | None = None,
        prompts: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's `generate`, each request with its own expert; `experts` as in `route`, one entry per prompt.

        With `adapt` a first pass chooses the experts (`t2.adaptation`): a strategy, or the name of one that
        `set_adaptation` was given. It reads `prompts`, one for each row, or else the user's words in `input_ids`,
        without the chat template around them. `last_adaptation` tells what it chose.

        Runs in inference mode unless a cache is given or `return_dict_in_generate` asks for more than tokens: what
        streamers and processors of logits see are then inference tensors.

        `plan`: one that `plan()` made for these experts.
        """
        self._check_wrapped()
        generate = getattr(self.model, "generate", None)
        if generate is None:
            raise TypeError(f"model: expected one with a generate method, got {type(self.model).__name__}")
        if adapt is not None:
            if experts is not None or plan is not None:
                raise ValueError("adapt: expected neither experts nor a plan beside it, which pass one cannot know of")
            experts = self._first_pass.run(self, adapt, prompts, args, kwargs)
        elif prompts is not None:
            raise ValueError("prompts: expected a strategy to read them, got none in adapt")
        self.decomposed.refresh()
        with ExitStack() as held:
            if experts is not None or plan is not None:
                check_count(experts, args, kwargs)
                held.enter_context(self.route(experts, plan))
            else:
                held.enter_context(self.router.held())
            if not returns_more_than_tokens(self.model, kwargs):
                kwargs = with_growing_cache(self.model, kwargs)
                held.enter_context(torch.inference_mode())
            answer = generate(*args, **kwargs)
        return answer.clone() if isinstance(answer, Tensor) and answer.is_inference() else answer

    def set_adaptation(self, strategy: Strategy) -> None:
        """Lets `generate(adapt=...)` find a strategy by its name: "prompt", "classifier", "few-shot"."""
        self._first_pass.strategies[strategy.name] = strategy

    def adaptation(self, strategy: Strategy | str) -> Strategy:
        """The strategy itself, or the one that `set_adaptation` was given under this name."""
        return self._first_pass.strategy(strategy)

    @property
    def last_adaptation(self) -> Any:
        """The choices, seconds and reasons of the last `generate(adapt=...)`."""
        return self._first_pass.last

    # Plans

    def plan(
        self,
        experts: ExpertChoice | Sequence[ExpertChoice],
        *,
        prompt_tokens: int,
        new_tokens: int,
        batch: int | None = None,
        max_weight_error: float | None = None,
        cost: CostModel | None = None,
    ) -> ServingPlan:
        """Chooses each layer's form for a `generate` call: factored, merged or delta-k (`t2kernels.planner`).

        In a model of the delta form the choice is that or merged. The model's own form is what runs without a plan: it
        alone keeps a row's bits free of the batch around it, and it alone is trained through. A plan pays where one
        expert reads long prompts or answers for long.

        Args:
            experts: as in `generate`.
            prompt_tokens: length of the padded prompts.
            new_tokens: that will be generated for each request.
            batch: rows of the batch, if `experts` is a single choice for all of them; default 1.
            max_weight_error: allows delta-k, with ||W' - what is computed|| <= max_weight_error * ||W|| in every layer
                (Frobenius norms) for every expert of the call.
            cost: a cost model; default `t2.model.serving_plan.cost_model()`, measured once per machine.
        """
        self._check_wrapped()
        return make_plan(
            self.decomposed,
            experts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            max_weight_error=max_weight_error,
            cost=cost,
        )

    def measure_plan(self, plan: ServingPlan) -> None:
        """Runs each layer in its planned form on random activations, three times for every pass, and notes the times.

        They appear in `plan.explain()` beside the predicted ones: whole phases, building included.
        """
        measure_plan(plan, self.decomposed)
