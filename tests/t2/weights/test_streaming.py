"""Models read from shards matrix by matrix against the same models loaded whole."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import t2
from t2.model.load import load_svf
from t2.weights import factor_cache as svd
from t2.weights.estimate import estimate_model
from t2.weights.files import FileFormatError
from t2.weights.memory_model import decompose_bytes
from t2.weights.shards import INDEX, StoredWeight
from t2.weights.streaming import Checkpoint, streams
from tests.t2.tiny_lm import CONFIGS, add_random_experts, assert_same_state, prompts, state
from tests.t2.weights.live_bytes import LiveBytes
from tests.t2.weights.test_factor_cache import flipped


@pytest.fixture
def checkpoint(tmp_path, folder):
    """Saves a tiny model of some family as shards with a tokenizer; returns the folder."""

    def make(family="llama", dtype=torch.float32, shard_size="12KB", **changes):
        torch.manual_seed(0)
        config = CONFIGS[family]()
        config.update({"vocab_size": 96, **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        path = tmp_path / "sharded"
        model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
        for file in folder.glob("tokenizer*"):
            shutil.copy(file, path)
        return path

    return make


def config(tmp_path, name="factors", **options):
    return t2.SVFConfig(cache_dir=tmp_path / name, progress=False, **options)


def logits(svf, experts):
    return svf(input_ids=prompts(len(experts)), experts=experts).logits


CASES = [
    ("llama", torch.float32, {}, torch.float32, None),
    ("llama", torch.bfloat16, {"tie_word_embeddings": True}, torch.float32, torch.int8),
    ("llama", torch.float16, {}, torch.bfloat16, torch.bfloat16),
    ("qwen2", torch.bfloat16, {}, torch.bfloat16, torch.int8),
    ("gemma3", torch.bfloat16, {}, torch.float32, torch.float16),
    ("gpt2", torch.float32, {}, torch.float32, torch.float32),
    ("phi3", torch.float32, {}, torch.float32, torch.int8),
    ("mistral", torch.float32, {}, torch.float16, None),
    ("qwen3", torch.bfloat16, {"tie_word_embeddings": True}, torch.bfloat16, None),
]


@pytest.mark.parametrize(("family", "stored", "changes", "dtype", "storage"), CASES)
@torch.no_grad()
def test_streamed_is_loaded_whole_to_the_bit(tmp_path, checkpoint, family, stored, changes, dtype, storage):
    path = checkpoint(family, stored, **changes)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    model, _ = t2.load(path, dtype=dtype)
    before = state(model)
    whole = t2.SVFModel(model, config(tmp_path, "a", dtype=storage))
    svf, tokenizer = t2.load_factored(path, config(tmp_path, "b", dtype=storage), dtype=dtype)
    assert svf.layout == whole.layout and svf.weight_keys == whole.weight_keys
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    assert svf.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    for (name, mine), (other, theirs) in zip(svf.model.named_buffers(), whole.model.named_buffers(), strict=True):
        assert name == other and mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    names = add_random_experts(svf, 2)
    add_random_experts(whole, 2)
    experts = [names[0], None, {names[0]: 0.5, names[1]: 0.5}]
    assert torch.equal(logits(svf, experts), logits(whole, experts))
    for mine, theirs in ((svf.merged_copy("e0"), whole.merged_copy("e0")), (svf.unload(), whole.unload())):
        assert_same_state(mine, state(theirs))
    assert_same_state(svf.model, before)
    assert (svf.model.lm_head.weight is svf.model.get_input_embeddings().weight) == model.config.tie_word_embeddings


def test_a_single_file_streams_too(tmp_path, checkpoint):
    path = checkpoint(shard_size="1GB")
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    assert not streams(path, "auto") and streams(path, "yes")
    svf, _ = load_svf(path, config(tmp_path), stream="yes")
    whole, _ = load_svf(path, config(tmp_path))
    assert svf.layout == whole.layout and torch.equal(logits(svf, [None]), logits(whole, [None]))


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("llama", "model.")])
def test_tensors_named_as_in_the_bare_model(tmp_path, checkpoint, family, prefix):
    path = checkpoint(family, shard_size="1GB")
    whole, _ = load_svf(path, config(tmp_path))
    file = path / "model.safetensors"
    save_file({name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    svf, _ = t2.load_factored(path, config(tmp_path))
    assert svf.layout == whole.layout and torch.equal(logits(svf, [None]), logits(whole, [None]))


def test_local_shards_stream_by_themselves(tmp_path, checkpoint, monkeypatch):
    path = checkpoint()
    assert streams(path, "auto") and streams(str(path), "auto") and not streams(path, "no")
    assert not streams("nobody/nothing", "auto")
    with pytest.raises(ValueError, match="stream: expected auto, yes or no, got 'maybe'"):
        streams(path, "maybe")
    monkeypatch.setattr("t2.weights.streaming.load", None)  # not called
    load_svf(path, config(tmp_path))


def test_the_model_holds_no_target_before_it_is_wrapped(checkpoint):
    source = Checkpoint(checkpoint(dtype=torch.bfloat16), torch.float32)
    weights = source.weights("all-linear")
    model = source.load_rest(weights, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == (name.removesuffix(".weight") in weights), name
    assert not model.lm_head.weight.is_meta and not model.training


def test_one_large_matrix_at_a_time(tmp_path, checkpoint, monkeypatch):
    """A large matrix is read only when the one before has left memory."""
    path, alive, most = checkpoint(), [0], [0]
    read, threads = StoredWeight.__call__, torch.get_num_threads()

    def counted(self):
        weight = read(self).clone()
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(weight.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 1))
        return weight

    monkeypatch.setattr(StoredWeight, "__call__", counted)
    monkeypatch.setattr(svd, "LARGE", 100)
    torch.set_num_threads(4)
    try:
        t2.load_factored(path, config(tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert most[0] == 1 and alive[0] == 0


def test_the_dense_model_is_never_in_memory(tmp_path, checkpoint, monkeypatch):
    """Tensors that loading holds at most, beside what decomposing one matrix takes (the test above)."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads load is not seen
    path = checkpoint("llama", torch.bfloat16, "64KB", num_hidden_layers=12, hidden_size=96, intermediate_size=256)
    options = config(tmp_path, dtype=torch.int8)
    peaks = {}
    for way in ("yes", "no", "yes"):  # the first fills the cache
        with LiveBytes() as live:
            svf, _ = load_svf(path, options, stream=way)
        peaks[way] = live.peak
    weights = [target.layer.weight for target in svf.decomposed.layers.values()]
    dense = sum(4 * w.in_features * w.out_features for w in weights)
    plan = estimate_model(path, dtype=torch.float32)
    bound = plan.serving(torch.int8) + decompose_bytes(256, 96, torch.float32)
    assert peaks["yes"] <= bound < dense <= peaks["no"]


