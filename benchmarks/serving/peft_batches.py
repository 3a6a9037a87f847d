"""A mixed batch of 32 adapters in PEFT: the SVF method of this package beside LoRA.

    python -m benchmarks.serving.peft_batches

SmolLM2-135M-Instruct in bfloat16, 32 requests with 32 adapters by `adapter_names`, greedy, in turns. "without adapters"
is the plain model. Writes benchmarks/results/peft-batches.json.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import fixed_length
from t2.integrations.peft import SVFConfig
from t2.weights.machine import machine

MODEL, ADAPTERS = "smollm2-135m-instruct", len(QUESTIONS)
SVF: dict[str, Any] = {"factor_dtype": "bfloat16", "bf16_products": True}
CONFIGS: dict[str, Any] = {
    "SVF": lambda: SVFConfig(**SVF),
    "SVF, 64 components": lambda: SVFConfig(support=64, **SVF),
    "LoRA, r = 16": lambda: LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False),
}
PLAIN = "without adapters"


def batches_table(results: Any) -> Table:
    """Tokens a second, and ratios to LoRA and to the plain model."""
    seconds, lora = results["seconds"], list(CONFIGS)[-1]

    def ratio(name: str, other: str) -> str:
        return f"{statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True)):.2f}"

    tokens = ADAPTERS * results["new_tokens"]
    rows = [
        [name, f"{tokens / statistics.median(own):.0f}", ratio(name, lora), ratio(name, PLAIN)]
        for name, own in seconds.items()
    ]
    about = results["machine"]
    return Table(
        f"PEFT, {ADAPTERS} requests with {ADAPTERS} adapters in one `generate`, {results['new_tokens']} tokens each "
        f"(SmolLM2 in bfloat16, {about['threads']} cores of {about['processor']}, in turns, medians of "
        f"{results['rounds']}; `python -m benchmarks.serving.peft_batches`):",
        ["method", "tokens/s", "/ LoRA", "/ without adapters"],
        rows,
    )


def with_adapters(config: Any) -> Any:
    model = t2.load(MODEL, dtype=torch.bfloat16)[0]
    peft: Any = get_peft_model(model, config(), adapter_name="a0")
    for i in range(1, ADAPTERS):
        peft.add_adapter(f"a{i}", config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "svf_offset" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return peft.eval()


def main(new_tokens: int = 96, rounds: int = 2, results: Path = RESULTS / "peft-batches.json") -> None:
    """Args:
    new_tokens: For each request.
    rounds: Turns that each path takes.
    results: File for the results as JSON.
    """
    logging.set_verbosity_error()
    _, tokenizer = t2.load(MODEL)
    batch = chat_batch(tokenizer, list(QUESTIONS))
    names = [f"a{i}" for i in range(ADAPTERS)]
    models = {name: with_adapters(config) for name, config in CONFIGS.items()}
    models[PLAIN] = t2.load(MODEL, dtype=torch.bfloat16)[0]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in tqdm(range(rounds + 1), desc="turns"):  # the first one warms up
        for name, model in models.items():
            given = {} if name == PLAIN else {"adapter_names": names}
            start = time.perf_counter()
            model.generate(**batch, **given, **fixed_length(new_tokens))
            seconds[name] += [time.perf_counter() - start] if turn else []
    content = {"machine": machine(), "new_tokens": new_tokens, "rounds": rounds, "seconds": seconds}
    write_results(results, content)
    batches_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
