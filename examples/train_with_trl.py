"""Train an expert with TRL's GRPOTrainer: an SVFModel is a module whose one trainable parameter is z.

pip install trl
python examples/train_with_trl.py --steps 20 --output sums.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import t2
from t2 import tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--task", default="reasoning-gym:chain_sum")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("expert.safetensors"))
    given = parser.parse_args()

    model, tokenizer = t2.load(given.model)
    svf = t2.SVFModel(model)
    svf.start_training()
    task = tasks.get(given.task)
    problems = task.problems("train")
    rows = [{"prompt": list(problem.messages), "index": i} for i, problem in enumerate(problems)]

    def reward(completions: list[list[dict[str, str]]], index: list[int], **columns: object) -> list[float]:
        return task.rewards([problems[i] for i in index], [answer[0]["content"] for answer in completions])

    config = GRPOConfig(
        output_dir=f"{given.output}.trl",
        max_steps=given.steps,
        learning_rate=2e-3,
        per_device_train_batch_size=48,
        num_generations=6,
        max_completion_length=task.max_new_tokens,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        model=svf, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    svf.finish_training({"task": given.task}).save(given.output)


if __name__ == "__main__":
    main()
