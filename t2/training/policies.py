"""Policies behind one interface: an SVF expert, PEFT's LoRA, or SVF the published way.

The loop in `t2.training.trainer` knows parameters, and four ways to run the model: with them and their gradient, with
them for answers alone, as the base, and the end of a step's gradients. Everything else about a method is here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from t2.experts.expert import Expert
from t2.experts.layout import Layout, layout_of
from t2.experts.support import check_positions
from t2.model.config import SVFConfig
from t2.model.layers import PackedLinear
from t2.model.svf_model import SVFModel
from t2.training.checkpoint import Base
from t2.training.options import TrainOptions
from t2.training.parametrisation import initial_parameters, z_from
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.files import atomic_directory, content_digest
from t2.weights.targets import plain_targets, select_targets, weight_matrix
from t2kernels.files import write_text


class Policy(ABC):
    """A model with few trainable parameters.

    `model` is called with input ids and the like; `parameters` are the leaves that the optimiser moves.
    """

    model: nn.Module
    parameters: list[Tensor]
    identity: Base
    """Identity of the model around the parameters: a run goes on with its own base alone."""

    @property
    @abstractmethod
    def transformer(self) -> PreTrainedModel:
        """The transformers model that runs at the moment."""

    @abstractmethod
    def learning(self) -> AbstractContextManager[None]:
        """Within the block the model runs with the parameters, and a backward pass reaches them."""

    @abstractmethod
    def acting(self, prompt_tokens: int, new_tokens: int, rows: int) -> AbstractContextManager[None]:
        """Within the block the model runs with the parameters as they are, without gradient, for a phase so long:
        tokens that are read and written for each of its rows."""

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Within the block the model runs as the base."""

    def enable_checkpointing(self) -> None:
        """Activations are computed again in the backward pass, which transformers does in training mode alone: the
        update puts the model in that mode, without dropout."""
        model: Any = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        for module in self.transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                setattr(module, "attention_dropout", 0.0)  # noqa: B010  # nn.Module declares tensors and modules alone

    def finish_gradients(self) -> None:  # noqa: B027  # most methods have nothing left to do
        """After the backward passes of a step, before its gradients are used."""

    @abstractmethod
    def save(self, path: Path, metadata: Mapping[str, str]) -> Path:
        """Writes what was learnt to `path` with the method's own suffix, and returns that file or folder."""

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def load_parameters(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)


class ExpertPolicy(Policy):
    """A policy whose parameters are one vector, from which z comes: [R], or [K] on a support.

    sigma: singular values [R], on the model's device.
    """

    def __init__(self, options: TrainOptions, layout: Layout, sigma: Tensor) -> None:
        self.kind, self.layout, self.sigma = options.parametrisation, layout, sigma
        self.support: Tensor | None = None
        """Positions [K] in z that are trained, once `restrict` has set them."""
        self.parameters = [starting_point(options, layout).to(sigma.device).requires_grad_()]

    def restrict(self, support: Tensor) -> None:
        """Trains z at these positions [K] alone, with z = 1 at all others.

        Raises:
            ValueError: the expert that training starts from differs from the base at others.
        """
        (start,) = self.parameters
        self.support = check_positions("support", support, self.layout.R).to(start.device)
        outside = start.detach().clone()
        outside[self.support] = 1.0
        if moved := int((outside != 1).sum()):
            raise ValueError(
                f"start: expected an expert with z = 1 off the support, got {moved} components that differ"
            )
        self.parameters = [start.detach()[self.support].clone().requires_grad_()]

    def z(self) -> Tensor:
        (parameters,) = self.parameters
        if self.support is not None:
            parameters = torch.ones_like(self.sigma).index_copy(0, self.support, parameters)
        return z_from(self.kind, parameters, self.sigma, self.layout)

    def save(self, path: Path, metadata: Mapping[str, str]) -> Path:
        path = path.with_suffix(".safetensors")
        Expert(self.z(), self.layout, metadata).save(path)
        return path


