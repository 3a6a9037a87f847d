"""Train an expert with transformers' Trainer: an SVFModel is a module whose one trainable parameter is z.

    python examples/train_with_trainer.py --task reasoning-gym:chain_sum --output sums.safetensors

TRL's SFTTrainer takes the model in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

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

    def row(problem: tasks.Problem) -> dict[str, list[int]]:
        text, plain = tasks.prompt_text(problem, tokenizer), tokenizer.chat_template is None
        prompt = tokenizer(text, add_special_tokens=plain)["input_ids"]  # a template writes its special tokens itself
        answer = [*tokenizer(problem.solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = [*prompt, *answer]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}

    arguments = TrainingArguments(
        output_dir=f"{given.output}.trainer",
        max_steps=given.steps,
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=svf,
        args=arguments,
        train_dataset=[row(problem) for problem in tasks.get(given.task).problems("train") if problem.solution],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    svf.finish_training({"task": given.task}).save(given.output)


if __name__ == "__main__":
    main()
