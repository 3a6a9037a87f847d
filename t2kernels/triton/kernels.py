"""The Triton kernels of the factored product and its gradients.

Two of them multiply, one tile of `acc[m, n] = sum over k of a[m, k] * w[n, k]` after the other; `launch` uses them for

    project   s = (x Vh^T) * scale[slot] * component_scale, and t = x Vh^T for the backward pass      (`product`)
    expand    y = x W^T * row_scale + s U^T + bias, either without the other in the factored and the dense form; with
              the matrices read the other way round, dx = g W + d Vh                                  (`product`)
    pull      d = (g U) * scale[slot] * component_scale, and sums of t * (g U) for `gather`
    gather    dscales = pull's sums, added up per slot

Tiling. A program owns a tile of BLOCK_M rows and BLOCK_N columns and walks its columns' reduction from end to end in
steps of BLOCK_K. Several matrices that share their rows (q, k and v; gate and up; the two parts of int8 storage) are
one launch: their tiles are numbered one after the other. Where programs are fewer than tiles they are persistent.
Consecutive tiles share weights (GROUP_M row tiles before the next columns), so that they meet in L2.
Data movement. Weights come as they are stored (bfloat16, float16, float32, int8, fp8) through `num_stages` buffers of
shared memory and are widened on their way to the tensor core: for few rows every weight byte crosses the memory bus
once. With WEIGHTS_FIRST they are its left operand, so few rows of x need no padding to the 64 that wgmma wants on the
left, and int8 goes from registers straight in. The scale is gathered per row at the end of the first product, so the
number of experts changes no traffic but its own few kilobytes, and W' never exists.
Overlap. With OVERLAP a launch begins before the one ahead has ended, asks L2 for its first weights, which nobody
writes, and waits before it reads or writes anything else.
Order. A row's sum is one chain over k, in order, in float32: neither tile sizes nor the other rows have a part in it,
as long as one kind of tensor core instruction does all of them (`tuning` sees to that; on Hopper mma and wgmma gave the
same bits).
Slots. A row whose slot is not one of the table's becomes NaN, and nothing is read for it: ids on a device are not
checked before, since the host would have to wait for them.
Limit. Few rows: reading the weights. Many: the tensor core, at the rate of the dtype that x has.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # there bfloat16 is neither multiplied nor made from int8


@triton.jit
def _tiles(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Number of tiles that cover a result [rows, columns]."""
    return tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)


