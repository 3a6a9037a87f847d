from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

import t2kernels
from t2kernels import limits
from t2kernels.backends import extension


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


needs_extension = pytest.mark.skipif(
    bool(os.environ.get("T2KERNELS_NO_EXTENSION")), reason="installed without the extension"
)


@needs_extension
def test_backends_tell_what_runs():
    found = t2kernels.backends()
    assert list(found) == ["cpu", "triton", "reference"]
    assert found["cpu"].startswith("available"), "the extension was not built"
    assert found["reference"] == "available"


@needs_extension
def test_build_info():
    info = t2kernels.build_info()
    assert (info["extension"] and "gcc" in info["compiler"]) or "clang" in info["compiler"]
    assert info["chosen"] in info["supported"] and set(info["supported"]) <= set(info["instruction_sets"])


@needs_extension
def test_select_instruction_set_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"name: expected .*portable.*got 'neon9'"):
        t2kernels.select_instruction_set("neon9")


@needs_extension
def test_environment_chooses_the_instruction_set():
    code = "import t2kernels; print(t2kernels.build_info()['chosen'])"
    assert python(code, T2KERNELS_CPU="portable").stdout.strip() == "portable"
    wrong = python(code, T2KERNELS_CPU="mmx")
    assert wrong.returncode != 0 and "T2KERNELS_CPU: expected" in wrong.stderr and "'mmx'" in wrong.stderr


@needs_extension
def test_the_widest_supported_set_is_the_default():
    if "T2KERNELS_CPU" not in os.environ:
        order = ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon", "neon_bf16"]
        assert t2kernels.build_info()["chosen"] == max(
            (isa for isa in order if extension.supported(isa)), key=order.index
        )


def test_without_the_extension_the_reference_runs_and_says_so_once():
    run = python(
        """
        import sys
        sys.modules["t2kernels._C"] = None  # what a failed build leaves: nothing to import
        import torch, t2kernels
        from t2kernels.reference import svf_linear_ref
        print(t2kernels.backends()["cpu"])
        torch.manual_seed(0)
        layer = t2kernels.SVFLinear.from_linear(torch.nn.Linear(9, 5), dtype=torch.int8, num_experts=2)
        x, ids = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 1, 1, 0])
        for _ in range(3):
            y = layer(x, ids)
        y.square().sum().backward()
        u, s, vh = layer.weight.factors()
        z = layer.z.detach().clone().requires_grad_()
        r = svf_linear_ref(x, u, s, vh, z, layer.bias, ids)
        r.square().sum().backward()
        assert torch.allclose(y, r, atol=1e-5) and torch.allclose(layer.z.grad, z.grad, atol=1e-4)
        try:
            t2kernels.ops.factored_linear(x, [u], [vh], None, s[None], ids, None, 5, False, None, None)
        except RuntimeError as error:
            assert "slots: expected 0 <= id < 1" in str(error)
        else:
            raise AssertionError("slots out of range were taken")
        """
    )
    assert run.returncode == 0, run.stderr
    assert "extension not built" in run.stdout
    assert run.stderr.count("t2kernels: no kernel for device 'cpu'") == 1


def test_limits_of_the_machine():
    for kind in ("float32", "int16", "int8"):
        assert 10**6 // 2 <= limits.multiply_adds(kind, 10**6) <= 10**6
    assert (limits.multiply_adds("bfloat16", 10**6) > 0) == extension.bf16_products()
    reader = limits.Reader(1 << 16)
    for _ in range(3):
        reader.read(40_000)  # goes back to the start where the buffer ends
    with pytest.raises(ValueError, match="arithmetic: expected one of"):
        limits.multiply_adds("float64", 10)
    with pytest.raises(ValueError, match="count: expected 0 to 4096 bytes, got 5000"):
        limits.Reader(4096).read(5000)


@needs_extension
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer reserves all addresses")
@pytest.mark.parametrize(("rows", "terms"), [(256, 1 << 18), (1, 1 << 24)], ids=["packed rows", "a thread's scratch"])
def test_scratch_that_cannot_be_allocated_is_a_memory_error(rows, terms):
    run = python(
        f"""
        import resource, torch
        from t2kernels import ops
        def multiply(x, w):
            return ops.dense_linear(x, w, None, None, len(w), False)
        multiply(torch.ones(2, 8), torch.ones(16, 8))
        x, w = torch.ones({rows}, {terms}), torch.ones(2, {terms})
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, -1))
        try:
            multiply(x, w)
        except MemoryError:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            assert multiply(x, w)[-1, 0] == {terms}
            print("refused")
        """
    )
    assert run.stdout == "refused\n", run.stderr
