"""transformers' Trainer and TRL's trainers train an SVFModel as they train any module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import t2
from tests.t2.toy import TARGETS, toy_model, toy_tokenizer

IDS = torch.tensor([[4, 5, 5, 2], [4, 4, 6, 6]])


@pytest.fixture
def svf() -> t2.SVFModel:
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    svf.start_training()
    return svf


def rows() -> list[dict[str, Any]]:
    tokenizer = toy_tokenizer()
    encoded = [tokenizer(f"say {word} {word} </s>", add_special_tokens=False)["input_ids"] for word in TARGETS]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, -100, *ids[2:]]} for ids in encoded]


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 15,
        "learning_rate": 3e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def check(svf: t2.SVFModel, before: dict[str, torch.Tensor]) -> None:
    """Only z has moved, and what was learnt is an expert that serves."""
    assert all(torch.equal(tensor, before[name]) for name, tensor in svf.model.state_dict().items())
    with torch.no_grad():
        training = svf(input_ids=IDS).logits
    expert = svf.finish_training()
    assert (expert.z - 1).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(svf(input_ids=IDS, experts=expert).logits, training)
        assert (svf(input_ids=IDS).logits - training).abs().max() > 1e-3


def test_trainer(svf: t2.SVFModel, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in svf.model.state_dict().items()}
    options = TrainingArguments(**arguments(tmp_path), remove_unused_columns=False)
    trainer = Trainer(
        model=svf, args=options, train_dataset=rows(), data_collator=DataCollatorForSeq2Seq(toy_tokenizer())
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    check(svf, before)


def test_trainer_with_checkpointing_gives_the_same_expert(tmp_path: Path):
    experts = []
    for checkpointing in (False, True):
        svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
        svf.start_training()
        options = TrainingArguments(
            **arguments(tmp_path) | {"max_steps": 4, "learning_rate": 0.1, "optim": "sgd"},
            remove_unused_columns=False,
            gradient_checkpointing=checkpointing,
        )
        collate = DataCollatorForSeq2Seq(toy_tokenizer())
        Trainer(model=svf, args=options, train_dataset=rows(), data_collator=collate).train()
        experts.append(svf.finish_training().z)
    assert (experts[0] - 1).abs().max() > 0.01
    torch.testing.assert_close(experts[1], experts[0], atol=1e-4, rtol=0)


def test_sft_trainer(svf: t2.SVFModel, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in svf.model.state_dict().items()}
    data = Dataset.from_list([{"prompt": f"say {word} ", "completion": f"{word} </s>"} for word in TARGETS])
    options = SFTConfig(**arguments(tmp_path), bf16=False, gradient_checkpointing=False)
    trainer = SFTTrainer(model=svf, args=options, train_dataset=data, processing_class=toy_tokenizer())
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    check(svf, before)


def test_grpo_trainer(svf: t2.SVFModel, tmp_path: Path):
    before = {name: tensor.clone() for name, tensor in svf.model.state_dict().items()}
    data = Dataset.from_list([{"prompt": f"say {word}", "word": word} for word in TARGETS * 4])

    def reward(completions: list[str], word: list[str], **columns: Any) -> list[float]:
        return [1.0 if c.split()[:1] == [w] else -1.0 for c, w in zip(completions, word, strict=True)]

    options = GRPOConfig(
        **arguments(tmp_path) | {"per_device_train_batch_size": 16, "max_steps": 12, "learning_rate": 5e-2},
        num_generations=8,
        max_completion_length=2,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(
        model=svf, reward_funcs=reward, args=options, train_dataset=data, processing_class=toy_tokenizer()
    )
    trainer.train()
    rewards = losses(trainer, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4
    check(svf, before)


def test_an_expert_in_training_is_the_default_and_only_one(svf: t2.SVFModel):
    assert [name for name, p in svf.named_parameters() if p.requires_grad] == ["z"]
    with torch.no_grad():
        svf.z.mul_(1.2)
    mine, base = svf(input_ids=IDS).logits, svf(input_ids=IDS, experts=[None, None]).logits
    assert mine.requires_grad and not base.requires_grad and (mine - base).abs().max() > 0.01
    with svf.route(None):
        assert torch.equal(svf(input_ids=IDS).logits, base)
    with pytest.raises(RuntimeError, match="in training already"):
        svf.start_training()
    svf.finish_training()
    with pytest.raises(RuntimeError, match="no expert is in training"):
        svf.finish_training()
    with pytest.raises(ValueError, match="use_reentrant: expected False, got True"):
        svf.gradient_checkpointing_enable({"use_reentrant": True})


def test_training_can_start_from_an_expert(svf: t2.SVFModel):
    svf.finish_training()
    start = t2.Expert.random(svf.layout)
    svf.start_training(start)
    assert torch.equal(svf.finish_training({"note": "as it was"}).z, start.z)
