from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
import torch

from t2.weights import factor_cache as svd
from t2.weights.factor_cache import FactorCache, decompose_weights, reconstruction_error, weight_key
from t2.weights.files import FileFormatError, read_safetensors, write_safetensors
from t2kernels import Factors, decompose, decomposition


def orthogonality(factors: Factors) -> float:
    u, _, vh = (t.double() for t in factors)
    eye = torch.eye(u.shape[1], dtype=torch.float64)
    return max(float((g - eye).abs().max()) for g in (u.T @ u, vh @ vh.T))


def check(weight: torch.Tensor) -> Factors:
    factors = decompose(weight)
    u, s, vh = factors
    rank = min(weight.shape)
    assert (u.shape, s.shape, vh.shape) == ((weight.shape[0], rank), (rank,), (rank, weight.shape[1]))
    assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in factors)
    assert (s >= 0).all() and (s[1:] <= s[:-1]).all()
    assert orthogonality(factors) < 1e-6
    exact = weight.detach().double()
    difference = u.double() * s.double() @ vh.double() - exact
    assert difference.norm() <= 3e-7 * exact.norm()
    assert (s.double() - torch.linalg.svdvals(exact)).abs().max() <= 3e-7 * exact.norm()
    assert (u.amax(0) >= -u.amin(0)).all()  # of two entries that tie, either may be the positive one
    return factors


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (7, 7), (577, 1), (577, 7), (7, 1031), (577, 129)])
@pytest.mark.parametrize("dtype", decomposition.FLOAT_DTYPES)
def test_shapes_and_dtypes(shape, dtype):
    check(torch.randn(shape).to(dtype))


def test_larger_than_one_block():
    check(torch.randn(577, 1031))


def test_strides_and_gradients_do_not_matter():
    weight = torch.randn(40, 60)
    expected = check(weight)
    wide = torch.zeros(40, 120)
    wide[:, ::2] = weight
    for same in (weight.T.contiguous().T, wide[:, ::2], torch.nn.Parameter(weight)):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(check(same), expected, strict=True))


def spectrum(singular: torch.Tensor, rows: int) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(rows, len(singular), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(len(singular), len(singular), dtype=torch.float64))[0]
    return u * singular @ v


