"""transformers' Trainer and TRL's trainers with `peft_config=SVFConfig(...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import t2
from t2.integrations.peft import SVFConfig, expert_of
from tests.t2.toy import TARGETS, toy_model, toy_tokenizer
from tests.t2.training.test_other_trainers import IDS, arguments, losses, rows


def config(**options: Any) -> SVFConfig:
    return SVFConfig(cache=False, task_type="CAUSAL_LM", **options)


def check(peft: Any) -> None:
    """The base is as it was, and what was learnt is an expert that serves."""
    with torch.no_grad():
        learnt = peft.eval()(input_ids=IDS).logits
        expert = expert_of(peft)
        assert (expert.z - 1).abs().max() > 0.01
        svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False, cache=False))
        torch.testing.assert_close(svf(input_ids=IDS, experts=expert).logits, learnt, atol=1e-4, rtol=1e-4)
    for one, two in zip(peft.unload().parameters(), toy_model().parameters(), strict=True):
        assert torch.equal(one, two)


def reward(completions: list[str], word: list[str], **columns: Any) -> list[float]:
    return [1.0 if c.split()[:1] == [w] else -1.0 for c, w in zip(completions, word, strict=True)]


@pytest.mark.parametrize("support", [None, 6])
def test_trainer(tmp_path: Path, support: int | None):
    peft = get_peft_model(toy_model(), config(support=support))
    options = TrainingArguments(**arguments(tmp_path), remove_unused_columns=False)
    collate = DataCollatorForSeq2Seq(toy_tokenizer())
    trainer = Trainer(model=peft, args=options, train_dataset=rows(), data_collator=collate)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    check(peft)


def test_sft_saves_what_from_pretrained_loads(tmp_path: Path):
    data = Dataset.from_list([{"prompt": f"say {word} ", "completion": f"{word} </s>"} for word in TARGETS])
    options = SFTConfig(**arguments(tmp_path), bf16=False)  # with gradient checkpointing, its default
    trainer = SFTTrainer(
        model=toy_model(), args=options, train_dataset=data, processing_class=toy_tokenizer(), peft_config=config()
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        again = PeftModel.from_pretrained(toy_model(), tmp_path / "saved")
        trained = trainer.model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(again(input_ids=IDS).logits, trained, atol=1e-5, rtol=1e-5)
    check(trainer.model)


@pytest.mark.parametrize(("kind", "options"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_on_rewards(tmp_path: Path, kind: Any, options: Any):
    """beta above 0: the base for the KL is the same model with its adapter off."""
    data = Dataset.from_list([{"prompt": f"say {word}", "word": word} for word in TARGETS * 4])
    given = options(
        **arguments(tmp_path) | {"per_device_train_batch_size": 16, "max_steps": 12, "learning_rate": 5e-2},
        num_generations=8,
        max_completion_length=2,
        bf16=False,
        beta=0.01,
    )
    trainer = kind(
        model=toy_model(),
        reward_funcs=reward,
        args=given,
        train_dataset=data,
        processing_class=toy_tokenizer(),
        peft_config=config(),
    )
    trainer.train()
    rewards = losses(trainer, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4
    check(trainer.model)


def test_dpo(tmp_path: Path):
    other = {word: TARGETS[(i + 1) % len(TARGETS)] for i, word in enumerate(TARGETS)}
    data = Dataset.from_list(
        [{"prompt": f"say {word} ", "chosen": f"{word} </s>", "rejected": f"{other[word]} </s>"} for word in TARGETS]
    )
    options = DPOConfig(**arguments(tmp_path), bf16=False)
    trainer = DPOTrainer(
        model=toy_model(), args=options, train_dataset=data, processing_class=toy_tokenizer(), peft_config=config()
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    check(trainer.model)