@triton.jit
def _tile(index, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile number `index` of them, walked in groups of GROUP_M row tiles: its row tile, and its rows and columns."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = index // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    inside = index - group * GROUP_M * tiles_n
    tile_m = (group * GROUP_M + inside % height).to(tl.int64)
    return tile_m, tile_m * BLOCK_M + tl.arange(0, BLOCK_M), inside // height * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _dot(a, w, acc, term: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS_FIRST: tl.constexpr):
    """acc + a w, or with WEIGHTS_FIRST acc + w a, with both as `term`."""
    if INTERPRETED:
        a, w = a.to(tl.float32).to(term).to(tl.float32), w.to(tl.float32)
    else:
        a, w = a.to(term), w.to(term)
    if WEIGHTS_FIRST:
        return tl.dot(w, a, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, w, acc, input_precision=PRECISION)


@triton.jit
def _prefetch(w, n, columns, row, LINES: tl.constexpr):
    """Asks L2 for the first LINES cache lines (128 bytes) of the rows n of w, each `row` entries long."""
    line: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth  # entries
    at = tl.minimum(tl.arange(0, LINES) * line, row - 1)
    at = w + tl.minimum(n, columns - 1).to(tl.int64)[:, None] * row + at[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _unpack(words, term: tl.constexpr):
    """The four int8 of each word as four tensors of `term`.

    As bfloat16, two words at a time: a byte v below the byte of 128.0's exponent is 128 + (v's low 7 bits), or, where
    the sign bit has raised the exponent, twice that base; less the base (the upper bits alone) it is v, exactly.
    """
    if term == tl.bfloat16 and not INTERPRETED and is_cuda():
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, low, high, minus;
            mov.b32 minus, 0xbf80bf80;
            prmt.b32 t, $4, $5, 0x4400;
            lop3.b32 t, t, 0x00ff00ff, 0x43004300, 0xea;
            and.b32 low, t, 0xff7fff7f;
            and.b32 high, t, 0xff80ff80;
            fma.rn.bf16x2 $0, high, minus, low;
            prmt.b32 t, $4, $5, 0x5511;
            lop3.b32 t, t, 0x00ff00ff, 0x43004300, 0xea;
            and.b32 low, t, 0xff7fff7f;
            and.b32 high, t, 0xff80ff80;
            fma.rn.bf16x2 $1, high, minus, low;
            prmt.b32 t, $4, $5, 0x6622;
            lop3.b32 t, t, 0x00ff00ff, 0x43004300, 0xea;
            and.b32 low, t, 0xff7fff7f;
            and.b32 high, t, 0xff80ff80;
            fma.rn.bf16x2 $2, high, minus, low;
            prmt.b32 t, $4, $5, 0x7733;
            lop3.b32 t, t, 0x00ff00ff, 0x43004300, 0xea;
            and.b32 low, t, 0xff7fff7f;
            and.b32 high, t, 0xff80ff80;
            fma.rn.bf16x2 $3, high, minus, low;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        kept: tl.constexpr = tl.float32 if INTERPRETED else term
        return (
            ((words << 24) >> 24).to(kept),
            ((words << 16) >> 24).to(kept),
            ((words << 8) >> 24).to(kept),
            (words >> 24).to(kept),
        )


@triton.jit
def _multiply_words(
    acc,
    a,  # [rows, k], k contiguous
    lda,
    m,
    rows,
    w,  # int32 [columns, ceil(k / 256) * 64]: see t2kernels.packing
    n,
    columns,
    k,
    ROUND_TO_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 256
):
    """`_multiply` for int8 in words: the terms of a block of 256 in four runs of 64."""
    term: tl.constexpr = tl.bfloat16 if ROUND_TO_BF16 else a.dtype.element_ty
    row = tl.cdiv(k, 256) * 64
    js = tl.arange(0, 64)
    if WEIGHTS_FIRST:
        a_at = a + m[None, :] * lda + js[:, None]
        w_at = w + n.to(tl.int64)[:, None] * row + js[None, :]
        m_inside, n_inside = (m < rows)[None, :], (n < columns)[:, None]
    else:
        a_at = a + m[:, None] * lda + js[None, :]
        w_at = w + n.to(tl.int64)[None, :] * row + js[:, None]
        m_inside, n_inside = (m < rows)[:, None], (n < columns)[None, :]
    for k0 in range(0, k, BLOCK_K):
        for block in tl.static_range(BLOCK_K // 256):
            left = k - k0 - block * 256
            if EVEN_K or block == 0:
                words = tl.load(w_at + block * 64, mask=n_inside, other=0)
            else:
                words = tl.load(w_at + block * 64, mask=n_inside & (left > 0), other=0)
            planes = _unpack(words, term)
            for i in tl.static_range(4):
                if EVEN_K:
                    inside = m_inside
                elif WEIGHTS_FIRST:
                    inside = m_inside & (js < left - i * 64)[:, None]
                else:
                    inside = m_inside & (js < left - i * 64)[None, :]
                a_tile = tl.load(a_at + (block * 256 + i * 64), mask=inside, other=0.0)
                if ROUND_TO_BF16:
                    a_tile = a_tile.to(tl.bfloat16)
                acc = _dot(a_tile, planes[i], acc, term, PRECISION, WEIGHTS_FIRST)
        a_at += BLOCK_K
        w_at += BLOCK_K // 4
    return acc


@triton.jit
def _multiply(
    acc,
    a,  # [rows, k], k contiguous
    lda,
    m,  # this tile's row numbers, int64
    rows,
    w,  # contiguous: [columns, k], with TRANSPOSED [k, columns]
    n,  # this tile's column numbers
    columns,
    k,
    ROUND_TO_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    EXACT_HALVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + a[m] w[n]^T, term after term: in a's 16-bit type if w fits into it, else in float32 as PRECISION says.

    WEIGHTS_FIRST: acc [n, m] is the transpose, w its left operand. EXACT_HALVES: a float16 w meets a bfloat16 a as the
    sum of two bfloat16 matrices, which is exact, each with a chain of its own; without, it is rounded to bfloat16.
    """
    a_type: tl.constexpr = tl.bfloat16 if ROUND_TO_BF16 else a.dtype.element_ty
    w_type: tl.constexpr = w.dtype.element_ty
    words: tl.constexpr = w_type == tl.int32  # four int8, transposed: each column reads its byte of a word
    ZERO: tl.constexpr = 0 if words else 0.0
    split: tl.constexpr = a_type == tl.bfloat16 and w_type == tl.float16
    in_two: tl.constexpr = split and EXACT_HALVES
    if a_type != tl.float32 and (w_type == a_type or words or split or w_type == tl.int8 or w_type == tl.float8e4nv):
        term: tl.constexpr = a_type
    else:
        term: tl.constexpr = tl.float32
    if in_two:
        low = tl.zeros_like(acc)
    ks = tl.arange(0, BLOCK_K)
    if WEIGHTS_FIRST:
        a_at = a + m[None, :] * lda + ks[:, None]
        w_at = w + n.to(tl.int64)[:, None] * k + ks[None, :]
        m_inside, n_inside = (m < rows)[None, :], (n < columns)[:, None]
    else:
        a_at = a + m[:, None] * lda + ks[None, :]
        if words:
            w_at = w + ks.to(tl.int64)[:, None] * (tl.cdiv(columns, 256) * 64) + (n // 256 * 64 + n % 64)[None, :]
        elif TRANSPOSED:
            w_at = w + ks.to(tl.int64)[:, None] * columns + n[None, :]
        else:
            w_at = w + n.to(tl.int64)[None, :] * k + ks[:, None]
        m_inside, n_inside = (m < rows)[:, None], (n < columns)[None, :]
    w_step = BLOCK_K * (tl.cdiv(columns, 256) * 64) if words else BLOCK_K * columns if TRANSPOSED else BLOCK_K
    for k0 in range(0, k, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_at, mask=m_inside, other=0.0)
            w_tile = tl.load(w_at, mask=n_inside, other=ZERO)
        elif WEIGHTS_FIRST:
            a_tile = tl.load(a_at, mask=m_inside & (ks < k - k0)[:, None], other=0.0)
            w_tile = tl.load(w_at, mask=n_inside & (ks < k - k0)[None, :], other=ZERO)
        else:
            a_tile = tl.load(a_at, mask=m_inside & (ks < k - k0)[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=n_inside & (ks < k - k0)[:, None], other=ZERO)
        if ROUND_TO_BF16:
            a_tile = a_tile.to(tl.bfloat16)
        if words:
            w_tile = (w_tile << (24 - n % 256 // 64 * 8)[None, :]) >> 24
        if in_two:
            high = w_tile.to(tl.float32).to(tl.bfloat16)
            rest = (w_tile.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
            low = _dot(a_tile, rest, low, tl.bfloat16, PRECISION, WEIGHTS_FIRST)
            acc = _dot(a_tile, high, acc, tl.bfloat16, PRECISION, WEIGHTS_FIRST)
        else:
            acc = _dot(a_tile, w_tile, acc, term, PRECISION, WEIGHTS_FIRST)
        a_at += BLOCK_K
        w_at += w_step
    if in_two:
        acc += low
    return acc


@triton.jit
def _scale_of(
    scales,
    ld_scales,
    slots,
    slot_count,
    rows_per_slot,
    column_scale,
    m,
    rows,
    n,
    columns,
    HAS_COLUMN_SCALE: tl.constexpr,
):
    """[tile rows, tile columns] float32: each row's scale, NaN if there is no such slot, times the columns' own."""
    slot = tl.load(slots + m // rows_per_slot, mask=m < rows, other=-1)
    there = ((slot >= 0) & (slot < slot_count))[:, None] & (n < columns)[None, :]
    scale = tl.load(scales + slot[:, None] * ld_scales + n[None, :], mask=there, other=float("nan"))
    if HAS_COLUMN_SCALE:
        scale *= tl.load(column_scale + n, mask=n < columns, other=0.0)[None, :]
    return scale


@triton.jit(do_not_specialize=["slot_count", "rows", "rows_per_slot"])
def product(
    a,  # for each of ws [rows, its k]
    lda,  # for each of ws
    ws,  # for each matrix its PARTS along k: [columns, k], with TRANSPOSED [k, columns], contiguous
    ks,  # for each of ws
    scales,  # for each matrix [slot_count, columns] float32, if HAS_SCALES
    ld_scales,  # for each matrix
    slots,  # int64, one for rows_per_slot consecutive rows
    slot_count,
    rows_per_slot,
    column_scales,  # for each matrix [columns] float32, if HAS_COLUMN_SCALE; without scales of its first part alone
    biases,  # for each matrix [columns], if HAS_BIAS
    t,  # for each matrix [rows, columns] float32, of row stride ldt: the bare product, if HAS_T
    ldt,
    y,  # for each matrix [rows, columns]
    ldy,  # for each matrix
    rows,
    columns,  # for each matrix
    COUNT: tl.constexpr,  # matrices
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_T: tl.constexpr,
    ROUND_TO_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    EXACT_HALVES: tl.constexpr,
    PREFETCH: tl.constexpr,  # 128-byte lines of each row of a program's first weights that L2 is asked for, or 0
    OVERLAP: tl.constexpr,  # programmatic dependent launch: begin before the kernel before this one has ended
    HOIST: tl.constexpr,  # hoist the pointers of all matrices out of the walk (costs registers)
):
    """y[i] = (a ws^T) * scales[i][slot] * column_scales[i] + biases[i], each factor if there is one, a sum over parts.

    Where a first part has column scales and others follow, its bias is added before them: they may then add 0.
    """
    tiles = 0
    for i in tl.static_range(COUNT):
        own = _tiles(rows, columns[i], BLOCK_M, BLOCK_N)
        if PREFETCH > 0 and not INTERPRETED:
            index = tl.program_id(0) - tiles
            if index >= 0 and index < own:
                _, _, n = _tile(index, rows, columns[i], BLOCK_M, BLOCK_N, GROUP_M)
                row = tl.cdiv(ks[i * PARTS], 256) * 64 if ws[i * PARTS].dtype.element_ty == tl.int32 else ks[i * PARTS]
                _prefetch(ws[i * PARTS], n, columns[i], row, PREFETCH)
        tiles += own
    if OVERLAP and not INTERPRETED:  # nothing but weights is read before the wait, and nothing written
        gdc_launch_dependents()
        gdc_wait()
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, disable_licm=not HOIST):
        first = 0
        for i in tl.static_range(COUNT):
            own = _tiles(rows, columns[i], BLOCK_M, BLOCK_N)
            if COUNT == 1 or (index >= first and index < first + own):
                _, m, n = _tile(index - first, rows, columns[i], BLOCK_M, BLOCK_N, GROUP_M)
                acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHTS_FIRST else (BLOCK_M, BLOCK_N), tl.float32)
                STEP: tl.constexpr = BLOCK_K if BLOCK_K > 256 else 256
                # float16 beside 8 bits is rounded in registers, which long steps would exhaust
                HEAD_K: tl.constexpr = BLOCK_K if EXACT_HALVES or TRANSPOSED or BLOCK_K < 64 else 64
                for p in tl.static_range(i * PARTS, (i + 1) * PARTS):
                    if ws[p].dtype.element_ty == tl.int32 and not TRANSPOSED:
                        acc = _multiply_words(
                            acc,
                            a[p],
                            lda[p],
                            m,
                            rows,
                            ws[p],
                            n,
                            columns[i],
                            ks[p],
                            ROUND_TO_BF16,
                            PRECISION,
                            WEIGHTS_FIRST,
                            EVEN_K,
                            STEP,
                        )
                    else:
                        acc = _multiply(
                            acc,
                            a[p],
                            lda[p],
                            m,
                            rows,
                            ws[p],
                            n,
                            columns[i],
                            ks[p],
                            ROUND_TO_BF16,
                            PRECISION,
                            TRANSPOSED,
                            WEIGHTS_FIRST,
                            EXACT_HALVES,
                            EVEN_K,
                            HEAD_K if ws[p].dtype.element_ty == tl.float16 else BLOCK_K,
                        )
                    if PARTS > 1 and HAS_COLUMN_SCALE and not HAS_SCALES and p == i * PARTS:
                        scale = tl.load(column_scales[i] + n, mask=n < columns[i], other=0.0)
                        acc *= scale[:, None] if WEIGHTS_FIRST else scale[None, :]
                        if HAS_BIAS:
                            bias = tl.load(biases[i] + n, mask=n < columns[i], other=0.0).to(tl.float32)
                            acc += bias[:, None] if WEIGHTS_FIRST else bias[None, :]
                if WEIGHTS_FIRST:
                    acc = tl.trans(acc)
                inside = (m < rows)[:, None] & (n < columns[i])[None, :]
                if HAS_T:
                    tl.store(t[i] + m[:, None] * ldt + n[None, :], acc, mask=inside)
                if HAS_SCALES:
                    acc *= _scale_of(
                        scales[i],
                        ld_scales[i],
                        slots,
                        slot_count,
                        rows_per_slot,
                        column_scales[i],
                        m,
                        rows,
                        n,
                        columns[i],
                        HAS_COLUMN_SCALE,
                    )
                elif HAS_COLUMN_SCALE and PARTS == 1:
                    acc *= tl.load(column_scales[i] + n, mask=n < columns[i], other=0.0)[None, :]
                if HAS_BIAS and (PARTS == 1 or HAS_SCALES or not HAS_COLUMN_SCALE):
                    acc += tl.load(biases[i] + n, mask=n < columns[i], other=0.0).to(tl.float32)[None, :]
                tl.store(y[i] + m[:, None] * ldy[i] + n[None, :], acc.to(y[i].dtype.element_ty), mask=inside)
            first += own


@triton.jit(do_not_specialize=["slot_count", "rows", "rows_per_slot", "span"])
def pull(
    g,  # [rows, k]
    ldg,
    w,  # U [k, columns], contiguous; int8 as int32 words
    scales,  # [slot_count, columns] float32
    ld_scales,
    slots,
    slot_count,
    rows_per_slot,
    column_scale,  # [columns] float32, if HAS_COLUMN_SCALE
    t,  # [rows, columns] float32, of row stride ldt
    ldt,
    d,  # [rows, columns], of row stride ldd, if NEED_D
    ldd,
    sums,  # [row tiles, span, columns of all parts] float32, of row stride ldsums, if NEED_SUMS
    ld_sums,
    span,  # slot entries that the rows of one tile belong to, at most
    rows,
    columns,
    k,
    HAS_COLUMN_SCALE: tl.constexpr,
    NEED_D: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    ROUND_TO_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    EXACT_HALVES: tl.constexpr,
    HOIST: tl.constexpr,
):
    """d = (g U) * scales[slot] * column_scale; sums of t * (g U) * column_scale over the rows of each slot entry."""
    tiles = _tiles(rows, columns, BLOCK_M, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, disable_licm=not HOIST):
        tile_m, m, n = _tile(index, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        h = _multiply(
            h,
            g,
            ldg,
            m,
            rows,
            w,
            n,
            columns,
            k,
            ROUND_TO_BF16,
            PRECISION,
            True,
            False,
            EXACT_HALVES,
            EVEN_K,
            BLOCK_K,
        )
        inside = (m < rows)[:, None] & (n < columns)[None, :]
        if NEED_D:
            scaled = h * _scale_of(
                scales,
                ld_scales,
                slots,
                slot_count,
                rows_per_slot,
                column_scale,
                m,
                rows,
                n,
                columns,
                HAS_COLUMN_SCALE,
            )
            tl.store(d + m[:, None] * ldd + n[None, :], scaled.to(d.dtype.element_ty), mask=inside)
        if NEED_SUMS:
            th = h * tl.load(t + m[:, None] * ldt + n[None, :], mask=inside, other=0.0)
            if HAS_COLUMN_SCALE:
                th *= tl.load(column_scale + n, mask=n < columns, other=0.0)[None, :]
            entry = m // rows_per_slot - tile_m * BLOCK_M // rows_per_slot
            sums_at = sums + tile_m * span * ld_sums + n
            for j in range(span):
                own = tl.where((entry == j)[:, None], th, 0.0)
                tl.store(sums_at + j * ld_sums, tl.sum(own, axis=0), mask=n < columns)


@triton.jit(do_not_specialize=["entries", "rows_per_slot", "span"])
def gather(
    sums,  # [row tiles, span, columns] float32 of `pull`
    slots,
    dscales,  # [slots, columns] float32
    entries,  # of slots
    rows_per_slot,
    span,
    columns,
    BLOCK_M: tl.constexpr,  # of `pull`
    BLOCK_N: tl.constexpr,
):
    """One program per slot and block of columns adds what belongs to the slot, entry after entry, tile after tile."""
    slot = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for entry in range(entries):
        if tl.load(slots + entry) == slot:
            begin = entry * rows_per_slot
            for tile in range(begin // BLOCK_M, (begin + rows_per_slot - 1) // BLOCK_M + 1):
                j = entry - tile * BLOCK_M // rows_per_slot
                line = tl.full([], 0, tl.int64) + tile * span + j
                total += tl.load(sums + line * columns + n, mask=n < columns, other=0.0)
    tl.store(dscales + slot.to(tl.int64) * columns + n, total, mask=n < columns)
