"""Routes beside the model: rows and requests, and slots that a backward pass still needs."""

from __future__ import annotations

import pytest
import torch

from t2.model.routing import Route
from tests.t2.tiny_lm import add_random_experts, prompts, wrap


@pytest.mark.parametrize(("requests", "rows"), [(1, 1), (1, 7), (2, 2), (2, 6), (3, 0), (0, 0)])
def test_rows_are_the_requests_each_repeated(requests, rows):
    Route(torch.zeros(requests, dtype=torch.int64)).check(rows, "layer")


@pytest.mark.parametrize(("requests", "rows"), [(2, 3), (2, 1), (3, 4), (0, 1)])
def test_other_rows_are_refused(requests, rows):
    with pytest.raises(ValueError, match=f"one entry per request, got {requests} entries for {rows} rows .* of layer"):
        Route(torch.zeros(requests, dtype=torch.int64)).check(rows, "layer")


def test_a_batch_that_does_not_fit_the_route_around_it_is_refused(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    with svf.route(add_random_experts(svf, 2)):
        with pytest.raises(ValueError, match="got 2 entries for 3 rows"):
            svf.model(input_ids=prompts(3))
        assert len(svf.model(input_ids=prompts(4)).logits) == 4


def test_a_backward_pass_has_the_experts_of_its_own_batch(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 4)
    x = svf.model.get_input_embeddings()(prompts(2)).detach().requires_grad_()
    found = []
    for later in (names[:2], names[2:]):  # slots of batches of one size lie at one address
        with svf.route(names[:2]):
            logits = svf.model(inputs_embeds=x, use_cache=False).logits
        with svf.route(later), torch.no_grad():
            svf.model(input_ids=prompts(2), use_cache=False)
        found += torch.autograd.grad(logits[..., 5].sum(), x)
    assert torch.equal(*found)


def test_the_gradient_of_an_expert_in_training_is_that_of_its_vector(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    (name,) = add_random_experts(svf, 1)
    ids = prompts(2)

    def loss():
        return svf.model(input_ids=ids, labels=ids, use_cache=False).loss

    parameter = svf.start_training(name)
    (trained,) = torch.autograd.grad(loss(), parameter)
    svf.finish_training()
    z = svf.bank[name].z.clone().requires_grad_()
    with svf.route(z):
        (routed,) = torch.autograd.grad(loss(), z)
    torch.testing.assert_close(trained, routed, atol=1e-5, rtol=1e-4)
    assert float(routed.norm()) > 0