def test_an_interrupted_decomposition_goes_on(tmp_path, checkpoint, monkeypatch):
    path, done = checkpoint(), []
    decompose = svd.decompose

    def interrupted(weight):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(weight.shape)
        return decompose(weight)

    monkeypatch.setattr(svd, "decompose", interrupted)
    monkeypatch.setattr(svd, "LARGE", 100)
    with pytest.raises(KeyboardInterrupt):
        t2.load_factored(path, config(tmp_path))
    assert len(list((tmp_path / "factors").glob("*.safetensors"))) == 5
    monkeypatch.setattr(svd, "decompose", lambda weight: done.append(weight.shape) or decompose(weight))
    svf, _ = t2.load_factored(path, config(tmp_path))
    assert len(done) == len(svf.layout.names) == 14
    t2.load_factored(path, config(tmp_path))
    assert len(done) == 14


def test_missing_and_damaged_shards(tmp_path, checkpoint):
    path = checkpoint()
    load = lambda: t2.load_factored(path, config(tmp_path))  # noqa: E731
    shard = sorted(path.glob("model-*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"shard {shard} does not exist"):
        load()
    shard.write_bytes(whole[:-40])
    with pytest.raises(FileFormatError, match=f"shard {shard} is truncated or corrupt"):
        load()
    tensors = load_file(sorted(path.glob("model-*.safetensors"))[1])
    save_file(tensors, shard)
    with pytest.raises(FileFormatError, match=r"expected .* in model-00003-of.*, which does not hold it"):
        load()
    shard.write_bytes(whole)
    index = json.loads((path / INDEX).read_text())
    for damaged in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"x": "../y.safetensors"}}'):
        (path / INDEX).write_text(damaged)
        with pytest.raises(FileFormatError, match=r"expected an? (index with a )?weight_map"):
            load()
    (path / INDEX).unlink()
    with pytest.raises(FileFormatError, match="found neither; weights load from safetensors only"):
        load()
    (path / INDEX).write_text(json.dumps(index))
    assert not list(tmp_path.glob("factors/*")), "nothing is decomposed before all files are known to be whole"


