from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from t2kernels import DenseWeight, FactoredWeight, SVFLinear, linear_group, svf_linear
from t2kernels.weights import float16_rank
from tests.t2kernels.problems import STORAGE, problem


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(30, 20), (7, 33), (1, 1), (16, 1)])
def test_starts_as_the_layer_it_came_from(size, bias):
    linear = nn.Linear(*size, bias=bias)
    layer = SVFLinear.from_linear(linear)
    x = torch.randn(5, size[0])
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-4)
    assert [name for name, _ in layer.named_parameters()] == ["z"]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_trains_alone(storage):
    torch.manual_seed(0)
    linear = nn.Linear(24, 16)
    teacher = SVFLinear.from_linear(linear, dtype=storage)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher.z.add_(0.3 * torch.randn_like(teacher.z))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    x = torch.randn(256, 24)
    target = teacher(x).detach()
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(student(x), target).backward()
        optimizer.step()
    torch.testing.assert_close(student.z, teacher.z, atol=2e-2, rtol=0)


def test_several_experts_train_side_by_side_without_touching_each_other():
    torch.manual_seed(0)
    layer = SVFLinear.from_linear(nn.Linear(24, 16), num_experts=3)
    x, ids = torch.randn(8, 5, 24), torch.tensor([0, 2, 0, 0, 2, 2, 0, 2])
    layer(x, expert_ids=ids).square().sum().backward()
    assert not layer.z.grad[1].any()
    single = SVFLinear(layer.weight, layer.bias)
    single(x[ids == 2]).square().sum().backward()
    torch.testing.assert_close(layer.z.grad[2], single.z.grad, atol=1e-4, rtol=1e-5)


