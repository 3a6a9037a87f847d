"""torch.compile: one graph without breaks, grouped products, and experts that change without compiling again."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import t2
from t2kernels import ops


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.made: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.made.append(graph)
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Graphs:
        return self  # transformers copies its options

    def count(self, operator: Any, which: int = -1) -> int:
        return sum(node.target is operator for node in self.made[which].graph.nodes)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


@pytest.fixture
def make(tmp_path):
    def made(layers: int = 1, experts: int = 5, **options: Any) -> t2.SVFModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.3)
        svf = t2.SVFModel(model, t2.SVFConfig(cache_dir=tmp_path / "factors", progress=False, **options))
        for i in range(experts):
            svf.add_expert(f"e{i}", t2.Expert.random(svf.layout, std=0.3, seed=i))
        return svf.requires_grad_(False)

    return made


def tokens(batch: int, length: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def no_more_compiling() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


@torch.no_grad()
def test_one_graph_with_four_grouped_products_a_layer(make, graphs):
    svf = make(layers=2)
    compiled = torch.compile(svf.model, backend=graphs, fullgraph=True)
    ids = tokens(3)
    routes = [["e0", "e1", None], ["e2", "e2", "e3"], [{"e0": 0.5, "e4": 0.5}, "e1", t2.Expert.random(svf.layout)]]
    expected = [svf(input_ids=ids, experts=route, use_cache=False).logits for route in routes]
    with svf.route(routes[0]):
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected[0])
    (graph,) = graphs.made
    assert graphs.count(ops.factored_linear_group) == 4 * 2 and graphs.count(ops.factored_linear) == 0
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    assert len(output.args[0]) == 1  # logits: no outputs that wait for a layer
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    moving = [node.name for node in inputs if not node.meta["tensor_dict"].get("_dynamo_static_input_type")]
    assert len(moving) == 1 and "input_ids" in moving[0]  # all else a CUDA graph reads where it lies
    with no_more_compiling():
        for route, logits in zip(routes[1:], expected[1:], strict=True):
            with svf.route(route):
                assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, logits)
        svf.add_expert("new", t2.Expert.random(svf.layout, std=0.3, seed=9))
        svf.add_expert("e0", svf.bank["new"], replace=True)
        svf.remove_expert("e1")
        for route in (["new", "e0", "e2"], ["e2", "new", None]):
            with svf.route(route):
                logits = compiled(input_ids=ids, use_cache=False).logits
                assert torch.equal(logits, svf(input_ids=ids, use_cache=False).logits)
    assert len(graphs.made) == 1


@torch.no_grad()
def test_compiled_decoder_layers_share_one_graph(make, graphs):
    svf = make(layers=12)
    ids, routes = tokens(3), [["e0", "e1", None], ["e3", "e1", "e2"]]
    expected = [svf(input_ids=ids, experts=route, use_cache=False).logits for route in routes]
    for layer in svf.model.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    for route, logits in zip(routes, expected, strict=True):
        assert torch.equal(svf(input_ids=ids, experts=route, use_cache=False).logits, logits)
    assert len(graphs.made) == 1 and graphs.count(ops.factored_linear_group) == 4


@torch.no_grad()
def test_a_compiled_model_without_a_route_is_the_base(make, graphs):
    svf = make()
    ids = tokens(2)
    base = svf(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(svf.model, backend=graphs, fullgraph=True)
    assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, base)
    with svf.route(["e0", "e1"]):
        logits = compiled(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits, svf(input_ids=ids, use_cache=False).logits) and not torch.equal(logits, base)
        with svf.route([None, None]):
            assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, base)
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, logits)
    with no_more_compiling():
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, base)


@torch.no_grad()
def test_batches_of_other_sizes_and_counts_that_do_not_fit(make, graphs):
    svf = make()
    compiled = torch.compile(svf.model, backend=graphs)
    for route in (["e0", "e1"], ["e2"], ["e0", "e1", None], ["e3", None]):
        ids = tokens(len(route))
        with svf.route(route):
            expected = svf(input_ids=ids, use_cache=False).logits
            assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
    with svf.route(["e0", "e1"]):
        expected = svf(input_ids=tokens(4), use_cache=False).logits
        assert torch.equal(compiled(input_ids=tokens(4), use_cache=False).logits, expected)  # two rows each
        with pytest.raises(ValueError, match="experts: expected one entry per request, got 2 entries for 3 rows"):
            compiled(input_ids=tokens(3), use_cache=False)


@torch.no_grad()
def test_a_table_that_grows_compiles_once_more(make, graphs):
    svf = make(experts=2, slots=3)
    assert svf.table_generation == 0
    ids = tokens(2)
    compiled = torch.compile(svf.model, backend=graphs, fullgraph=True)
    with svf.route(["e0", "e1"]):
        before = compiled(input_ids=ids, use_cache=False).logits
        svf.add_expert("more", t2.Expert.random(svf.layout, std=0.3, seed=7))
        assert svf.table_generation == 1
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, before)
    with no_more_compiling(), svf.route(["more", "e1"]):
        expected = svf(input_ids=ids, use_cache=False).logits
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
    assert len(graphs.made) == 2


def in_threads(*functions):
    """Runs them side by side, and gives what they return or raise."""

    def run(i):
        try:
            found[i] = functions[i]()
        except Exception as error:
            found[i] = error

    found: dict[int, Any] = {}
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(len(functions))]


def test_threads_run_a_compiled_model_with_routes_of_their_own(make, graphs):
    svf = make()
    ids = tokens(2)
    routes = [["e0", "e1"], ["e2", None], [None, None]]
    with torch.no_grad():
        expected = [svf(input_ids=ids, experts=route, use_cache=False).logits for route in routes]
        base = svf(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(svf.model, backend=graphs)
    inside = threading.Barrier(3)

    @torch.no_grad()
    def serve(i):
        with svf.route(routes[i]):
            inside.wait(30)
            logits = [compiled(input_ids=ids, use_cache=False).logits for _ in range(4)]
            inside.wait(30)
            return all(torch.equal(each, expected[i]) for each in logits)

    assert in_threads(*(functools.partial(serve, i) for i in range(3))) == [True] * 3
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, base)
    with torch.no_grad(), no_more_compiling():
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, base)
        assert in_threads(*(functools.partial(serve, i) for i in range(3))) == [True] * 3


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_does_not_take_another_threads_route(make, graphs, fullgraph):
    svf = make()
    ids = tokens(2)
    compiled = torch.compile(svf.model, backend=graphs, fullgraph=fullgraph)

    @torch.no_grad()
    def call():
        return compiled(input_ids=ids, use_cache=False).logits

    base = call()
    with svf.route(["e0", "e1"]):
        routed = call()
        (found,) = in_threads(call)
        if fullgraph:
            assert "enter a route in the thread that calls it" in str(found)
        else:
            assert torch.equal(found, base)

        def call_with_a_route():
            with svf.route(None):
                return call()

        (logits,) = in_threads(call_with_a_route)
        assert torch.equal(logits, base)
        assert torch.equal(call(), routed)
    with no_more_compiling():
        assert torch.equal(call(), base)  # nothing of the error stays


@torch.no_grad()
def test_calls_of_the_wrapper_enter_the_route_that_is_in_force(make, graphs):
    svf = make()
    ids = tokens(2)
    base = svf(input_ids=ids, use_cache=False).logits
    svf.model.compile(backend=graphs, fullgraph=True)
    call = torch.no_grad()(lambda: svf(input_ids=ids, use_cache=False).logits)
    with svf.route(["e0", "e1"]):
        routed = call()
        context = contextvars.copy_context()
        of_thread, of_context = in_threads(call, lambda: context.run(call))
    assert torch.equal(of_thread, base) and torch.equal(of_context, routed) and not torch.equal(routed, base)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_serves_tasks_one_after_the_other(make, graphs, fullgraph):
    svf = make()
    ids = tokens(2)
    routes = [["e0", "e1"], ["e2", None]]
    with torch.no_grad():
        expected = [svf(input_ids=ids, experts=route, use_cache=False).logits for route in routes]
    compiled = torch.compile(svf.model, backend=graphs, fullgraph=fullgraph)

    @torch.no_grad()
    def call():
        return compiled(input_ids=ids, use_cache=False).logits

    async def serve(i, pause):
        with svf.route(routes[i]):
            if pause:
                await asyncio.sleep(0)
            return call()

    async def inherit():
        with svf.route(routes[0]):
            child = asyncio.create_task(serve(1, True))
            await asyncio.sleep(0)
            try:
                return [call(), await child]
            finally:
                child.cancel()

    async def hand_over():
        with svf.route(routes[0]):
            return [await asyncio.to_thread(call), expected[1]]

    async def gather(pause):
        return await asyncio.gather(serve(0, pause), serve(1, pause))

    def check(found):
        assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))

    check(asyncio.run(gather(False)))
    for awaiting in (lambda: gather(True), inherit, hand_over):
        if fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="inside routes of their own"):
                asyncio.run(awaiting())
        else:
            check(asyncio.run(awaiting()))
    with no_more_compiling():
        check(asyncio.run(gather(False)))  # nothing of that stays


def test_training_and_gradients_leave_the_graph(make, graphs):
    svf = make()
    ids = tokens(2)
    compiled = torch.compile(svf.model, backend=graphs)

    def loss(model):
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    z = [svf.bank[name].z.clone().requires_grad_() for name in ("e0", "e1")]
    gradients = []
    for model in (svf, compiled):
        with svf.route(z):
            gradients.append(torch.autograd.grad(loss(model), z))
    for right, mine in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right)
    parameter = svf.start_training("e2")
    (expected,) = torch.autograd.grad(loss(svf), [parameter])
    (mine,) = torch.autograd.grad(loss(compiled), [parameter])
    torch.testing.assert_close(mine, expected)
    assert float(mine.abs().sum()) > 0
    with torch.no_grad():
        assert torch.equal(loss(compiled), loss(svf))
        with svf.route("e1"):
            assert torch.equal(loss(compiled), loss(svf))
    svf.finish_training()
    with torch.no_grad():
        assert torch.equal(loss(compiled), loss(svf))
    with svf.route(["e0", "e1"]):  # gradients of something else, through experts as they are
        x = svf.model.get_input_embeddings()(ids).detach().requires_grad_()
        (expected,) = torch.autograd.grad(svf.model(inputs_embeds=x, use_cache=False).logits.sum(), [x])
        run = torch.compile(lambda x: svf.model(inputs_embeds=x, use_cache=False).logits, backend="aot_eager")
        (mine,) = torch.autograd.grad(run(x).sum(), [x])
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_plan_leaves_the_graph(make, graphs):
    svf = make()
    ids = tokens(2)
    plan = svf.plan("e0", prompt_tokens=512, new_tokens=1, batch=2)
    for name, layer in plan.plan.layers.items():
        plan.plan.layers[name] = dataclasses.replace(layer, form="merged")
    compiled = torch.compile(svf.model, backend=graphs)
    with svf.route("e0", plan):
        expected = svf.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the route has gradients, a plan"), svf.route("e0", plan):
        torch.compile(svf.model, backend=graphs, fullgraph=True)(input_ids=ids, use_cache=False)


class Attention(nn.Module):
    """Keys and values of another tensor than the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.q_proj(x) + self.k_proj(memory) * self.v_proj(memory))