class SVFPolicy(ExpertPolicy):
    """An expert on the fused ops: no weight and no gradient of a weight's size exists."""

    def __init__(
        self, model: PreTrainedModel | SVFModel, options: TrainOptions, mesh: DeviceMesh | None = None
    ) -> None:
        config = svf_config(options, mesh)
        if isinstance(model, SVFModel):
            for name in ("target_modules", "dtype", "bf16_products", "shard"):
                wanted, found = getattr(config, name), getattr(model.svf_config, name)
                if wanted != found:
                    raise ValueError(f"model: expected one wrapped with {name} {wanted!r}, got {found!r}")
        self.svf = model if isinstance(model, SVFModel) else SVFModel(model, config)
        self.svf.requires_grad_(False)
        self.model = self.svf
        self.identity = base_identity(self.transformer, self.svf.layout.fingerprint)
        super().__init__(options, self.svf.layout, self.svf.sigma)

    def restrict(self, support: Tensor) -> None:
        """The model takes the delta form: what is not trained is W alone."""
        super().restrict(support)
        self.svf.take_support(support)

    @property
    def transformer(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.svf.model)

    def learning(self) -> AbstractContextManager[None]:
        return self.svf.route(self.z())

    @contextmanager
    def acting(self, prompt_tokens: int, new_tokens: int, rows: int) -> Iterator[None]:
        """In the form that the planner finds fastest: merged weights pay when one policy answers many prompts."""
        z = self.z().detach()
        plan = None
        if self.sigma.device.type == "cpu" and self.svf.svf_config.shard is None:  # the cost model is the processor's
            plan = self.svf.plan(z, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=rows)
            plan = plan if set(plan.plan.forms()) != {"factored"} else None
        with self.svf.route(z, plan):
            yield

    def base(self) -> AbstractContextManager[None]:
        return self.svf.route(None)


class LoRAPolicy(Policy):
    """PEFT's LoRA on the same layers."""

    def __init__(self, model: PreTrainedModel, options: TrainOptions) -> None:
        from peft import LoraConfig, get_peft_model

        self.identity = base_identity(model)
        names = list(select_targets(model, target_modules(options)))
        config = LoraConfig(
            r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules=names, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.peft: Any = get_peft_model(model, config).eval()
        self.model = self.peft
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def transformer(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.peft.get_base_model())

    def learning(self) -> AbstractContextManager[None]:
        return nullcontext()

    def acting(self, prompt_tokens: int, new_tokens: int, rows: int) -> AbstractContextManager[None]:
        return nullcontext()

    def base(self) -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], self.peft.disable_adapter())

    def save(self, path: Path, metadata: Mapping[str, str]) -> Path:
        shutil.rmtree(path, ignore_errors=True)
        with atomic_directory(path) as temporary:
            self.peft.save_pretrained(temporary)
            write_text(temporary / "metadata.json", json.dumps(dict(metadata), indent=1) + "\n")
        return path


class DenseComposePolicy(ExpertPolicy):
    """SVF the published way: every step builds all W' = U diag(sigma z) Vh, autograd makes a full dW', and that is
    projected to z. The KL needs a second, untouched model. The reference for speed, memory and gradients.
    """

    def __init__(self, model: PreTrainedModel, options: TrainOptions) -> None:
        self.identity = base_identity(model)
        targets = plain_targets(model, target_modules(options))
        weights = {name: weight_matrix(layer) for name, layer in targets.items()}
        cache = FactorCache()
        done = decompose_weights(weights, cache)
        layout = layout_of(model, weights, {name: entry.key for name, entry in done.items()})
        device = next(iter(weights.values())).device
        self.factors = {
            name: [f.to(device) for f in cache.load_or_redo(entry.key, weights[name])] for name, entry in done.items()
        }
        super().__init__(options, layout, torch.cat([s for _, s, _ in self.factors.values()]))
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self._policy = model.requires_grad_(False)
        self._targets = targets
        self._composed: list[Tensor] = []
        self._running = self._policy
        self.model = _Switch(self)

    @property
    def transformer(self) -> PreTrainedModel:
        return self._running

    def _compose(self) -> None:
        z = self.z()
        self._composed = []
        for name, (u, s, vh) in self.factors.items():
            composed = (u * (s * z[self.layout.window(name)])) @ vh
            layer = self._targets[name]
            layer.weight.data = (composed if isinstance(layer, nn.Linear) else composed.T).detach().to(layer.weight)
            self._composed.append(composed if isinstance(layer, nn.Linear) else composed.T)

    @contextmanager
    def learning(self) -> Iterator[None]:
        if not self._composed:
            self._compose()
            for layer in self._targets.values():
                layer.weight.requires_grad_()
        yield

    def finish_gradients(self) -> None:
        if not self._composed:  # nothing was learnt from in this step
            return
        layers = list(self._targets.values())
        reached = [(w, layer.weight.grad) for w, layer in zip(self._composed, layers, strict=True)]
        reached = [(w, grad) for w, grad in reached if grad is not None]
        if reached:
            torch.autograd.backward(*zip(*reached, strict=True))
        for layer in layers:
            layer.weight.grad = None
            layer.weight.requires_grad_(False)
        self._composed = []

    def acting(self, prompt_tokens: int, new_tokens: int, rows: int) -> AbstractContextManager[None]:
        with torch.no_grad():
            self._compose()
        self._composed = []
        return nullcontext()

    @contextmanager
    def base(self) -> Iterator[None]:
        self._running = self.reference
        try:
            yield
        finally:
            self._running = self._policy