HARD = {
    "zeros": torch.zeros(30, 20),
    "rank 1": torch.outer(torch.randn(90), torch.randn(70)),
    "ones": torch.ones(64, 64),
    "rank 5": torch.randn(90, 5) @ torch.randn(5, 80),
    "one entry": torch.zeros(9, 12).index_put((torch.tensor(4), torch.tensor(7)), torch.tensor(-3.0)),
    "zero rows and columns": torch.randn(50, 40) * (torch.arange(50)[:, None] > 9) * (torch.arange(40) > 5),
    "equal columns": torch.randn(50, 1).expand(50, 30) + torch.randn(50, 30) * (torch.arange(30) > 20),
    "identity": torch.eye(33),
    "orthogonal": torch.linalg.qr(torch.randn(80, 80))[0],
    "repeated": spectrum(torch.tensor([5.0] * 10 + [2.0] * 10 + [0.0] * 5, dtype=torch.float64), 40),
    "tiny": torch.randn(20, 20) * 1e-38,
    "huge": torch.randn(20, 20) * 1e36,
    "graded rows": torch.randn(60, 60) * torch.logspace(0, -30, 60)[:, None],
    "hilbert": 1 / (torch.arange(1, 61)[:, None] + torch.arange(60)[None, :]).float(),
    **{f"condition 1e{k}": spectrum(torch.logspace(0, -k, 120, dtype=torch.float64), 200) for k in (3, 4, 5, 7, 12)},
    "one small": spectrum(torch.tensor([1.0] * 99 + [1e-7], dtype=torch.float64), 100),
    "one large": spectrum(torch.tensor([1e6] + [1.0] * 99, dtype=torch.float64), 100),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("transposed", [False, True])
def test_hard_inputs(name, transposed):
    weight = HARD[name].T if transposed else HARD[name]
    if name == "tiny":  # subnormal float32: only the absolute error can be small
        factors = decompose(weight)
        assert orthogonality(factors) < 1e-6 and ((factors.u * factors.s) @ factors.vh - weight).abs().max() < 1e-43
    else:
        check(weight)


def test_ill_conditioned_inputs_need_the_qr_route(monkeypatch):
    monkeypatch.setattr(decomposition, "SAFE_RATIO", 0.0)
    assert orthogonality(decompose(HARD["condition 1e7"])) > 1e-5


def test_same_input_same_bits():
    weight = torch.randn(100, 80)
    assert all(torch.equal(a, b) for a, b in zip(decompose(weight), decompose(weight.clone()), strict=True))


@pytest.mark.parametrize("function", [decompose, weight_key])
@pytest.mark.parametrize(
    ("weight", "error", "match"),
    [
        ([[1.0]], TypeError, "weight is list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "weight is torch.int64"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "weight is torch.complex64"),
        (torch.ones(3), ValueError, r"weight has shape \(3,\)"),
        (torch.ones(0, 3), ValueError, r"weight has shape \(0, 3\)"),
        (torch.ones(2, 2, device="meta"), ValueError, "on meta"),
        (torch.ones(2, 2).to_sparse(), ValueError, "sparse"),
    ],
)
def test_rejects(function, weight, error, match):
    with pytest.raises(error, match=match):
        function(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_rejects_values_beyond_float32(value):
    weight = torch.ones(3, 3, dtype=torch.float64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"weight has [01] NaN or infinite values of 9"):
        decompose(weight)


def test_reconstruction_error():
    weight = torch.randn(30, 20)
    u, s, vh = decompose(weight)
    assert reconstruction_error(weight, Factors(u, s, vh)) < 1e-6
    expected = s[-1] / weight.norm()
    s = s.clone()
    s[-1] = 0
    assert reconstruction_error(weight, Factors(u, s, vh)) == pytest.approx(float(expected), rel=1e-4)
    assert reconstruction_error(torch.zeros(3, 2), decompose(torch.zeros(3, 2))) == 0
    assert reconstruction_error(HARD["huge"], decompose(HARD["huge"])) < 1e-6
    with pytest.raises(ValueError, match="factors have shapes"):
        reconstruction_error(weight.T, Factors(u, s, vh))


def test_key_depends_on_content_dtype_and_shape_only():
    weight = torch.randn(6, 8)
    same = [weight.clone(), weight.T.contiguous().T, torch.nn.Parameter(weight), weight.repeat(1, 2)[:, :8]]
    assert {weight_key(w) for w in same} == {weight_key(weight)}
    changed = weight.clone()
    changed[5, 7] = torch.nextafter(changed[5, 7], torch.tensor(9.0))
    other = [
        weight,
        changed,
        weight.double(),
        weight.reshape(8, 6),
        weight.T,
        weight.half(),
        weight.bfloat16(),
    ]
    assert len({weight_key(w) for w in other}) == len(other)
    assert weight_key(torch.zeros(2, 2)) != weight_key(-torch.zeros(2, 2))
    assert weight_key(torch.zeros(2, 2).half()) != weight_key(torch.zeros(2, 2).bfloat16())


@pytest.fixture
def cache(tmp_path):
    return FactorCache(tmp_path / "factors")


def saved(cache: FactorCache, weight: torch.Tensor) -> str:
    key = weight_key(weight)
    factors = decompose(weight)
    cache.save(key, weight, factors, reconstruction_error(weight, factors))
    return key


@pytest.mark.parametrize("dtype", decomposition.FLOAT_DTYPES)
def test_cache_round_trip(cache, dtype):
    weight = torch.randn(9, 5).to(dtype)
    assert weight_key(weight) not in cache
    key = saved(cache, weight.T.contiguous().T)
    assert key in cache and 0 < cache.error(key) < 1e-6
    loaded = cache.load_weight(key)
    assert loaded.dtype == dtype and torch.equal(loaded, weight)
    assert all(torch.equal(a, b) for a, b in zip(cache.load(key), decompose(weight.T.contiguous().T), strict=True))
    cache.verify(key)


def test_cache_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("T2_CACHE", str(tmp_path))
    assert FactorCache().directory == tmp_path / "factors"


def test_cache_errors(cache, tmp_path):
    absent = "0" * 64
    for read in (cache.load, cache.load_weight, cache.error, cache.verify):
        with pytest.raises(FileNotFoundError, match=absent):
            read(absent)
        with pytest.raises(ValueError, match=r"key is '\.\./x'"):
            read("../x")
    key = saved(cache, torch.randn(9, 5))
    path = cache.path(key)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert key not in cache
        with pytest.raises(FileFormatError, match="truncated"):
            cache.load(key)
    path.write_bytes(whole.replace(b'"version":"2"', b'"version":"1"'))
    assert key not in cache
    with pytest.raises(FileFormatError, match=r"'1'.*delete the file"):
        cache.load(key)


def test_damaged_content_is_found(cache):
    weight = torch.randn(9, 5)
    key = saved(cache, weight)
    u, s, vh = decompose(weight)
    cache.save(key, weight + 1, Factors(u, s, vh), 0.0)
    with pytest.raises(FileFormatError, match="not the one of this key"):
        cache.load_weight(key)
    cache.save(key, weight, Factors(u, s.flip(0).contiguous(), vh), 0.0)
    with pytest.raises(FileFormatError, match="reconstruction error"):
        cache.verify(key)
    cache.save(key, weight, Factors(u, s * float("nan"), vh), 0.0)
    with pytest.raises(FileFormatError, match="reconstruction error"):
        cache.verify(key)
    cache.save(key, weight, Factors(u[:, :3], s, vh), 0.0)
    with pytest.raises(FileFormatError, match="shapes"):
        cache.verify(key)


def flipped(path, tensor, bit=20):
    """Flips a bit of a number in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    start, end = json.loads(bytes(data[8 : 8 + length]))[tensor]["data_offsets"]
    place = 8 + length + start + 4 * ((end - start) // 8) + bit // 8
    data[place] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["u", "s", "vh"])
@pytest.mark.parametrize("bit", [0, 20, 31])
def test_each_bit_of_the_factors_is_checked_and_they_are_computed_again(cache, tensor, bit):
    weight = torch.randn(9, 5)
    key = saved(cache, weight)
    before = cache.path(key).read_bytes()
    flipped(cache.path(key), tensor, bit)
    with pytest.raises(FileFormatError, match=rf"{key}.*checksum differs"):
        cache.load(key)
    with pytest.warns(RuntimeWarning, match=rf"{key}.*computed again"):
        factors = cache.load_or_redo(key)
    assert all(map(torch.equal, factors, decompose(weight)))
    assert all(map(torch.equal, cache.load(key), factors)) and len(cache.path(key).read_bytes()) == len(before)


def test_another_matrix_of_the_same_shape_is_no_substitute(cache):
    weight = torch.randn(9, 5)
    key, other = saved(cache, weight), saved(cache, torch.randn(9, 5))
    shutil.copy(cache.path(other), cache.path(key))
    with pytest.raises(FileFormatError, match=f"{key}.*not the one of this"):
        cache.load_or_redo(key)
    with pytest.raises(FileFormatError, match=f"{key}.*not the one of this"):
        cache.load_or_redo(key, torch.randn(9, 5))
    with pytest.warns(RuntimeWarning, match=key):
        assert all(map(torch.equal, cache.load_or_redo(key, lambda: weight), decompose(weight)))
    cache.verify(key)


@pytest.mark.parametrize("change", [{"checksum": ""}, {"reconstruction_error": "x"}, {"reconstruction_error": "nan"}])
def test_metadata_that_is_none_is_computed_again(cache, change):
    weight = torch.randn(9, 5)
    key = saved(cache, weight)
    tensors, metadata = read_safetensors(cache.path(key))
    write_safetensors(cache.path(key), tensors, metadata | change)
    assert key not in cache
    with pytest.warns(RuntimeWarning, match=rf"{key}.*computed again"):
        assert not decompose_weights({"a": weight}, cache, progress=False)["a"].cached
    cache.verify(key)


def test_files_without_a_checksum_are_as_good_as_absent(cache, recwarn):
    weight = torch.randn(9, 5)
    key = saved(cache, weight)
    tensors, metadata = read_safetensors(cache.path(key))
    write_safetensors(cache.path(key), tensors, metadata | {"version": "1"})
    assert not decompose_weights({"a": weight}, cache, progress=False)["a"].cached
    assert not recwarn.list and decompose_weights({"a": weight}, cache, progress=False)["a"].cached


def test_names_of_files_outlive_their_version():
    """Experts know their base by them."""
    assert weight_key(torch.zeros(2, 2)) == "eb8f951dc05aa1d3d67ab5819119f357442107aa76175855310abdb7ef4eba9b"


def test_check_writable_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(svd, "decompose", lambda weight: pytest.fail("no work before the check"))
    (tmp_path / "file").write_text("")
    cache = FactorCache(tmp_path / "file" / "factors")
    with pytest.raises(OSError, match=f"cache folder {cache.directory} is not writable"):
        cache.check_writable()
    with pytest.raises(OSError, match="not writable"):
        decompose_weights({"a": torch.randn(3, 2)}, cache, progress=False)


def weights(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}": torch.randn(24 + i, 32, generator=generator) for i in range(count)}


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_decompose_weights(cache, workers, capfd):
    before, given = torch.get_num_threads(), weights(6)
    called = []
    lazy = {n: (lambda n=n: called.append(n) or given[n]) if i % 2 else w for i, (n, w) in enumerate(given.items())}
    results = decompose_weights(lazy, cache, workers=workers)
    assert list(results) == list(given) and sorted(called) == list(given)[1::2]
    for name, result in results.items():
        assert result.key == weight_key(given[name]) and result.rank == min(given[name].shape)
        assert not result.cached and result.error < 1e-6 and result.seconds > 0
        cache.verify(result.key)
    assert "6/6" in capfd.readouterr().err
    assert torch.get_num_threads() == before
    started = []
    thread = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert started == [before]
    again = decompose_weights(given, cache, progress=False, workers=workers)
    assert all(r.cached and r.error == results[n].error for n, r in again.items())
    assert capfd.readouterr().err == ""


def test_decompose_weights_errors(cache):
    with pytest.raises(ValueError, match="workers is 0"):
        decompose_weights({}, cache, workers=0)
    with pytest.raises(TypeError, match="weights is list"):
        decompose_weights([], cache)
    with pytest.raises(ValueError, match=r"weights\['bad'\]: weight has shape \(3,\)"):
        decompose_weights({"good": torch.ones(2, 2), "bad": torch.ones(3)}, cache, progress=False)
    with pytest.raises(TypeError, match=r"weights\['bad'\]: weight is NoneType"):
        decompose_weights({"bad": lambda: None}, cache, progress=False)
    assert decompose_weights({}, cache, progress=False) == {}


def test_interrupt_keeps_whole_files_and_threads(cache):
    before = torch.get_num_threads()

    def interrupt():
        raise KeyboardInterrupt

    given = {**weights(3), "stop": interrupt, **{f"later {i}": (lambda: time.sleep(0.2)) for i in range(100)}}
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        decompose_weights(given, cache, progress=False, workers=1)
    assert time.perf_counter() - start < 5 and torch.get_num_threads() == before
    assert sorted(os.listdir(cache.directory)) == sorted(f"{weight_key(w)}.safetensors" for w in weights(3).values())


SCRIPT = """
import sys, time, torch
from t2.svd import FactorCache, decompose_weights
generator = torch.Generator().manual_seed(0)
weights = {f"layer.{i}": torch.randn(24 + i, 32, generator=generator) for i in range(40)}
def slow(w):
    def get():
        time.sleep(float(sys.argv[2]))
        return w
    return get
print("ready", flush=True)
decompose_weights({n: slow(w) for n, w in weights.items()},
                  FactorCache(sys.argv[1]), progress=False, workers=2)
"""


def start(cache: FactorCache, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(cache.directory), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_resumes_after_kill(cache):
    given = weights(40)
    process = start(cache, 0.1)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    deadline = time.time() + 60
    while not cache.directory.exists() or len(list(cache.directory.glob("*.safetensors"))) < 5:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {n for n, w in given.items() if weight_key(w) in cache}
    assert 5 <= len(finished) < 40
    times = {n: cache.path(weight_key(given[n])).stat().st_mtime_ns for n in finished}
    results = decompose_weights(given, cache, progress=False)
    assert {n for n, r in results.items() if r.cached} == finished
    assert times == {n: cache.path(results[n].key).stat().st_mtime_ns for n in finished}
    for result in results.values():
        cache.verify(result.key)


def test_two_processes_at_once(cache):
    processes = [start(cache, 0.0), start(cache, 0.0)]
    assert [p.wait(timeout=60) for p in processes] == [0, 0]
    for weight in weights(40).values():
        cache.verify(weight_key(weight))
    assert len(os.listdir(cache.directory)) == 40


def test_stale_temporary_files_are_swept(cache):
    cache.check_writable()
    old, new = cache.directory / ".a.1-2.tmp", cache.directory / ".b.1-2.tmp"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    decompose_weights({}, cache, progress=False)
    assert os.listdir(cache.directory) == [new.name]


def test_a_full_cache_needs_no_write_access(tmp_path, monkeypatch):
    weights = {"a": torch.randn(5, 4)}
    cache = FactorCache(tmp_path / "cache")
    decompose_weights(weights, cache, progress=False)

    def refuse(self):
        raise OSError("read-only")

    monkeypatch.setattr(FactorCache, "check_writable", refuse)
    assert decompose_weights(weights, cache, progress=False)["a"].cached
    with pytest.raises(OSError, match="read-only"):
        decompose_weights({"b": torch.randn(5, 4)}, cache, progress=False)
