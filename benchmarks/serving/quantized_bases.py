"""Experts on bases that other libraries quantised: fidelity, mixed batches, a training step, tokens a second.

    python -m benchmarks.serving.quantized_bases

SmolLM2-135M-Instruct in every format whose library is installed and runs here, quantised while it is loaded or before,
as checkpoints are published (`quantized_checkpoints`). The base keeps its own kernels; experts are a correction on 64
components a matrix (the delta form). Writes benchmarks/results/quantized-bases.json.
"""

from __future__ import annotations

import json
import logging as std_logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from benchmarks.serving import quantized_checkpoints
from benchmarks.serving.fidelity import MODEL, distance, logits_of, text_windows
from t2.demo.merged_check import check_row
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import ServingPath, fixed_length, time_paths
from t2.weights.loading import ALIASES, alias_file, convert_gguf
from t2.weights.machine import machine
from t2.weights.quantized import is_quantized

SUPPORT, REQUESTS, TOKENS = 64, 8, 32


def formats(source: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    """Each format by name: transformers' config for loading `source`, or a checkpoint; made when it is called."""

    def bitsandbytes(**options: Any) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    def torchao(name: str, **options: Any) -> Any:
        import torchao.quantization
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(torchao.quantization, name)(**options))

    def quanto(weights: str) -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    def stored(name: str, inputs: dict[str, Any] | None = None, **weights: Any) -> Path:
        return quantized_checkpoints.compressed_tensors(source, folder / name, weights | {"symmetric": True}, inputs)

    by_token = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "bfloat16, not quantised": lambda: None,
        "bitsandbytes NF4": lambda: bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
        "torchao int8, weights": lambda: torchao("Int8WeightOnlyConfig"),
        "torchao int8, weights and activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "torchao float8, weights": lambda: torchao("Float8WeightOnlyConfig"),
        "quanto int4": lambda: quanto("int4"),
        "quanto int8": lambda: quanto("int8"),
        "GPTQ 4 bits": lambda: quantized_checkpoints.gptq(source, folder / "gptq"),
        "AWQ 4 bits": lambda: quantized_checkpoints.awq(source, folder / "awq"),
        "fp8, a scale a block": lambda: quantized_checkpoints.fp8(source, folder / "fp8"),
        "compressed-tensors W4A16": lambda: stored(
            "w4a16", num_bits=4, type="int", strategy="group", group_size=quantized_checkpoints.GROUP
        ),
        "compressed-tensors W8A8": lambda: stored(
            "w8a8", by_token | {"type": "int"}, num_bits=8, type="int", strategy="channel"
        ),
        "compressed-tensors fp8": lambda: stored(
            "ct-fp8", by_token | {"type": "float"}, num_bits=8, type="float", strategy="channel"
        ),
    }


def load(made: Any, source: Path) -> Any:
    options = {} if made is None or isinstance(made, Path) else {"quantization_config": made}
    folder = made if isinstance(made, Path) else source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)
    return model.eval()


def wrap(model: Any) -> t2.SVFModel:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "form": "delta", "support": SUPPORT, "progress": False}
    svf = t2.SVFModel(model, t2.SVFConfig(**options, pack_others=False))
    support = svf.support
    assert support is not None
    for seed in range(REQUESTS):
        z = torch.ones(svf.layout.R)
        z[support] += 0.1 * torch.randn(len(support), generator=torch.Generator().manual_seed(seed))
        svf.add_expert(f"e{seed}", t2.Expert(z, svf.layout))
    return svf


def train_step(svf: t2.SVFModel, windows: Tensor) -> dict[str, float]:
    """Losses before and after a step along z's gradient on a text, and seconds of forward and backward."""
    z = svf.start_training()
    ids = windows[:1, :256]

    def loss() -> Tensor:
        logits = svf(input_ids=ids).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    start = time.perf_counter()
    before = loss()
    before.backward()
    seconds = time.perf_counter() - start
    assert z.grad is not None
    with torch.no_grad():
        z -= 0.02 * z.grad.sign()
        after = float(loss())
    return {"before": float(before.detach()), "after": after, "seconds": seconds}


