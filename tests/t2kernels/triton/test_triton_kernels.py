"""Every Triton kernel, run by the interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from t2kernels import reference
from t2kernels.packing import EIGHT_BITS, GPU_STORAGE_DTYPES, interleave, matrix_of, quantize
from tests.t2kernels.problems import ACTIVATIONS, problem

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("on a GPU: TRITON_INTERPRET=1 pytest tests/t2kernels/triton", allow_module_level=True)
from triton.runtime import interpreter  # noqa: E402

from t2kernels.triton import launch, tuning  # noqa: E402

SHAPES = [(1, 1, 1), (7, 1, 5), (1, 7, 577), (48, 64, 128), (577, 300, 131)]  # out, rank, in
BATCHES = [0, 1, 3, 17, 300]
EXPERTS = [1, 7, 64]


def batches(shape, dtype, storage):
    """Rows to try: all of `BATCHES` with bfloat16, and with float32 below the largest shape, which is slow."""
    every = dtype == storage and (dtype == torch.bfloat16 or (dtype == torch.float32 and shape != SHAPES[-1]))
    return BATCHES if every else (1, 17)


# Rounding of x, of the scaled projection and of the result to 16 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def nothing_outside_the_operands(monkeypatch):
    """Every load and store of a launch has to stay inside one of its operands, as on a GPU it would have to."""
    inside: list[tuple[int, int]] = []

    def operands(arguments):
        for argument in arguments:
            if isinstance(argument, tuple):
                yield from operands(argument)
            elif isinstance(argument, torch.Tensor):
                yield argument

    def start(executor, *arguments, **options):
        inside.clear()
        for each in operands(arguments):
            entries = 1 + sum((n - 1) * stride for n, stride in zip(each.shape, each.stride(), strict=True))
            inside.append((each.data_ptr(), each.data_ptr() + (entries * each.element_size() if each.numel() else 0)))
        return run(executor, *arguments, **options)

    class Checked:
        """The memory of the interpreter."""

        def load(self, pointers, mask, other, dtype):
            self.check(pointers[mask], other.itemsize)
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers, values, mask):
            self.check(pointers[mask], values.itemsize)
            return memory.store(pointers, values, mask)

        def __getattr__(self, name):
            return getattr(memory, name)

        def check(self, pointers, size):
            if pointers.size:
                first, end = int(pointers.min()), int(pointers.max()) + size
                assert any(begin <= first and end <= last for begin, last in inside), "outside the operands"

    memory, run = interpreter._interpreter, interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter, "_interpreter", Checked())
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)


class Factors:
    """Random factors as a GPU holds them: matrices, in one part, or of 8-bit formats in two."""

    def __init__(self, shape, storage, parts=1, seed=0):
        p = problem(shape, 1, seed=seed)
        self.component = None
        if storage in EIGHT_BITS:
            u, u_scale = quantize(p.u, 1, storage)
            vh, vh_scale = quantize(p.vh, 0, storage)
            self.component = u_scale * vh_scale
        else:
            u, vh = p.u.to(storage), p.vh.to(storage)
        self.u, self.vh = [u], [vh]
        if parts == 2:
            head = shape[1] // 3
            self.component[:head] = 1.0
            self.u = [p.u[:, :head].half(), u[:, head:].contiguous()]
            self.vh = [p.vh[:head].half(), vh[head:].contiguous()]
        self.plain = self.u, self.vh
        if storage == torch.int8:
            self.u, self.vh = ([*parts[:-1], interleave(parts[-1])] for parts in self.plain)

    @property
    def full(self):
        u, vh = self.plain
        return torch.cat([p.float() for p in u], 1).double(), torch.cat([p.float() for p in vh], 0).double()

    def round_head(self):
        """As bfloat16 activations meet the leading part of 8-bit storage."""
        for parts in self.plain:
            parts[0] = parts[0].bfloat16()


def close(actual, expected, dtype):
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance * scale, rtol=tolerance)


def row_scales(p, factors, slots=None):
    slots = p.ids if slots is None else slots
    scales = p.scales.double()[slots].repeat_interleave(p.x.shape[0] // max(len(slots), 1), 0)
    return scales if factors.component is None else scales * factors.component.double()


def expected_forward(p, factors, slots=None):
    u, vh = factors.full
    t = p.x.double() @ vh.T
    return (t * row_scales(p, factors, slots)) @ u.T + p.bias.double(), t


@pytest.mark.parametrize("storage", GPU_STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, storage):
    factors = Factors(shape, storage)
    for batch in batches(shape, dtype, storage):
        p = problem(shape, batch, dtype=dtype)
        y, t = launch.factored_linear(
            p.x, factors.u, factors.vh, factors.component, p.scales, p.ids, p.bias, shape[0], False
        )
        expected, expected_t = expected_forward(p, factors)
        assert y.dtype == dtype and t.dtype == torch.float32
        close(y, expected, dtype)
        close(t, expected_t, torch.float32)


@pytest.mark.parametrize("experts", EXPERTS)
def test_forward_with_every_number_of_experts(experts):
    factors = Factors((48, 64, 128), torch.bfloat16)
    for batch in BATCHES:
        p = problem((48, 64, 128), batch, experts=experts, dtype=torch.bfloat16)
        y, _ = launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, p.ids, None, 48, False)
        expected, _ = expected_forward(p, factors)
        close(y, expected - p.bias.double(), torch.bfloat16)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("storage", EIGHT_BITS, ids=str)
def test_two_parts(dtype, storage):
    shape = (40, 192, 130)
    factors = Factors(shape, storage, parts=2)
    for batch in (1, 17, 300):
        p = problem(shape, batch, dtype=dtype)
        arguments = (p.x, factors.u, factors.vh, factors.component, p.scales, p.ids, p.bias, 40, False)
        y, t = launch.factored_linear(*arguments)
        if dtype == torch.bfloat16:
            factors.plain = [list(parts) for parts in factors.plain]
            factors.round_head()
        expected, expected_t = expected_forward(p, factors)
        close(y, expected, dtype)
        close(t, expected_t, torch.float32)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("biased", ["all", "one", "none"])
def test_a_prepared_group_follows_other_inputs_scales_slots_and_biases(storage, biased):
    """The second call of a kind makes the launches of the first again, with every tensor another one."""
    shapes = [(48, 192, 130), (40, 64, 130)]
    parts = 2 if storage == torch.int8 else 1
    layers = [Factors(shape, storage, parts=parts, seed=i) for i, shape in enumerate(shapes)]
    factors = [[part for layer in layers for part in getattr(layer, name)] for name in ("u", "vh")]
    components = [layer.component for layer in layers] if storage == torch.int8 else []
    prepared = {}
    for seed in range(3):
        ps = [problem(shape, 9, dtype=torch.bfloat16, seed=seed + 10 * i) for i, shape in enumerate(shapes)]
        biases = [p.bias if biased == "all" or i == 1 else p.bias[:0] for i, p in enumerate(ps)]
        own = (ps[0].x, *factors, components, [p.scales for p in ps], ps[0].ids, biases if biased != "none" else [])
        ys = launch.run_group(prepared, *own, [48, 40], False)
        expected = launch.factored_linear_group(*own, [48, 40], False)
        assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))
        close(ys[1], expected_group(ps, layers, 1, biased != "none"), torch.bfloat16)
    assert len(prepared) == 1
    wide = torch.zeros(9, 200, dtype=torch.bfloat16)[:, :130]
    launch.run_group(prepared, wide, *own[1:], [48, 40], False)
    assert len(prepared) == 2
    tuning._change()
    launch.run_group(prepared, *own, [48, 40], False)
    assert len(prepared) == 3


def expected_group(ps, layers, i, biased):
    p = ps[i]
    p.x, p.ids = ps[0].x, ps[0].ids
    y, _ = expected_forward(p, layers[i])
    return y if biased else y - p.bias.double()


def test_interleaving_keeps_every_entry():
    for n, k in ((1, 1), (7, 255), (3, 256), (5, 577)):
        matrix = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        words = interleave(matrix)
        assert words.shape == (n, -(-k // 256), 256) and torch.equal(matrix_of(words, n, k), matrix)


def test_several_rows_per_slot_strided_scales_and_inputs():
    shape = (48, 64, 128)
    factors = Factors(shape, torch.float32)
    p = problem(shape, 12)
    wide = torch.randn(12, 2 * 128)
    p.x = wide[:, ::2]
    table = torch.randn(5, 200)
    table[:, 20:84] = p.scales
    slots = torch.tensor([4, 0, 2])
    u, vh = factors.u[0].T.contiguous().T, factors.vh[0].T.contiguous().T
    y, _ = launch.factored_linear(p.x.view(3, 4, 128), [u], [vh], None, table[:, 20:84], slots, p.bias, 48, False)
    close(y.reshape(12, 48), expected_forward(p, factors, slots)[0], torch.float32)


def test_bf16_products_round_activations_and_nothing_else():
    shape = (48, 64, 128)
    factors = Factors(shape, torch.bfloat16)
    p = problem(shape, 17)
    exact, rounded = (
        launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, p.ids, None, 48, flag)[0]
        for flag in (False, True)
    )
    expected = expected_forward(p, factors)[0] - p.bias.double()
    close(exact, expected, torch.float32)
    close(rounded, expected, torch.bfloat16)
    assert not torch.equal(exact, rounded)
    p.x = p.x.bfloat16().float()
    t = launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, p.ids, None, 48, True)[1]
    close(t, expected_forward(p, factors)[1], torch.float32)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8], ids=str)
def test_group_is_its_layers(storage):
    shapes = [(96, 64, 128), (32, 32, 128), (33, 31, 128)]
    layers = [Factors(shape, storage, seed=i) for i, shape in enumerate(shapes)]
    for batch in (0, 1, 17, 300):
        ps = [problem(shape, batch, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
        x, ids = ps[0].x, ps[0].ids
        biases = [ps[0].bias, ps[1].bias[:0], ps[2].bias]
        components = [layer.component for layer in layers] if storage == torch.int8 else []
        ys = launch.factored_linear_group(
            x,
            [part for layer in layers for part in layer.u],
            [part for layer in layers for part in layer.vh],
            components,
            [p.scales for p in ps],
            ids,
            biases,
            [shape[0] for shape in shapes],
            False,
        )
        for y, p, layer, bias, shape in zip(ys, ps, layers, biases, shapes, strict=True):
            alone, _ = launch.factored_linear(
                x, layer.u, layer.vh, layer.component, p.scales, ids, bias if len(bias) else None, shape[0], False
            )
            assert y.is_contiguous() and torch.equal(y, alone)


@pytest.mark.parametrize("storage", GPU_STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(shape, dtype, storage):
    factors = Factors(shape, storage)
    check_backward(shape, dtype, factors, batches(shape, dtype, storage))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("requests", [1, 2, 25, 300])
def test_backward_of_requests_that_span_and_share_tiles(requests, experts):
    check_backward((48, 64, 128), torch.float32, Factors((48, 64, 128), torch.float32), [300], requests, experts)


@pytest.mark.parametrize("storage", EIGHT_BITS, ids=str)
def test_backward_of_two_parts(storage):
    shape = (40, 192, 130)
    check_backward(shape, torch.bfloat16, Factors(shape, storage, parts=2), (1, 17, 300))


def check_backward(shape, dtype, factors, batches, requests=None, experts=5):
    u, vh = factors.full
    for batch in batches:
        p = problem(shape, batch, experts=experts)
        slots = p.ids if requests is None else p.ids[:requests]
        g = torch.randn(batch, shape[0], generator=torch.Generator().manual_seed(7)).to(dtype)
        t = (p.x.double() @ vh.T).float()
        h = g.double() @ u
        owners = slots.repeat_interleave(batch // max(len(slots), 1))
        th = t.double() * h if factors.component is None else t.double() * h * factors.component.double()
        expected_dscales = torch.zeros(p.scales.shape, dtype=torch.float64).index_add_(0, owners, th)
        expected_dx = (h * row_scales(p, factors, slots)) @ vh
        partly = ((True, False), (False, True)) if batch == batches[-1] else ()
        for need_dx, need_dscales in ((True, True), *partly):
            dx, dscales = launch.factored_linear_backward(
                g, t, factors.u, factors.vh, factors.component, p.scales, slots, shape[2], need_dx, need_dscales, False
            )
            if need_dx:
                assert dx.dtype == dtype
                close(dx, expected_dx, dtype)
            if need_dscales:
                close(dscales, expected_dscales, torch.float32)
            else:
                assert dscales.shape == (0, shape[1])


@pytest.mark.parametrize("storage", GPU_STORAGE_DTYPES, ids=str)
def test_dense(storage):
    for n, k in ((1, 7), (577, 131)):
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
        stored, row_scale = quantize(w, 0, storage) if storage in EIGHT_BITS else (w.to(storage), None)
        full = stored.double() if row_scale is None else stored.double() * row_scale.double()[:, None]
        stored = interleave(stored) if storage == torch.int8 else stored
        for batch in BATCHES if n == 1 or storage == torch.bfloat16 else (1, 17):
            p = problem((n, 1, k), batch)
            close(
                launch.dense_linear(p.x, stored, row_scale, p.bias, n, False), p.x.double() @ full.T + p.bias, p.x.dtype
            )
            g = torch.randn(batch, n)
            close(launch.dense_linear_backward(g, stored, row_scale, k, False), g.double() @ full, g.dtype)
            if storage == torch.bfloat16:
                rounded = launch.dense_linear_backward(g, stored, row_scale, k, True).double()  # the interpreter cuts
                exact = g.double() @ full
                assert (batch > 0) == (float((rounded - exact).norm()) > 0) and torch.isfinite(rounded).all()
                assert float((rounded - exact).norm()) <= 8e-3 * float(exact.norm())


def test_kernels_agree_with_the_eager_reference_of_the_operators():
    """The same call, argument for argument, as `t2kernels.ops` makes it."""
    factors = Factors((577, 300, 131), torch.float32)
    p = problem((577, 300, 131), 17)
    arguments = (p.x, factors.u, factors.vh, None, p.scales, p.ids, p.bias, 577, False)
    for ours, eager in zip(launch.factored_linear(*arguments), reference.factored_linear(*arguments), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("slot", [-1, 5, 1 << 32])
def test_a_slot_that_is_not_there_is_nan_in_its_row_alone(slot):
    shape = (48, 64, 128)
    factors, p = Factors(shape, torch.bfloat16), problem(shape, 17, experts=5, dtype=torch.bfloat16)
    others = torch.arange(17) != 11
    slots = p.ids.clone()
    slots[11] = slot
    before, after = (
        launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, ids, p.bias, 48, False)
        for ids in (p.ids, slots)
    )
    assert after[0][11].isnan().all() and torch.equal(after[0][others], before[0][others])
    assert torch.equal(after[1], before[1])  # the bare projection has nothing to do with slots
    g = torch.randn(17, 48, generator=torch.Generator().manual_seed(7)).bfloat16()

    def backward(g, t, ids):
        return launch.factored_linear_backward(
            g, t, factors.u, factors.vh, None, p.scales, ids, shape[2], True, True, False
        )

    dx, dscales = backward(g, before[1], slots)
    assert dx[11].isnan().all()
    expected_dx, expected_dscales = backward(g[others], before[1][others], p.ids[others])
    assert torch.equal(dx[others], expected_dx)
    torch.testing.assert_close(dscales, expected_dscales)  # the same rows in other tiles


@pytest.mark.parametrize(
    ("storage", "terms"), [(torch.int8, "words"), (torch.float16, "split"), (torch.float32, "wide")]
)
def test_bfloat16_activations_take_the_tensor_cores_of_16_bits(storage, terms, monkeypatch):
    """With every format but float32."""
    chosen = {}

    def tile_for(own, device):
        chosen[own.step] = own
        return tuning.table_tile(own, device)

    monkeypatch.setattr(launch, "tile_for", tile_for)
    shape = (40, 192, 130)
    factors = Factors(shape, storage, parts=2 if storage == torch.int8 else 1)
    p = problem(shape, 17, dtype=torch.bfloat16)
    own = (factors.u, factors.vh, factors.component, p.scales, p.ids)
    _, t = launch.factored_linear(p.x, *own, None, shape[0], False)
    launch.factored_linear_backward(p.x[:, :40], t, *own, shape[2], True, True, False)
    assert chosen["project"].terms == chosen["expand"].terms == terms
    assert chosen["pull"].terms == terms


def test_float16_factors_lose_nothing_beside_bfloat16_activations():
    """A float16 value has 11 bits and is multiplied as two bfloat16 ones of 8."""
    shape = (48, 64, 128)
    factors, p = Factors(shape, torch.float16), problem(shape, 17, dtype=torch.bfloat16)
    _, t = launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, p.ids, None, 48, False)
    close(t, expected_forward(p, factors)[1], torch.float32)
    assert not torch.equal(factors.vh[0].bfloat16().half(), factors.vh[0])


@pytest.mark.parametrize("name", tuning.TABLES)
def test_every_tile_of_the_tables_computes_the_same(name, monkeypatch):
    monkeypatch.setattr(tuning, "chip", lambda device: name)
    shape = (150, 140, 200)
    factors = Factors(shape, torch.bfloat16)
    for batch in (1, 40, 80, 150, 300):
        p = problem(shape, batch, dtype=torch.bfloat16)
        y, _ = launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, p.ids, p.bias, 150, False)
        close(y, expected_forward(p, factors)[0], torch.bfloat16)


def test_tuning_keeps_the_fastest_tile_of_every_launch(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path))
    cpu, shape = torch.device("cpu"), (48, 64, 128)
    factors, p = Factors(shape, torch.bfloat16), problem(shape, 3, dtype=torch.bfloat16)

    def run():
        return launch.factored_linear(p.x, factors.u, factors.vh, None, p.scales, p.ids, None, 48, False)

    wanted = {"project": (128, 5), "expand": (16, 3)}  # block_n and stages: the fastest, says this clock

    def seconds(run):
        run()
        return sum(
            abs(tile.block_n - wanted[launch.step][0]) + abs(tile.stages - wanted[launch.step][1])
            for (launch, _), tile in tuning._chosen.items()
        )

    best = tuning.tune(run, seconds, cpu)
    assert {key.split()[0]: (tile.block_n, tile.stages) for key, tile in best.items()} == wanted
    tuning._chosen.clear()
    run()
    assert {launch.key: tile for (launch, _), tile in tuning._chosen.items()} == best


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 10**5, '{"a": 5}', '{"a": {"block_m": 7}}', 'TILE"stages": 0}}', 'TILE"x": 1}}']
)
def test_damaged_files_of_measured_tiles_are_not_used(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(
        text.replace("TILE", '{"a": {"block_m": 16, "block_n": 16, "block_k": 32, "warps": 4, "stages": 2, ')
    )
    tuning._measured.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"{path} are damaged and not used"):
        assert tuning._measured(path) == {}


def test_tiles_that_ship_are_sound(recwarn):
    for path in tuning.SHIPPED.glob("*.json"):
        tuning._measured.cache_clear()
        assert tuning._measured(path.with_name(path.name))
    assert not recwarn.list


def test_measured_tiles_are_kept_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path))
    cpu = torch.device("cpu")
    wanted = tuning.Launch("project", 3, (48,), (128,), "half", (torch.bfloat16,))
    same_bucket = tuning.Launch("project", 4, (48,), (128,), "half", (torch.bfloat16,))
    other = tuning.Launch("project", 5, (48,), (128,), "half", (torch.bfloat16,))
    tile = tuning.Tile(64, 16, 32, 4, 2)
    assert tuning.tile_for(wanted, cpu) != tile
    path = tuning.save({wanted.key: tile}, cpu)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert tuning.tile_for(wanted, cpu) == tuning.tile_for(same_bucket, cpu) == tile
    assert tuning.tile_for(other, cpu) != tile
    base = tuning.table_tile(wanted, cpu)  # whose rows decide which instruction does the sums
    assert {each.block_m for each in tuning.candidates(wanted, cpu)} == {base.block_m}
