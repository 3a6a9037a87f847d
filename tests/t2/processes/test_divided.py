"""Models that several processes hold together, by FSDP2 or as tensor parallel layers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import T5Config, T5ForConditionalGeneration

import t2
from t2.generation.compiled_pass import Compilation
from t2.generation.engine import Engine, Finished, Token
from t2.model.sharding import block_of
from t2.model.tensor_parallel import COLUMNS, GATHER, ROWS, SPLIT, Division, divisions
from tests.families.tiny import tiny_model
from tests.t2.processes.launch import ROOT, environment
from tests.t2.toy import toy_model


@pytest.mark.parametrize(
    ("processes", "families"), [(2, ["llama", "gpt2", "gpt_neox", "phi3"]), (3, ["opt"]), (4, ["qwen3", "gpt_neox"])]
)
def test_a_divided_model_answers_and_learns_as_in_one_process(processes, families):
    """Mixed batches, gradients, generate; layers by transformers' plan and without; biases; sizes that leave rest."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    ended = subprocess.run(
        [*launch, "-m", "tests.t2.processes.divided", *families],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env=environment(),
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [line["family"] for line in lines] == families
    for line in lines:
        assert len(line["found"]) == processes
        for found in line["found"]:
            for form in ("factored", "delta", "int8"):
                assert set(found[f"{form} shard"].values()) == {0.0}, line["family"]  # the factors are the same ones
            for form in ("factored", "delta"):
                assert max(found[f"{form} tensor_parallel"].values()) < 1e-5, line["family"]
                assert found[f"{form} tensor_parallel"]["tokens"] == found[f"{form} tensor_parallel"]["merged"] == 0
            assert found["delta share"] < 1 / processes + 0.25
            assert found["factored share"] < 0.8


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Processes:
    """Stands for the mesh of a process among several, for what needs no communication."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.get_local_rank = lambda: size, lambda: rank


def styles(model, names, processes=2):
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    return {name: each.style for name, each in divisions(model, shapes, Processes(processes)).items()}


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]


def test_the_plan_holds_where_all_layers_of_a_module_keep_it():
    model = tiny_model("llama")
    names = [name for name in linears(model) if "layers.0" in name]
    assert set(styles(model, names).values()) == {COLUMNS, ROWS}
    some = styles(model, [name for name in names if not name.endswith("up_proj")])
    assert {name.split(".")[-1]: style for name, style in some.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), COLUMNS),
        **{"o_proj": ROWS, "gate_proj": GATHER, "down_proj": SPLIT},
    }
    heads = styles(model, names, processes=4)  # two heads of keys
    assert {style for name, style in heads.items() if "self_attn" in name} == {GATHER, SPLIT}
    assert {style for name, style in heads.items() if "mlp" in name} == {COLUMNS, ROWS}
    model.tp_plan = model.tp_plan | {"model.layers.*.self_attn.sinks": "rowwise"}  # of each head, and whole here
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert {style for name, style in styles(model, names).items() if "self_attn" in name} == {GATHER, SPLIT}
    assert set(styles(tiny_model("opt"), linears(tiny_model("opt"))).values()) == {GATHER}


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("style", [COLUMNS, ROWS, GATHER, SPLIT])
def test_shares_put_together_are_the_matrix(processes, style):
    matrix = torch.randn(13, 11)
    parts = []
    for rank in range(processes):
        division = Division(style, 13, 11, Processes(processes, rank))
        parts.append(division.columns_of(division.rows_of(matrix)))
    assert len({part.shape for part in parts}) == 1
    whole = torch.cat(parts, 0 if style in (COLUMNS, GATHER) else 1)
    assert torch.equal(whole[:13, :11], matrix) and whole.count_nonzero() == matrix.count_nonzero()


def test_a_block_is_an_entry_of_the_outermost_list():
    model = tiny_model("llama")
    assert block_of(model, "model.layers.1.self_attn.q_proj") == "model.layers.1"
    assert block_of(model, "lm_head") is None


def config(**options):
    return t2.SVFConfig(progress=False, **options)


@pytest.mark.parametrize("way", ["shard", "tensor_parallel"])
def test_what_cannot_be_divided_says_so(mesh, tmp_path, way):
    with pytest.raises(TypeError, match=f"{way}: expected None or a one-dimensional DeviceMesh, got 2"):
        config(**{way: 2}).check()
    with pytest.raises(ValueError, match="routed experts among the targets"):
        t2.SVFModel(tiny_model("qwen3_moe"), config(**{way: mesh}, cache_dir=tmp_path))
    attention = t2.SVFModel(
        tiny_model("qwen3_moe"), config(**{way: mesh}, cache_dir=tmp_path, target_modules="attention")
    )
    assert len(attention.layout.names) == 8
    svf = t2.SVFModel(tiny_model("llama"), config(**{way: mesh}, cache_dir=tmp_path))
    with pytest.raises(ValueError, match="plan: expected a model of one process"):
        svf.plan(None, prompt_tokens=3, new_tokens=3)


def test_both_ways_at_once_and_no_cache(mesh):
    with pytest.raises(ValueError, match="shard, tensor_parallel: expected one of them, got both"):
        config(shard=mesh, tensor_parallel=mesh).check()
    with pytest.raises(ValueError, match="cache: expected True where layers are divided"):
        config(tensor_parallel=mesh, cache=False).check()


def test_a_sharded_model_can_not_be_taken_apart(mesh, tmp_path):
    svf = t2.SVFModel(tiny_model("llama"), config(shard=mesh, cache_dir=tmp_path))
    for act in (svf.unload, lambda: svf.merged_copy(None), lambda: svf.take_support(torch.arange(3))):
        with pytest.raises(RuntimeError, match="expected a model that is not sharded"):
            act()
    small = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="shard: expected a model with one stack of blocks"):
        t2.SVFModel(T5ForConditionalGeneration(small), config(shard=mesh, cache_dir=tmp_path))


def test_a_divided_model_gives_the_base_back(mesh, tmp_path):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svf = t2.SVFModel(model, config(tensor_parallel=mesh, cache_dir=tmp_path))
    after = svf.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_engine_serves_a_divided_model_without_a_program(mesh, tmp_path):
    svf = t2.SVFModel(toy_model(), config(tensor_parallel=mesh, cache_dir=tmp_path))
    engine, said = Engine(svf, eos_ids=(2,), max_rows=3, max_tokens=40), []
    Compilation(engine, said.append).finish()
    assert "programs are for models of one process" in said[0]
    events: list[Token | Finished] = []
    engine.submit([1, 4, 5], events.append, max_tokens=4)
    while engine.step():
        pass
    out = svf.generate(torch.tensor([[1, 4, 5]]), experts=None, max_new_tokens=4, do_sample=False)
    assert [event.id for event in events if isinstance(event, Token)] == out[0, 3:].tolist()
