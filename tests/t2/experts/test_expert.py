from __future__ import annotations

import json
import os
import struct

import pytest
import torch

from t2 import Expert, ExpertBank, FileFormatError, Layout
from t2.weights.files import read_safetensors, write_safetensors


@pytest.fixture
def layout():
    return Layout(names=("a.q", "a.k", "b.q"), ranks=(4, 1, 7), fingerprint="f" * 64, base_model="tiny")


def test_layout(layout):
    assert layout.R == 12 and layout.offsets == (0, 4, 5) and layout.window("b.q") == slice(5, 12)
    assert Layout.from_metadata(layout.to_metadata()) == layout
    with pytest.raises(ValueError, match=r"name: expected a decomposed matrix, got 'c'"):
        layout.window("c")
    for names, ranks in [((), ()), (("a",), (1, 2)), (("a", "a"), (1, 2)), (("a",), (0,))]:
        with pytest.raises(ValueError, match=r"ranks?: |names: "):
            Layout(names, ranks, "f")


def test_expert_round_trip(layout, tmp_path):
    expert = Expert(torch.randn(12, dtype=torch.float64), layout, {"task": "sums", "seed": "3"})
    expert.save(tmp_path / "x.safetensors")
    loaded = Expert.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.z, expert.z) and loaded.z.dtype == torch.float32
    assert loaded.layout == layout and loaded.metadata == expert.metadata
    assert torch.equal(expert["a.k"], expert.z[4:5])


def test_expert_owns_its_vector(layout):
    z = torch.ones(12)
    expert = Expert(z, layout)
    z.zero_()
    assert expert.z.sum() == 12


def test_random_experts_are_reproducible(layout):
    assert torch.equal(Expert.random(layout, seed=3).z, Expert.random(layout, seed=3).z)
    assert not torch.equal(Expert.random(layout, seed=3).z, Expert.random(layout, seed=4).z)


@pytest.mark.parametrize(
    "z, error, text",
    [
        (torch.ones(11), ValueError, r"z: expected shape \[12\].*got \[11\]"),
        (torch.ones(12, dtype=torch.int64), TypeError, "z: expected a float dtype"),
        (torch.ones(12) / 0, ValueError, "z: expected finite values, got 12 NaN or infinite"),
        (torch.ones(12, dtype=torch.float64) * 1e300, ValueError, "z: expected finite values, got 12"),
        (torch.ones(12).to(torch.float8_e4m3fn), TypeError, "z: expected a float dtype of at least 16 bits"),
        (torch.tensor([float("nan")] + [1.0] * 11), ValueError, "z: expected finite values, got 1"),
        ([1.0] * 12, TypeError, "z: expected a tensor.*got list"),
    ],
)
def test_bad_vectors(layout, z, error, text):
    with pytest.raises(error, match=text):
        Expert(z, layout)


