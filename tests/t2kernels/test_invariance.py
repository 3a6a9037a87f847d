"""A row's bits depend on its own x, its own scales and the factors: nothing else."""

from __future__ import annotations

import pytest
import torch

import t2kernels
from t2kernels import DenseWeight, FactoredWeight
from tests.t2kernels.conftest import HARDWARE_DOTS, INSTRUCTION_SETS
from tests.t2kernels.problems import DENSE_STORAGE, STORAGE, problem

SHAPE = (577, 300, 1031)


@pytest.mark.parametrize("bf16_products", [False, True])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_batch_size_position_neighbours_and_threads(instruction_set, threads, storage, bf16_products):
    if bf16_products and (instruction_set not in HARDWARE_DOTS or storage != torch.bfloat16):
        pytest.skip("nothing that this changes")
    p = problem(SHAPE, 257, experts=11)
    w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage, bf16_products=bf16_products)
    threads(1)
    alone = torch.cat([w.linear(p.x[i : i + 1], p.scales, p.ids[i : i + 1], p.bias) for i in range(257)])
    sizes = range(1, 258) if instruction_set != "portable" else (1, 2, 3, 4, 5, 8, 9, 64, 257)
    for size in sizes:
        threads(1 + size % 2)
        begin = (size * 37) % (258 - size)
        rows = torch.arange(begin, begin + size)
        assert torch.equal(w.linear(p.x[rows], p.scales, p.ids[rows], p.bias), alone[rows]), size
    for count in (1, 2, 3, 4):
        threads(count)
        order = torch.randperm(257, generator=torch.Generator().manual_seed(count))
        assert torch.equal(w.linear(p.x[order], p.scales, p.ids[order], p.bias), alone[order])
        neighbours = torch.randn(257, SHAPE[2]) * 100
        neighbours[100] = p.x[100]
        ids = torch.randint(0, 11, (257,))
        ids[100] = p.ids[100]
        assert torch.equal(w.linear(neighbours, p.scales, ids, p.bias)[100], alone[100])


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_dense_weights_and_sequences(instruction_set, threads, storage):
    w = DenseWeight.pack(torch.randn(300, 577), dtype=storage)
    x = torch.randn(257, 577)
    alone = torch.cat([w.linear(row) for row in x.split(1)])
    for size in (2, 5, 6, 7, 12, 13, 24, 25, 100, 256, 257):
        threads(1 + size % 2)
        assert torch.equal(w.linear(x[:size]), alone[:size])
    p = problem((40, 40, 577), 257)
    f = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
    prefill = f.linear(x[:255].reshape(5, 51, 577), p.scales, torch.arange(5))
    decode = torch.stack([f.linear(x[i::51][:5], p.scales, torch.arange(5)) for i in range(51)], dim=1)
    assert torch.equal(prefill, decode)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_do_not_depend_on_threads(instruction_set, threads, storage):
    p = problem(SHAPE, 77)
    w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage, bf16_products=True)
    results = []
    for count in (1, 2, 3):
        threads(count)
        x, scales = p.x.clone().requires_grad_(), p.scales.clone().requires_grad_()
        w.linear(x, scales, p.ids).square().sum().backward()
        results.append((x.grad, scales.grad))
    for x_grad, scales_grad in results[1:]:
        assert torch.equal(x_grad, results[0][0]) and torch.equal(scales_grad, results[0][1])


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
def test_a_gradients_row_does_not_depend_on_its_batch(instruction_set, storage):
    w = DenseWeight.pack(torch.randn(300, 577), dtype=storage, bf16_products=True)
    x, g = torch.randn(257, 577), torch.randn(257, 300)

    def gradient(rows):
        own = x[rows].requires_grad_()
        return torch.autograd.grad(w.linear(own), own, g[rows])[0]

    alone = torch.cat([gradient(slice(row, row + 1)) for row in range(257)])
    for size in (2, 7, 12, 13, 16, 17, 32, 33, 100, 257):
        assert torch.equal(gradient(slice(257 - size, 257)), alone[257 - size :])


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 3, reason="needs a processor with two sets of vector instructions")
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_vector_sets_agree_to_the_bit(storage):
    p = problem(SHAPE, 65)
    w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
    before, results = t2kernels.build_info()["chosen"], {}
    for isa in INSTRUCTION_SETS[1:]:
        t2kernels.select_instruction_set(isa)
        results[isa] = w.linear(p.x, p.scales, p.ids, p.bias)
    t2kernels.select_instruction_set(before)
    first = results[INSTRUCTION_SETS[1]]
    assert all(torch.equal(first, result) for result in results.values())
