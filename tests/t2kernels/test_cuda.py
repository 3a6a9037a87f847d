"""The CUDA decode kernel without a GPU: its arithmetic on an emulation of CUDA, its machine code from nvcc.

`csrc/cuda/decode.cuh` is compiled twice here: by the C++ compiler against tests/cuda/emulation.h, to be run and
compared with float64, and by nvcc, to see that no target spills and that loads and products are the instructions meant.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import nvcc_compile  # noqa: E402

CUDA = ROOT / "csrc" / "cuda"
MAX_LAYERS, MAX_PARTS = 3, 2
STORAGE_ID = {torch.bfloat16: 0, torch.float16: 1, torch.int8: 2}
STORAGE = {
    "bf16": (torch.bfloat16,),
    "f16": (torch.float16,),
    "int8": (torch.int8,),
    "int8 with f16 head": (torch.float16, torch.int8),
}
HEAD = 32
BEHIND = 4096  # entries kept free behind what the kernel writes


class CPart(ctypes.Structure):
    _fields_ = [
        ("vh", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("storage", ctypes.c_int),
    ]


class CLayer(ctypes.Structure):
    _fields_ = [
        ("parts", CPart * MAX_PARTS),
        ("part_count", ctypes.c_int),
        ("scales", ctypes.c_void_p),
        ("scales_stride", ctypes.c_int64),
        ("component_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("out", ctypes.c_int64),
    ]


class CGroup(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("slot_count", ctypes.c_int64),
        ("rows_per_slot", ctypes.c_int64),
        ("layers", CLayer * MAX_LAYERS),
        ("layer_count", ctypes.c_int),
        ("workspace", ctypes.c_void_p),
    ]


@dataclass
class Layer:
    u: list[Tensor]
    vh: list[Tensor]
    component_scale: Tensor | None
    scales: Tensor
    bias: Tensor | None

    @property
    def out(self) -> int:
        return self.u[0].shape[0]


@dataclass
class Problem:
    x: Tensor
    slots: Tensor
    layers: list[Layer] = field(default_factory=list)

    def rows(self, begin: int, end: int) -> Problem:
        """The same layers for some of the rows; one slot per row."""
        return Problem(self.x[begin:end].contiguous(), self.slots[begin:end].contiguous(), self.layers)


def problem(in_features, shapes, storage, rows, experts=7, rows_per_slot=1, bias=True, seed=0) -> Problem:
    """`shapes` holds (rank, out) of each layer. An int8 component has a scale, as quantisation leaves it."""
    g = torch.Generator().manual_seed(seed)

    def factor(n, k, dtype):
        if dtype == torch.int8:
            return torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
        return torch.randn(n, k, generator=g).to(dtype)

    def layer(rank, out):
        ranks = [rank] if len(storage) == 1 else [HEAD, rank - HEAD]
        component = [torch.rand(r, generator=g) + 0.5 for r in ranks]
        if storage[-1] == torch.int8:
            component[-1] /= 74**2
        table = torch.randn(experts, rank + 5, generator=g)
        return Layer(
            u=[factor(out, r, dtype) for r, dtype in zip(ranks, storage, strict=True)],
            vh=[factor(r, in_features, dtype) for r, dtype in zip(ranks, storage, strict=True)],
            component_scale=torch.cat(component) if torch.int8 in storage else None,
            scales=table[:, 3 : 3 + rank],
            bias=torch.randn(out, generator=g).mul(rank**0.5).bfloat16() if bias else None,
        )

    return Problem(
        torch.randn(rows, in_features, generator=g).div(in_features**0.5).bfloat16(),
        torch.randint(0, experts, (rows // rows_per_slot,), generator=g),
        [layer(rank, out) for rank, out in shapes],
    )


def as_multiplied(factors: list[Tensor], dim: int) -> Tensor:
    """The parts joined, in float64, float16 rounded to bfloat16."""
    return torch.cat([f.bfloat16().double() if f.dtype == torch.float16 else f.double() for f in factors], dim)


def expected(p: Problem) -> list[Tensor]:
    """float64, but for the roundings that the kernel documents: the scaled intermediate is bfloat16."""
    ys = []
    slots = p.slots.repeat_interleave(len(p.x) // len(p.slots))
    for layer in p.layers:
        scale = layer.scales[slots].double()
        if layer.component_scale is not None:
            scale = scale * layer.component_scale.double()
        t = (p.x.double() @ as_multiplied(layer.vh, 0).T * scale).bfloat16().double()
        y = t @ as_multiplied(layer.u, 1).T
        ys.append(y if layer.bias is None else y + layer.bias.double())
    return ys


def c_group(p: Problem) -> tuple[CGroup, list[Tensor], list[Tensor]]:
    """The struct, the outputs, and what is behind each array that the kernel writes. All of it starts as NaN."""
    behind = []

    def written(rows: int, columns: int) -> Tensor:
        whole = torch.full((rows * columns + BEHIND,), torch.nan, dtype=torch.bfloat16)
        behind.append(whole[rows * columns :])
        return whole[: rows * columns].view(rows, columns)

    ys = [written(len(p.x), layer.out) for layer in p.layers]
    workspace = written(len(p.x), sum(layer.scales.shape[1] for layer in p.layers))
    group = CGroup(
        p.x.data_ptr(),
        *p.x.shape,
        p.slots.data_ptr(),
        min(len(layer.scales) for layer in p.layers),
        len(p.x) // max(len(p.slots), 1),
        layer_count=len(p.layers),
        workspace=workspace.data_ptr(),
    )
    for c, layer, y in zip(group.layers, p.layers, ys, strict=False):
        for part, u, vh in zip(c.parts, layer.u, layer.vh, strict=False):
            part.u, part.vh, part.rank = u.data_ptr(), vh.data_ptr(), vh.shape[0]
            part.storage = STORAGE_ID[u.dtype]
        c.part_count = len(layer.u)
        c.scales, c.scales_stride = layer.scales.data_ptr(), layer.scales.stride(0)
        c.component_scale = None if layer.component_scale is None else layer.component_scale.data_ptr()
        c.bias = None if layer.bias is None else layer.bias.data_ptr()
        c.y, c.out = y.data_ptr(), layer.out
    return group, ys, behind


class Emulated:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._emulate, self._unsupported = library.t2_emulate, library.t2_unsupported
        for function in (self._emulate, self._unsupported):
            function.restype = ctypes.c_char_p
        self.chunks_before_grid_barrier = library.t2_chunks_before_grid_barrier
        assert library.t2_group_bytes() == ctypes.sizeof(CGroup)

    def run(self, p: Problem, blocks: int = 5) -> list[Tensor]:
        group, ys, behind = c_group(p)
        assert self._unsupported(ctypes.byref(group)) is None
        error = self._emulate(ctypes.byref(group), blocks)
        assert error is None, error.decode()
        assert all(each.isnan().all() for each in behind), "written behind the end"
        return ys

    def why_unsupported(self, group: CGroup) -> str | None:
        reason = self._unsupported(ctypes.byref(group))
        return None if reason is None else reason.decode()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Emulated:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("cuda") / "emulated.so"
    flags = "-std=c++20 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas -U_FORTIFY_SOURCE -DT2_EMULATE -shared -fPIC"
    include = [f"-I{CUDA}", f"-I{ROOT / 'tests' / 'cuda'}"]
    source = ROOT / "tests" / "cuda" / "emulated.cpp"
    subprocess.run([compiler, *flags.split(), *include, str(source), "-o", str(library)], check=True)
    return Emulated(ctypes.CDLL(str(library)))


def assert_close(ys: list[Tensor], wanted: list[Tensor]) -> None:
    """Half a bfloat16 step, and a little for intermediates that round the other way; a chunk left out is far more."""
    for y, w in zip(ys, wanted, strict=True):
        torch.testing.assert_close(y.double(), w, rtol=2**-8, atol=4e-3 * float(w.abs().max()))


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.view(torch.int16), b.view(torch.int16))


# in, (rank, out) of each layer: a chunk or two, less than a unit of 256 bytes, odd out, two units a warp
SHAPES = [
    (16, [(48, 16)]),
    (48, [(48, 33)]),
    (576, [(576, 560), (192, 200), (48, 1)]),
    (1040, [(1040, 1040)]),
]


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str(s[0]))
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 16])
def test_agrees_with_float64(emulated, rows, shape, storage):
    for experts in (1, 7):
        p = problem(*shape, STORAGE[storage], rows, experts, seed=rows)
        assert_close(emulated.run(p), expected(p))


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("rows", "rows_per_slot"), [(4, 2), (16, 8), (9, 3), (16, 16)])
def test_several_rows_per_slot_without_bias(emulated, rows, rows_per_slot, storage):
    p = problem(176, [(64, 40), (160, 72)], STORAGE[storage], rows, rows_per_slot=rows_per_slot, bias=False)
    assert_close(emulated.run(p), expected(p))


@pytest.mark.parametrize("storage", STORAGE)
def test_more_units_than_a_turn_of_the_warps(emulated, storage):
    p = problem(4624, [(2080, 24)], STORAGE[storage], 2)
    assert_close(emulated.run(p, blocks=8), expected(p))


@pytest.mark.parametrize("storage", STORAGE)
def test_bits_of_a_row_do_not_depend_on_batch_or_grid(emulated, storage):
    p = problem(576, [(304, 200), (48, 33)], STORAGE[storage], 16)
    whole = emulated.run(p)
    for blocks in (1, 3, 20):
        for a, b in zip(whole, emulated.run(p, blocks), strict=True):
            assert_same_bits(a, b)
    for begin, end in [(0, 1), (5, 6), (15, 16), (2, 9), (8, 16), (3, 12)]:
        for a, b in zip(whole, emulated.run(p.rows(begin, end)), strict=True):
            assert_same_bits(a[begin:end], b)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rows", [8, 16])
def test_bits_of_a_row_do_not_depend_on_what_is_in_the_others(emulated, rows, storage):
    p = problem(144, [(176, 56)], STORAGE[storage], rows)
    before = emulated.run(p)[0]
    for row in (0, rows // 2 - 1, rows - 1):
        x = torch.full_like(p.x, torch.nan)
        x[row] = p.x[row]
        scales = torch.full_like(p.layers[0].scales, torch.inf)
        scales[p.slots[row]] = p.layers[0].scales[p.slots[row]]
        layer = Layer(**{**vars(p.layers[0]), "scales": scales})
        assert_same_bits(emulated.run(Problem(x, p.slots, [layer]))[0][row], before[row])


@pytest.mark.parametrize("rows", [8, 16])
def test_a_slot_that_is_not_there_is_nan_in_its_row_alone(emulated, rows):
    p = problem(144, [(176, 56), (48, 33)], STORAGE["int8 with f16 head"], rows, experts=7)
    before = emulated.run(p)
    for row, slot in ((0, 7), (rows // 2, -1), (rows - 1, 1 << 32)):
        slots = p.slots.clone()
        slots[row] = slot
        others = torch.arange(rows) != row
        for y, whole in zip(emulated.run(Problem(p.x, slots, p.layers)), before, strict=True):
            assert y[row].isnan().all()
            assert_same_bits(y[others], whole[others])


def test_second_product_is_on_its_way_before_the_barrier(emulated):
    p = problem(576, [(80, 80)], STORAGE["bf16"], 8)
    emulated.run(p, blocks=5)  # one tile of each product for a block: rank / 16 and out / 16 of them
    of_first = 80 * 576 * 2 // 16
    of_second = 80 * 80 * 2 // 16  # less than one unit a row, so all of it
    assert emulated.chunks_before_grid_barrier() == of_first + of_second


def test_every_int8_is_exact(emulated):
    values = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8)
    rank = 256
    identity = torch.eye(rank, dtype=torch.int8)
    layer = Layer([values.repeat(3, 1)], [identity], torch.ones(rank), torch.ones(1, rank), None)
    for column in range(0, rank, 16):
        x = torch.eye(rank)[column : column + 16].bfloat16().contiguous()
        y = emulated.run(Problem(x, torch.zeros(16, dtype=torch.int64), [layer]))[0]
        assert torch.equal(y, values[column : column + 16].bfloat16()[:, None].expand(16, 3))


def test_says_what_it_does_not_support(emulated):
    p = problem(64, [(64, 48), (64, 16)], STORAGE["int8 with f16 head"], 4)
    for change, reason in [
        ({}, None),
        ({"rows": 17}, "more than 16 rows of x, or none"),
        ({"rows": 0}, "more than 16 rows of x, or none"),
        ({"rows_per_slot": 3}, "slots that do not divide the rows of x"),
        ({"layer_count": 4}, "more than 3 layers, or none"),
        ({"in_features": 72}, "in_features that are not a multiple of 16"),
        ({"x": p.x.data_ptr() + 2}, "x or workspace off a 16-byte boundary"),
    ]:
        group, *_kept = c_group(p)
        for name, value in change.items():
            setattr(group, name, value)
        assert emulated.why_unsupported(group) == reason
    group, *_kept = c_group(p)
    group.layers[1].parts[0].rank = 24
    assert emulated.why_unsupported(group) == "a part whose rank is not a multiple of 16"
    group, *_kept = c_group(p)
    group.layers[1].parts[1].u += 8
    assert emulated.why_unsupported(group) == "a factor off a 16-byte boundary"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """target -> (object file, what the compilers report)."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile csrc/cuda/decode.cu with")
    folder = tmp_path_factory.mktemp("objects")
    return functools.cache(lambda target: nvcc_compile.compile_for(target, folder))