def test_a_damaged_shard_of_a_local_folder_is_named_by_every_way_in(tmp_path, checkpoint):
    path = checkpoint()
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    assert streams(path, "auto")
    with pytest.raises(FileFormatError, match=shard.name):
        load_svf(path, config(tmp_path))


@pytest.mark.parametrize("tensor", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path, checkpoint, tensor):
    path = checkpoint(shard_size="1GB")
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {tensor: torch.zeros(3, 5)}, file)
    with pytest.raises(FileFormatError, match=rf"expected .*{tensor}|mismatched_keys.*{tensor}"):
        t2.load_factored(path, config(tmp_path))
    del tensors[tensor]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"expected {tensor}|missing_keys.*{tensor}"):
        t2.load_factored(path, config(tmp_path))


def test_what_cannot_be_streamed_says_so(tmp_path, checkpoint):
    path = checkpoint()
    with pytest.raises(ValueError, match="cache: expected True"):
        t2.load_factored(path, config(tmp_path, cache=False))
    with pytest.raises(TypeError, match=r"dtype is torch.int8"):
        t2.load_factored(path, config(tmp_path), dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        t2.load_factored(tmp_path / "absent")
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected plain weights, got a quantised checkpoint"):
        t2.load_factored(path, config(tmp_path))
    (path / "config.json").unlink()
    with pytest.raises(FileFormatError, match=r"has no config.json"):
        t2.load_factored(path, config(tmp_path))


def test_weights_of_a_wrapped_model_are_checked(tmp_path, checkpoint, tiny_model):
    source = Checkpoint(checkpoint(), torch.float32)
    weights = source.weights(["q_proj"])
    model = source.load_rest(weights, torch.device("cpu"))
    with pytest.raises(ValueError, match="weights: expected one for each target layer, got none for"):
        t2.SVFModel(model, config(tmp_path, target_modules=["q_proj"]), weights={})
    with pytest.raises(ValueError, match="cache: expected True"):
        t2.SVFModel(model, config(tmp_path, target_modules=["q_proj"], cache=False), weights=weights)
    with pytest.raises(ValueError, match=r"expected target weights on the meta device, got .*q_proj.weight in memory"):
        t2.SVFModel(tiny_model(), config(tmp_path, target_modules=["q_proj"]), weights=weights)


def test_damaged_factors_of_a_streamed_model_are_computed_again(tmp_path, checkpoint):
    """From the weight beside them, or, where the whole file is gone, from the checkpoint."""
    path = checkpoint()
    svf, _ = load_svf(path, config(tmp_path))
    names = add_random_experts(svf, 2)
    expected, merged = logits(svf, names), state(svf.merged_copy(names[0]))
    for name, damage in (("q_proj", lambda file: flipped(file, "u")), ("down_proj", truncate)):
        file = tmp_path / "factors" / f"{svf.weight_keys[next(n for n in svf.weight_keys if name in n)]}.safetensors"
        damage(file)
        with pytest.warns(RuntimeWarning, match=rf"{file.name}.*computed again"):
            assert_same_state(svf.merged_copy(names[0]), merged)
        damage(file)
        with pytest.warns(RuntimeWarning, match=rf"{file.name}.*computed again"):
            again, _ = load_svf(path, config(tmp_path))
        add_random_experts(again, 2)
        assert torch.equal(logits(again, names), expected)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])
