"""Tokens from logits."""

from __future__ import annotations

import pytest
import torch

from t2.generation.sampling import likeliest_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1031, 4096])
def test_the_likeliest_token_is_the_first_of_the_largest(size, dtype):
    for rows in (0, 1, 5):
        logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).to(dtype)
        assert torch.equal(likeliest_tokens(logits), logits.float().argmax(-1))
        assert torch.equal(likeliest_tokens(torch.zeros(rows, size, dtype=dtype)), torch.zeros(rows, dtype=torch.int64))
        ties = (logits * 2).round()  # many equal ones
        first = (ties == ties.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
        assert torch.equal(likeliest_tokens(ties), first)


def test_what_is_ruled_out_and_what_is_no_number():
    logits = torch.full((3, 600), -torch.inf)
    logits[0, 599], logits[1, 300], logits[2, 4] = -5.0, 2.0, torch.nan
    assert likeliest_tokens(logits).tolist() == [599, 300, 4]