@pytest.mark.parametrize("target", nvcc_compile.TARGETS)
def test_no_target_spills(compiled, target):
    _, report = compiled(target)
    assert "warning" not in report, report
    for name, usage in nvcc_compile.usages(report).items():
        assert usage.stack == usage.spill_stores == usage.spill_loads == 0
        assert 0 < usage.registers <= nvcc_compile.VARIANTS[name].most_registers


@pytest.mark.parametrize("target", nvcc_compile.TARGETS)
def test_machine_code(compiled, target):
    """Weights come by 128-bit loads past L1 and meet x in the tensor cores; nothing goes through local memory."""
    if nvcc_compile.find_tool("cuobjdump") is None or nvcc_compile.find_tool("nvdisasm") is None:
        pytest.skip("no cuobjdump with nvdisasm in nvcc's folder, on the path or in the triton package")
    for name, code in nvcc_compile.instructions(compiled(target)[0]).items():
        assert code.wide_loads >= nvcc_compile.VARIANTS[name].least_wide_loads
        assert code.tensor_core and not code.local_memory


def test_binding_compiles():
    """Against the headers of this torch, which may be a CPU build; nothing of CUDA is needed to compile it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile csrc/cuda/binding.cpp with")
    import pybind11
    from torch.utils.cpp_extension import include_paths

    includes = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include"), str(CUDA)]
    flags = "-std=c++20 -fsyntax-only -Wall -Wextra -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000"
    subprocess.run(
        [compiler, *flags.split(), *(f"-isystem{i}" for i in includes), str(CUDA / "binding.cpp")], check=True
    )
