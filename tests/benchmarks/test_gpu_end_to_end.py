"""The whole-model GPU benchmarks in tiny sizes on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import end_to_end, peft_mixed_batch, rl_step
from benchmarks.gpu.end_to_end import SMOKE, Decoder, dense_model, llama_config, make_subject

CPU = torch.device("cpu")


class Store(dict[str, Any]):
    def once(self, name: str, measure: Callable[[], dict[str, Any]], /) -> dict[str, Any]:
        if name not in self:
            self[name] = measure()
        found: dict[str, Any] = self[name]
        return found


def test_all_figures_are_stored() -> None:
    found = Store()
    end_to_end.measure(found, CPU, smoke=True)
    for title in ("dense bf16", "ours int8", "ours bf16"):
        for case in ("model", "decode 3", "decode 1", "eager 1", "prefill 12"):
            assert f"end to end | {case} | {title}" in found
    for name, figure in found.items():
        assert figure.get("finite", True), name
        assert figure.get("replay_against_eager", {"equal": True})["equal"], name
    assert found["end to end | decode 3 | gathered LoRA"]["seconds"] > 0


@pytest.mark.parametrize("path", ["int8", "bf16"])
def test_a_replay_follows_a_change_of_experts(path: str) -> None:
    found = Store()
    end_to_end.measure(found, CPU, smoke=True, paths=[path])
    for rows in SMOKE.rows:
        figure = found[f"end to end | decode {rows} | ours {path}"]
        assert figure["other_experts"]["equal"]
        assert figure["change_by_experts"] > 1e-3


def test_a_path_in_its_own_process() -> None:
    found = Store()
    end_to_end.measure(found, CPU, smoke=True, paths=["dense"], own_processes=True)
    assert found["end to end | decode 3 | dense bf16"]["seconds"] > 0
    assert not any("failed" in name or "error" in figure for name, figure in found.items())


def test_an_unknown_path_is_an_error() -> None:
    with pytest.raises(ValueError, match="paths: expected some of dense"):
        end_to_end.measure(Store(), CPU, smoke=True, paths=["int4"])


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["dense", "int8", "lora"])
def test_a_decode_step_can_be_captured(path: str) -> None:
    """Nothing in it is read by the host or copied from it."""
    config = llama_config(smoke=True)
    subject = make_subject(path, config, CPU, SMOKE)
    with subject.serving(3), Recorder() as recorder:
        decoder = Decoder(subject.model, config, CPU, 3, SMOKE)
        recorder.names.clear()
        decoder.step()
    host = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh", "_to_cpu", "masked_select"}
    assert recorder.names and not recorder.names & host


def test_attention_is_that_of_sdpa() -> None:
    config = llama_config(smoke=True)
    with torch.no_grad():
        ids = torch.arange(10)[None] + 3
        logits = [dense_model(config, CPU, name)(ids).logits for name in (end_to_end.ATTENTION, "sdpa")]
        torch.testing.assert_close(*logits, atol=0.02, rtol=0.0)
        steps = [
            Decoder(dense_model(config, CPU, name), config, CPU, 3, SMOKE) for name in (end_to_end.ATTENTION, "sdpa")
        ]
        for _ in range(3):
            first, second = (decoder.step() for decoder in steps)
            torch.testing.assert_close(first, second, atol=0.02, rtol=0.0)


def test_positions_advance_and_reset() -> None:
    config = llama_config(smoke=True)
    decoder = Decoder(dense_model(config, CPU), config, CPU, 2, SMOKE)
    first = decoder.step().clone()
    assert int(decoder.position) == SMOKE.filled + 1 == int(decoder.cache.layers[0].cumulative_length)
    decoder.step()
    decoder.reset()
    assert torch.equal(decoder.step(), first)


def test_a_step_of_reinforce() -> None:
    found = Store()
    rl_step.measure(found, CPU, smoke=True)
    figure = found["rl step"]
    assert figure["gradient_norm"] > 0
    assert set(figure["bytes"]) <= set(figure["planned_bytes"])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_peft_runs_an_adapter_for_each_row() -> None:
    found = Store()
    peft_mixed_batch.measure(found, CPU, smoke=True)
    assert {name.rpartition(" | ")[2] for name in found} == {"dense bf16", "ours bf16", "PEFT mixed"}
    config = llama_config(smoke=True)
    subject = peft_mixed_batch.PeftMixed(config, CPU, 3)
    decoder = Decoder(subject.model, config, CPU, 3, SMOKE)
    with subject.serving(3):
        first = decoder.step().clone()
    decoder.reset()
    with subject.serving(3, shift=1):
        assert not torch.equal(decoder.step(), first)