def test_bank_round_trip_and_mix(layout, tmp_path):
    bank = ExpertBank(layout)
    for seed, name in enumerate(("math", "code", "text")):
        bank.add(name, Expert.random(layout, seed=seed))
    bank.save(tmp_path / "bank.safetensors")
    loaded = ExpertBank.load(tmp_path / "bank.safetensors")
    assert loaded.names == ["math", "code", "text"] and torch.equal(loaded.matrix, bank.matrix)
    mixed = bank.mix({"text": 0.25, "math": 0.5})
    torch.testing.assert_close(mixed, 0.25 * bank["text"].z + 0.5 * bank["math"].z)
    alpha = torch.tensor([[0.5, 0.0, 0.25], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(bank.mix(alpha), torch.stack([mixed, bank["code"].z]))
    bank.remove("math")
    assert bank.names == ["code", "text"] and "math" not in bank and len(bank) == 2


def test_empty_bank_round_trip(layout, tmp_path):
    ExpertBank(layout).save(tmp_path / "bank.safetensors")
    assert len(ExpertBank.load(tmp_path / "bank.safetensors")) == 0


def test_bank_refuses(layout):
    bank = ExpertBank(layout)
    bank.add("math", Expert.random(layout))
    other = Layout(("a.q", "a.k", "b.q"), (4, 2, 7), "f" * 64)
    reordered = Layout(("a.k", "a.q", "b.q"), (1, 4, 7), "f" * 64)
    for call, text in [
        (lambda: bank.add("math", Expert.random(layout)), "name: expected one not yet in the bank, got 'math'"),
        (lambda: bank.add("", Expert.random(layout)), "name: expected a non-empty string"),
        (lambda: bank.add("x", Expert.random(other)), "expert 'x': expected rank 1 for a.k, got rank 2"),
        (lambda: bank.add("x", Expert.random(reordered)), "same names in another order"),
        (lambda: bank["code"], r"expert: expected one of \['math'\], got 'code'"),
        (lambda: bank.remove("code"), "got 'code'"),
        (lambda: bank.mix({"math": 1.0, "code": 1.0}), "got 'code'"),
        (lambda: bank.mix({}), "weights: expected at least one"),
        (lambda: bank.mix({"math": float("inf")}), "weights: expected finite"),
        (lambda: bank.mix({"math": 3e38}), "weights: the mix: expected finite values"),
        (lambda: bank.mix(torch.ones(2, 3)), r"weights: expected shape \[B, 1\]"),
        (lambda: bank.mix(torch.full((2, 1), float("nan"))), "weights: expected finite"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    assert bank.names == ["math"]


class TestBadFiles:
    @pytest.fixture
    def path(self, layout, tmp_path):
        path = tmp_path / "x.safetensors"
        Expert.random(layout).save(path)
        return path

    @pytest.mark.parametrize("keep", [0, 4, 30, -1])
    def test_truncated(self, path, keep):
        data = path.read_bytes()
        path.write_bytes(data[:keep])
        with pytest.raises(FileFormatError, match=str(path)):
            Expert.load(path)

    def test_pickle(self, path, layout):
        torch.save({"z": torch.ones(12)}, path)
        with pytest.raises(FileFormatError, match="never pickle"):
            Expert.load(path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing"):
            Expert.load(tmp_path / "nothing.safetensors")

    def test_a_bank_is_no_expert(self, path, layout, tmp_path):
        ExpertBank(layout).save(path)
        with pytest.raises(FileFormatError, match="expected a t2-expert file"):
            Expert.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"format_version": "99"},
            {"format": "other"},
            {"names": "["},
            {"ranks": json.dumps([1, 2])},
            {"ranks": json.dumps([4, 1, 8])},
        ],
    )
    def test_wrong_metadata(self, path, change):
        tensors, metadata = read_safetensors(path)
        write_safetensors(path, tensors, metadata | change)
        with pytest.raises(FileFormatError):
            Expert.load(path)

    DEEP = "[" * 100_000

    @pytest.mark.parametrize(
        "field, text",
        [
            *(
                ("ranks", text)
                for text in ("[Infinity, 1, 7]", '["4", 1, 7]', "12", "[4.5, 1, 7]", "[true, 4, 7]", DEEP)
            ),
            *(("names", text) for text in ("[1, 2, 3]", '[["a"], ["b"], ["c"]]', "5", '"abc"', DEEP, '["a", "b", ""]')),
            *(("metadata", text) for text in ("5", "[]", "{", '{"a": 1}', '{"a": NaN}', DEEP, '{"a": "\\ud800"}')),
        ],
    )
    def test_a_field_of_another_kind_is_named(self, path, field, text):
        tensors, metadata = read_safetensors(path)
        write_safetensors(path, tensors, metadata | {field: text})
        with pytest.raises(FileFormatError, match=rf"{path.name}: {field}: "):
            Expert.load(path)

    @pytest.mark.parametrize("names", ["5", "[5]", "[", DEEP, '["a", "a"]', '[""]', "{}", '{"a": 1, "b": 2}'])
    def test_names_of_a_bank(self, layout, tmp_path, names):
        bank, path = ExpertBank(layout), tmp_path / "bank.safetensors"
        for name in ("a", "b"):
            bank.add(name, Expert.random(layout))
        bank.save(path)
        tensors, metadata = read_safetensors(path)
        write_safetensors(path, tensors, metadata | {"experts": names})
        with pytest.raises(FileFormatError, match=r"bank\.safetensors: expe"):
            ExpertBank.load(path)

    @pytest.mark.parametrize(
        "dtype, shape, body",
        [
            ("F64", [12], struct.pack("<12d", *[1e300] * 12)),
            ("F32", [], bytes(4)),
            ("F32", [2, 12], bytes(96)),
            ("F8_E4M3", [12], bytes(12)),
            ("I32", [12], bytes(48)),
        ],
    )
    def test_z_of_another_kind(self, path, dtype, shape, body):
        _, metadata = read_safetensors(path)
        header = {"__metadata__": metadata, "z": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(body)]}}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)
        with pytest.raises(FileFormatError, match=path.name):
            Expert.load(path)

    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileFormatError, match="pipe is no regular file"):
            Expert.load(tmp_path / "pipe")

    def test_foreign_safetensors_file(self, path):
        write_safetensors(path, {"z": torch.ones(12)}, {})
        with pytest.raises(FileFormatError, match="expected a t2-expert file"):
            Expert.load(path)

    def test_nan_inside(self, path):
        tensors, metadata = read_safetensors(path)
        tensors["z"][3] = float("nan")
        write_safetensors(path, tensors, metadata)
        with pytest.raises(ValueError, match="z: expected finite"):
            Expert.load(path)

    def test_unwritable(self, layout, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            Expert.random(layout).save(tmp_path / "file" / "x.safetensors")


def test_half_precision_files_round_z_once(tmp_path):
    layout = Layout(("a", "b"), (4000, 7), "f" * 64)
    expert = Expert.random(layout, seed=3)
    expert.save(tmp_path / "full.safetensors")
    expert.save(tmp_path / "half.safetensors", torch.float16)
    loaded = Expert.load(tmp_path / "half.safetensors")
    assert loaded.z.dtype == torch.float32 and torch.equal(loaded.z, expert.z.half().float())
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "full.safetensors").stat().st_size
    with pytest.raises(TypeError, match=r"dtype: expected float32 or float16, got torch.int8"):
        expert.save(tmp_path / "other.safetensors", torch.int8)