def test_state_dict_copy_and_casts_keep_the_storage():
    layer = SVFLinear.from_linear(nn.Linear(24, 16), dtype=torch.int8)
    with torch.no_grad():
        layer.z.mul_(1.5)
    x = torch.randn(3, 24)
    other = SVFLinear.from_linear(nn.Linear(24, 16), dtype=torch.int8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight.dtype == torch.int8 and half.weight.s.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


class TestBadInput:
    def test_svf_linear(self):
        p = problem((20, 18, 30), 6)
        ok = {"x": p.x, "u": p.u, "s": p.s, "vh": p.vh, "z": p.z, "bias": p.bias, "expert_ids": p.ids}
        svf_linear(**ok)
        meta = torch.empty(6, 30, device="meta")
        for change, error, text in [
            ({"x": p.x[:, :29]}, ValueError, r"x: expected last dimension 30 .*got shape \[6, 29\]"),
            (
                {"x": p.x.double()},
                TypeError,
                r"x: expected dtype float32 or bfloat16 or float16, got float64",
            ),
            ({"x": [1.0]}, TypeError, "x: expected a tensor.*got list"),
            ({"x": torch.tensor(1.0)}, ValueError, "x: expected last dimension"),
            ({"x": meta}, ValueError, "u: expected device meta .*got cpu"),
            ({"x": p.x[0]}, ValueError, r"x: expected \[rows, ..., in\] when expert_ids is given"),
            ({"u": p.u.bfloat16()}, TypeError, "u: expected dtype float32, got bfloat16"),
            ({"u": p.u[0]}, ValueError, "u: expected 2 dimensions"),
            ({"u": p.u.clone().requires_grad_()}, ValueError, "u: expected requires_grad=False"),
            ({"vh": p.vh[:17]}, ValueError, r"vh: expected shape \[18, in\].*got \[17, 30\]"),
            ({"vh": p.vh.half()}, TypeError, "vh: expected dtype float32, got float16"),
            ({"s": p.s[:17]}, ValueError, r"s: expected shape \[18\] \(rank\), got \[17\]"),
            ({"s": p.s.long()}, TypeError, "s: expected dtype"),
            ({"z": p.z[:, :17]}, ValueError, r"z: expected shape \[E, 18\]"),
            ({"z": p.z[0]}, ValueError, r"z: expected shape \[E, 18\]"),
            ({"expert_ids": None}, ValueError, r"z: expected shape \[18\] .*needs expert_ids"),
            ({"expert_ids": p.ids[:5]}, ValueError, r"expert_ids: expected shape \[6\]"),
            ({"expert_ids": p.ids.int()}, TypeError, "expert_ids: expected dtype int64, got int32"),
            ({"expert_ids": p.ids + 5}, IndexError, "expert_ids: expected 0 <= id < 5, got ids from"),
            ({"expert_ids": p.ids - 5}, IndexError, "expert_ids: expected 0 <= id < 5"),
            ({"expert_ids": [0] * 6}, TypeError, "expert_ids: expected a tensor.*got list"),
            ({"bias": p.bias[:19]}, ValueError, r"bias: expected shape \[20\]"),
            ({"bias": p.bias.double()}, TypeError, "bias: expected dtype"),
        ]:
            with pytest.raises(error, match=text):
                svf_linear(**(ok | change))

    def test_factored_weight(self):
        p = problem((20, 18, 30), 6)
        for args, error, text in [
            (
                (p.u, p.s, p.vh, torch.int16),
                TypeError,
                "expected float32, bfloat16, float16, int8, on a CPU uint8, or on",
            ),
            ((p.u, p.s, p.vh, torch.float8_e4m3fn), TypeError, "got torch.float8_e4m3fn on cpu"),
            ((p.u, p.s, p.vh[:17]), ValueError, r"vh: expected shape \[18, in\]"),
            ((p.u, p.s[:17], p.vh), ValueError, r"s: expected shape \[18\]"),
            ((p.u * float("nan"), p.s, p.vh), ValueError, "u: expected finite"),
            ((p.u, p.s / 0, p.vh), ValueError, "s: expected finite"),
            ((p.u[:0], p.s, p.vh), ValueError, "u: expected a non-empty matrix"),
            ((p.u.to("meta"), p.s, p.vh), ValueError, "u: expected real data"),
            ((p.u.long(), p.s, p.vh), TypeError, "u: expected dtype"),
        ]:
            with pytest.raises(error, match=text):
                FactoredWeight.pack(*args)
        w = FactoredWeight.pack(p.u, p.s, p.vh)
        for args, error, text in [
            ((p.x, p.scales[:, :17], p.ids), ValueError, r"scales: expected shape \[slots, 18\]"),
            ((p.x, p.scales.double(), p.ids), TypeError, "scales: expected dtype float32"),
            ((p.x, p.scales, p.ids[:5]), ValueError, "slots: expected shape"),
            ((p.x, p.scales, p.ids + 5), IndexError, "slots: expected 0 <= id < 5"),
            ((p.x[:, :29], p.scales, p.ids), ValueError, "x: expected last dimension 30"),
        ]:
            with pytest.raises(error, match=text):
                w.linear(*args)

    def test_svf_linear_module(self):
        with pytest.raises(TypeError, match=r"linear: expected torch.nn.Linear, got Conv1d"):
            SVFLinear.from_linear(nn.Conv1d(1, 1, 1))
        layer = SVFLinear.from_linear(nn.Linear(4, 3), num_experts=2)
        with pytest.raises(ValueError, match="expert_ids: expected int64"):
            layer(torch.randn(2, 4))
        with pytest.raises(IndexError, match="expert_ids: expected 0 <= id < 2"):
            layer(torch.randn(2, 4), torch.tensor([0, 2]))
        with pytest.raises(ValueError, match="expert_ids: expected None"):
            SVFLinear.from_linear(nn.Linear(4, 3))(torch.randn(2, 4), torch.tensor([0, 0]))
        with pytest.raises(ValueError, match="num_experts: expected None or an integer >= 1, got 0"):
            SVFLinear.from_linear(nn.Linear(4, 3), num_experts=0)


def test_linear_group_checks_its_arguments():
    p, q = problem((20, 18, 30), 6), problem((9, 18, 30), 6)
    first, second = FactoredWeight.pack(p.u, p.s, p.vh), FactoredWeight.pack(q.u, q.s, q.vh)
    other = FactoredWeight.pack(q.u, q.s, q.vh, dtype=torch.float16)
    ok = {"weights": [first, second], "x": p.x, "scales": [p.scales, q.scales], "slots": p.ids}
    assert [y.shape[1] for y in linear_group(**ok)] == [20, 9]
    for change, error, text in [
        ({"weights": []}, ValueError, "weights: expected at least one and as many scales"),
        ({"scales": [p.scales]}, ValueError, "2 weights, 1 scales, 2 biases"),
        ({"biases": [None]}, ValueError, "2 weights, 2 scales, 1 biases"),
        ({"weights": [first, other]}, ValueError, "weights: expected layers of one kind and input"),
        ({"scales": [p.scales, q.scales[:, :3]]}, ValueError, r"scales: expected shape \[slots, 18\]"),
        ({"slots": p.ids + 9}, IndexError, "slots: expected 0 <= id < 5"),
        ({"biases": [None, p.bias]}, ValueError, "bias: expected shape"),
        ({"x": p.x.clone().requires_grad_()}, ValueError, "expected tensors that need no gradient"),
        ({"scales": [p.scales.clone().requires_grad_(), q.scales]}, ValueError, "that need no gradient"),
    ]:
        with pytest.raises(error, match=text):
            linear_group(**(ok | change))


def test_float16_storage_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"weight: expected values that float16 can hold .*got 7e"):
        DenseWeight.pack(torch.full((2, 2), 7e4), dtype=torch.float16)


@pytest.mark.parametrize(("rank", "head"), [(1, 0), (63, 0), (64, 16), (512, 16), (513, 32), (4096, 128)])
def test_leading_components_that_int8_keeps(rank, head):
    assert float16_rank(rank) == head
    u, vh = torch.randn(20, rank), torch.randn(rank, 20)
    stored_u, _, stored_vh = FactoredWeight.pack(u, torch.ones(rank), vh, dtype=torch.int8).factors()
    assert torch.equal(stored_u[:, :head], u[:, :head].half().float())
    assert torch.equal(stored_vh[:head], vh[:head].half().float())