class _Switch(nn.Module):
    """Stands for the model that runs at the moment: the composed one or the untouched one."""

    def __init__(self, policy: DenseComposePolicy) -> None:
        super().__init__()
        self.__dict__["policy"] = policy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.policy._running(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["policy"]._running, name)


def base_identity(model: PreTrainedModel, decomposed: str = "") -> Base:
    """The identity of a base by all of its weights and persistent buffers, names and dtypes among them.

    `decomposed`: fingerprint of the weights that `SVFModel` took out of the model. All others are read once, at about
    the speed of memory.
    """
    digest, contents = hashlib.sha256(decomposed.encode()), dict[int, tuple[str, Tensor]]()
    for name, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        buffers = {part: buffer for part, buffer in module._buffers.items() if part not in passing}
        held: dict[str, Tensor | None] = {**module._parameters, **buffers}
        if isinstance(module, PackedLinear):
            held["weight"] = module.weight
        for part, tensor in sorted(held.items()):
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if tensor is not None and not tensor.is_meta:
                if id(tensor) not in contents:  # tied weights are read once
                    contents[id(tensor)] = content_digest(tensor), tensor
                content, _ = contents[id(tensor)]
                digest.update(f"{name}.{part} {tensor.dtype} {tuple(tensor.shape)} {content}\n".encode())
    return Base(str(getattr(model, "name_or_path", "")), str(model.dtype).removeprefix("torch."), digest.hexdigest())


def target_modules(options: TrainOptions) -> str | list[str]:
    """Target modules in the form of `SVFConfig.target_modules`."""
    return options.target_modules[0] if len(options.target_modules) == 1 else list(options.target_modules)


def svf_config(options: TrainOptions, mesh: DeviceMesh | None = None) -> SVFConfig:
    """The `SVFConfig` of these options, for a model that is divided over `mesh`."""
    return SVFConfig(
        target_modules=target_modules(options),
        dtype=getattr(torch, options.factor_dtype),
        bf16_products=options.bf16_products,
        shard=mesh,
    )


def starting_point(options: TrainOptions, layout: Layout) -> Tensor:
    """The parameters [R] that training begins with: the base's, or those of the expert in `options.start`.

    Raises:
        FileNotFoundError, FileFormatError: the expert cannot be read. ValueError: it is another base's.
    """
    if options.start is None:
        return initial_parameters(options.parametrisation, layout)
    expert = Expert.load(options.start)
    layout.check_same(expert.layout, "start", same_base=True)
    return expert.z.clone()


def make_policy(model: PreTrainedModel | SVFModel, options: TrainOptions, mesh: DeviceMesh | None = None) -> Policy:
    """The policy of the options' method around a model from `t2.load`, which it changes in place.

    The svf method also takes a model that is wrapped as `svf_config` says, such as one of `t2.load_factored`, and can
    divide the model over the processes of a mesh.
    """
    if isinstance(model, SVFModel) and options.method != "svf":
        raise ValueError(f"model: expected a plain model for the method {options.method}, got a wrapped one")
    if options.method == "svf":
        return SVFPolicy(model, options, mesh)
    assert not isinstance(model, SVFModel)
    return LoRAPolicy(model, options) if options.method == "lora" else DenseComposePolicy(model, options)