def measure(made: Any, source: Path, reference: Tensor, windows: Tensor, tokenizer: Any) -> dict[str, Any]:
    """The figures of one format."""
    base = load(made, source)
    layers = sum(is_quantized(module) for module in base.modules())
    own = logits_of(base, windows)
    svf = wrap(load(made, source))
    found: dict[str, Any] = {
        "quantised_layers": layers,
        "decomposed": len(svf.layout.names),
        "base": distance(reference, own, windows),
        "wrapped": distance(own, logits_of(svf, windows), windows),
    }
    batch, names = chat_batch(tokenizer, list(QUESTIONS[:REQUESTS])), [f"e{i}" for i in range(REQUESTS)]
    generated = svf.generate(
        **batch, experts=names, **fixed_length(TOKENS), return_dict_in_generate=True, output_logits=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checks = [check_row(svf.merged_copy(name), batch, generated, row, name) for row, name in enumerate(names[:4])]
    found["merged"] = {
        "equal": sum(c.equal for c in checks),
        "passed": sum(c.passed for c in checks),
        "of": len(checks),
    }
    paths = [
        ServingPath("base", 0, lambda n, **kw: base.generate(**kw), 3),
        ServingPath("experts", REQUESTS, lambda n, **kw: svf.generate(experts=names[:n], **kw), 3),
    ]
    found["seconds"] = {each.name: each.seconds for each in time_paths(paths, batch, TOKENS)}
    found["step"] = train_step(svf, windows)
    return found


def bases_table(results: Any) -> Table:
    """Every format: its own drift, equality at z = 1, mixed batches, a step, and speed beside the base alone."""
    rows = []
    for name, found in results["formats"].items():
        if "failed" in found:
            rows.append([name, found["failed"], "", "", "", "", ""])
            continue
        base, experts = found["seconds"]["base"], found["seconds"]["experts"]
        ratio = statistics.median(b / e for b, e in zip(base, experts, strict=True))
        step, merged = found["step"], found["merged"]
        rows.append(
            [
                name,
                f"{found['decomposed']} of {max(found['quantised_layers'], found['decomposed'])}",
                f"{found['base']['mean_kl']:.1e}",
                f"{found['wrapped']['mean_kl']:.1e}",
                f"{merged['passed']} of {merged['of']}",
                f"{step['before']:.3f}, {step['after']:.3f}; {step['seconds']:.1f} s",
                f"{REQUESTS * TOKENS / statistics.median(experts):.0f}, {ratio:.2f}",
            ]
        )
    about = results["machine"]
    return Table(
        f"SmolLM2-135M-Instruct as other libraries quantise it, experts on {SUPPORT} components a matrix, {REQUESTS} "
        f"requests with as many experts, {about['threads']} cores of {about['processor']} "
        "(`python -m benchmarks.serving.quantized_bases`):",
        [
            "base",
            "layers",
            "its mean KL to float32",
            "wrapped, z = 1: mean KL to it",
            "rows as merged, or at ties",
            "loss before and after a step of z",
            "tokens/s, / base alone",
        ],
        rows,
    )


def main(only: tuple[str, ...] = (), results: Path = RESULTS / "quantized-bases.json") -> None:
    """Args:
    only: Measure formats whose names begin so, and keep the other results.
    results: File for the results as JSON.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    std_logging.getLogger("bitsandbytes").setLevel(std_logging.ERROR)
    out = Console()
    model, tokenizer = t2.load(MODEL)
    windows = text_windows(tokenizer, 1024)
    reference = logits_of(model, windows)
    found: dict[str, Any] = {}
    if only and results.exists():
        found = json.loads(results.read_text())["formats"]
    file = alias_file(ALIASES[MODEL])
    assert file is not None
    source = convert_gguf(file)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in formats(source, Path(folder)).items():
            if only and not name.startswith(only):
                continue
            try:
                found[name] = measure(make(), source, reference, windows, tokenizer)
            except (ImportError, NotImplementedError) as error:
                found[name] = {"failed": str(error).splitlines()[0][:80]}
            content = {"machine": machine(), "formats": found}
            write_results(results, content)
            out.print(f"{name} measured")
    bases_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