@torch.no_grad()
def test_a_wrong_guess_about_shared_inputs_settles(tmp_path, graphs):
    torch.manual_seed(0)
    model = nn.ModuleList([Attention(), Attention()])
    model.forward = lambda x, memory: model[1](model[0](x, memory), memory)
    svf = t2.SVFModel(model, t2.SVFConfig(cache=False, progress=False))
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    compiled = torch.compile(model.forward, backend=graphs, fullgraph=True)
    svf.add_expert("e", t2.Expert.random(svf.layout))
    with svf.route(["e", None]):
        first = compiled(x, memory)
        compiled(x, memory)
        compiled(x, memory)
        with no_more_compiling():
            assert torch.equal(compiled(x, memory), first)
        assert graphs.count(ops.factored_linear_group) == 6
        torch.testing.assert_close(first, svf.model(x, memory))
    assert svf.router.outputs_left.group is None and svf.router.outputs_left.outputs is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_static_cache_decode_is_generate(make, graphs, mode):
    svf = make()
    ids, new = tokens(3), 8
    routes = [["e0", "e1", "e2"], ["e4", None, "e0"]]
    expected = [svf.generate(input_ids=ids, experts=route, max_new_tokens=new, do_sample=False) for route in routes]
    compiled = torch.compile(svf.model.forward, backend=graphs, fullgraph=True)

    def decode(route):
        cache = StaticCache(config=svf.model.config, max_cache_len=32)
        answer, step = ids, ids
        with svf.route(route):
            for i in range(new):
                position = torch.arange(answer.shape[1] - step.shape[1], answer.shape[1]).unsqueeze(0)
                forward = compiled if i else svf.model.forward  # the prompt as it is
                logits = forward(input_ids=step, past_key_values=cache, position_ids=position).logits
                step = logits[:, -1].argmax(-1, keepdim=True)
                answer = torch.cat([answer, step], 1)
        return answer

    with mode():
        assert torch.equal(decode(routes[0]), expected[0])
        with no_more_compiling():
            assert torch.equal(decode(routes[1]), expected[1])
    assert len(graphs.made) == 1 and graphs.count(ops.factored_linear_group) == 4


def test_generate_with_a_static_cache_compiles_once(make, graphs):
    svf = make()
    ids = tokens(3)
    compiling = CompileConfig(backend=graphs, mode=None, fullgraph=True)
    compiling._compile_all_devices = True  # as transformers does by itself on a GPU
    options = {"input_ids": ids, "max_new_tokens": 8, "do_sample": False}
    for route in (["e0", "e1", "e2"], ["e4", None, "e0"], [None] * 3):
        expected = svf.generate(**options, experts=route)
        answer = svf.generate(**options, experts=route, cache_implementation="static", compile_config=compiling)
        assert torch.equal(answer, expected)
    assert len(graphs.made) == 1
