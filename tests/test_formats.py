"""Every store against a list of all points of its grid: packing, encoding, stepping, reading by rows and by
elements, brackets, saving.

What a store holds is read from the tensors that it saves, bit by bit, and compared in float64 in units of its scale
(oracles.py).  Statistical bounds are 5 standard deviations, which one draw in 2 million would exceed by chance; and
as every draw has a key, what passes once passes always.  Rare events are not normal: a mean of n gets 3 / n more.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    ALL,
    BITS,
    GRIDS,
    GROUP,
    KEY,
    MAX_CODES,
    QUANTISED,
    bracket,
    codes_of,
    everywhere,
    fields,
    gaussian,
    nearest,
    neighbours,
    numbers,
    outwards,
    packed,
    points,
    same_bits,
    same_tensors,
    scales_of,
    store_of,
    words_like,
)
from torch import Tensor

import quant
from quant import (
    FLOATS,
    FORMATS,
    INTEGERS,
    RESIDUALS,
    Float,
    Store,
    StoredWeights,
    check_format,
    encode,
    from_tensors,
    pack_bits,
    read_packed,
    row_chunks,
    tensor_specs,
    unpack_bits,
    write_packed,
)

every_grid = pytest.mark.parametrize("weights, residual", GRIDS)
every_residual = pytest.mark.parametrize("weights, residual", [grid for grid in GRIDS if grid[1]])
every_kind = pytest.mark.parametrize("weights", QUANTISED)
with_bf16 = pytest.mark.parametrize("weights, residual", [("bf16", 0), *GRIDS])


def test_the_lists_of_the_oracles_are_complete():
    assert {"fp32", "bf16", *QUANTISED} == set(FORMATS) and BITS == INTEGERS
    assert {weights for weights, _ in GRIDS} == set(QUANTISED) and {r for _, r in GRIDS} == set(RESIDUALS)


# ---------------------------------------------------------------- packing


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 41), st.integers(0, 99))
def test_packing_is_the_layout(bits, rows, columns, seed):
    """The first column in the lowest bits, zeros in what a last byte has left, and back; from integers, and from the
    whole floats that a store hands over."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
    assert torch.equal(fields(packed(number, bits), bits, columns), number), "the oracle's own inverse"
    for dtype in (torch.int8, torch.float32):
        assert same_bits(pack_bits(number.to(dtype), bits), packed(number, bits))
    assert torch.equal(unpack_bits(packed(number, bits), bits, columns).long(), number)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.integers(1, 41), st.integers(0, 99))
def test_single_elements_are_read_and_written_in_the_layout(bits, rows, columns, seed):
    """One of each byte, from the left or the right: what is beside it stays, to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, rows, columns), generator=generator)
    bytes_, place = packed(old, bits), torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    assert read_packed(bytes_, tuple(place), bits, columns).tolist() == old.flatten().tolist()
    row, column = place[:, (place[1] + seed) * bits % 8 == 0]
    want = old.index_put((row, column), new[row, column])
    write_packed(bytes_, (row, column), bits, new[row, column].float())
    assert same_bits(bytes_, packed(want, bits))


# ---------------------------------------------------------------- encoding


def awkward(weights: str, residual: int) -> Tensor:
    """[rows, 32] float32: all points, the middles between them, and the floats beside each middle.

    Every row begins with the largest code, which makes its scale 1; a row is one of int4's groups.
    """
    grid, end = points(weights, residual), points(weights)[-1]
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(to)) for to in (np.inf, -np.inf)]
    x = torch.cat((grid.float(), middle, *beside))
    x = x[(x.abs() <= end) & ((x == 0) | (x.abs() > 1e-30))]  # the floats beside 0 would not survive a scale
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).view(-1, 31)
    return torch.nn.functional.pad(x, (1, 0), value=float(end))


@every_grid
def test_encode_finds_the_nearest_of_all_points(weights, residual):
    """Exactly, ties to even.  Rows are scaled by powers of two from 2^-20 to 2^20, so no division rounds."""
    x = awkward(weights, residual)
    scale = 2.0 ** (torch.arange(len(x)) % 41 - 20)[:, None]
    stored = encode(x * scale, weights, residual)
    assert torch.equal(stored.tensors()[".scale"].float(), scale)
    assert torch.equal(numbers(stored, weights, residual), nearest(x.double(), points(weights, residual)))


def check_nearest(stored: Store, x: Tensor, weights: str, residual: int) -> None:
    """A quotient in float32 is off by 2^-24 of itself, so the nearest point may be missed by twice that."""
    got, want = numbers(stored, weights, residual), x.double() / scales_of(stored, weights).double()
    best = (want - nearest(want, points(weights, residual))).abs()
    assert ((got - want).abs() <= best + 2**-23 * want.abs()).all()


def scales_by_hand(matrix: Tensor, weights: str) -> Tensor:
    """Each element's own, [R, C] float32: the largest size of its group, over the largest code."""
    end, C = points(weights)[-1].float(), matrix.shape[1]
    width = GROUP if weights == "int4" else C
    largest = [[max(map(abs, row[c : c + width])) for c in range(0, C, width)] for row in matrix.tolist()]
    scale = torch.tensor([[row[c // width] for c in range(C)] for row in largest]) / end
    return scale.bfloat16().float() if weights == "int4" else scale


@every_grid
def test_encode_in_groups_of_all_widths(weights, residual):
    """Rows and groups differ by powers of 30, so a wrong one's scale would show; the largest size becomes the largest
    code.  The tensors are as tensor_specs says."""
    for columns in (1, 2, 7, 31, 32, 33, 300):
        x = gaussian(5, columns) * 30.0 ** (torch.arange(5)[:, None] - 2 - torch.arange(columns) // GROUP)
        stored, scale, end = encode(x, weights, residual), scales_by_hand(x, weights), points(weights)[-1]
        assert torch.equal(scales_of(stored, weights), scale)
        check_nearest(stored, x, weights, residual)
        is_largest = (x.abs() / scale - float(end)).abs() < 4e-3 * float(end)  # a scale of bfloat16 is off by 2^-9
        assert is_largest.sum() >= 5
        assert torch.equal(codes_of(stored, weights)[is_largest], x[is_largest].double().sign() * end)
        kinds = {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in stored.tensors().items()}
        assert kinds == tensor_specs(x.shape, weights, residual) and stored.shape == x.shape


@every_kind
def test_a_zero_group_is_exact_and_learns(weights):
    """A row, an int4 group inside, and a short one at the end.  They get the matrix's largest scale, or 1; a step of
    one spacing then takes each code to the grid's first point."""
    assert (encode(torch.zeros(3, 130), weights).tensors()[".scale"] == 1).all()
    x = gaussian(4, 300)
    x[2], x[1, 32:64], x[3, 288:] = 0, 0, 0
    stored, zero = encode(x, weights), x == 0
    scale = scales_of(stored, weights)
    assert (scale[zero if weights == "int4" else [2]] == scales_by_hand(x, weights).max()).all()
    assert not numbers(stored, weights)[zero].any() and not stored.dequantise()[zero].any()
    grid = points(weights)
    delta = torch.where(zero, grid[grid > 0].min() * scale, 0.0).float()
    assert stored.add_rounded_(ALL, delta, words_like(x)).tolist() == [n := int(zero.sum()), n, 0, n, 0]
    assert (numbers(stored, weights)[zero] == grid[grid > 0].min()).all()


TINY = [1e-38, 1.2e-38, 3e-39, 1e-40, 1e-41, 3e-43, 2e-43, 1e-43, 4e-45, 1e-45]


@every_grid
def test_tiny_groups_are_finite_and_in_range(weights, residual):
    """Scales that would be subnormal, or 0.  Nearest on the grid of the scale that was stored, ends included."""
    x = torch.tensor(TINY)[:, None] * torch.tensor([1.0, -1.0, 0.0, 0.5, -0.3])
    x = torch.cat((x, torch.ones(1, 5)))
    stored = encode(x, weights, residual)
    scale = scales_of(stored, weights)
    assert (scale >= 2.0**-100).all() and scale.isfinite().all() and stored.dequantise().isfinite().all()
    check_nearest(stored, x, weights, residual)


@every_grid
def test_encode_does_not_depend_on_chunks(weights, residual, monkeypatch):
    """A zero row's scale is the largest of the matrix, not of a chunk."""
    x = gaussian(9, 150) * torch.arange(9)[:, None]
    whole = encode(x, weights, residual)
    monkeypatch.setattr(quant, "row_chunks", lambda shape, device: [slice(i, i + 1) for i in range(shape[0])])
    assert same_tensors(whole, encode(x, weights, residual))


@every_grid
def test_encode_with_given_scales_is_nearest_on_that_grid(weights, residual):
    """Whatever is beyond the ends becomes the end, -128 never, and the scales stay."""
    x = gaussian(4, 150)
    scale = encode(x, weights, residual).tensors()[".scale"] * 0.5
    stored = encode(x, weights, residual, scale=scale)
    assert torch.equal(stored.tensors()[".scale"].float(), scale)
    check_nearest(stored, x, weights, residual)
    assert ((x.double() / scales_of(stored, weights)).abs() > points(weights)[-1]).sum() > 5


@pytest.mark.parametrize("weights, kind", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.int8),
                                           ("int4", torch.uint8), ("fp8", torch.float8_e4m3fn)])  # fmt: skip
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_are_quantised_and_vectors_are_not(weights, kind, source):
    """Nor are single numbers.  A store owns its memory, and is read in the shapes that forwards know."""
    for shape in ((4, 6), (6,), ()):
        tensor = gaussian(*shape).to(source)
        stored, was = encode(tensor, weights), tensor.float().clone()
        kept = stored.tensors()[""]
        assert kept.dtype == (kind if len(shape) == 2 else torch.float32) and stored.shape == shape
        tensor.zero_()
        read = StoredWeights({"w": stored}, torch.bfloat16).read("w")
        if len(shape) == 2:
            assert read.shape == (1, 4, 6) and read.dtype == torch.bfloat16
            assert torch.equal(read[0], stored.dequantise().bfloat16()) and read.any()
        else:
            assert type(stored) is Float and same_bits(read, was[None])


# ---------------------------------------------------------------- steps


@with_bf16
def test_a_step_is_unbiased_everywhere(weights, residual):
    """From points of the whole grid, up to three spacings either way, across binades and up to the ends, 2,000 times.

    A number between two points at f of the way lands on either, with a standard deviation of gap sqrt(f (1 - f)).
    Adding in float32 may move it by 2^-24 of itself, the scale by as much.
    """
    n, start, grid = 2000, everywhere(weights, residual), points(weights, residual)
    for seed in range(3):
        stored = store_of(start.expand(n, -1), weights, residual)
        scale = scales_of(stored, weights)
        reach = 6 * torch.rand(len(start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 3
        delta = (outwards(start, grid) * reach * scale).float()
        stored.add_rounded_(ALL, delta, words_like(delta, KEY._replace(step=seed)))
        x = start + delta.double() / scale.double()
        low, high = neighbours(x, grid)
        got = numbers(stored, weights, residual)
        assert ((got == low) | (got == high)).all()
        x = x.clamp(grid[0], grid[-1])
        variance = ((high - x) * (x - low)).mean(0)
        bound = 5 * (variance / n).sqrt() + 3 * (high - low).amax(0) / n + 2**-22 * x.abs().amax(0)
        assert ((got - x).mean(0).abs() <= bound).all()
        assert torch.equal(scales_of(stored, weights), scale)


@with_bf16
def test_a_step_without_random_bits_lands_on_the_nearest_point(weights, residual):
    """Over all points, to float32's 2^-23.  Integers round the step, and that is the same."""
    start, grid = everywhere(weights, residual)[None], points(weights, residual)
    for seed in range(5):
        stored = store_of(start, weights, residual)
        scale = scales_of(stored, weights)
        delta = (outwards(start, grid) * gaussian(1, start.shape[1], seed=seed) * 2 * scale).float()
        stored.add_rounded_(ALL, delta, None)
        want = start + delta.double() / scale.double()
        gap = (numbers(stored, weights, residual) - want).abs()
        assert (gap <= (nearest(want, grid) - want).abs() + 2**-22 * want.abs()).all()


@every_grid
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_hold_back_and_count(weights, residual, sign):
    """From the last three points, 0 to 4 whole spacings outwards, so that nothing is left to chance.  Then far beyond
    the ends, infinite after division by the scale too: nothing wraps round."""
    grid = points(weights, residual)
    gap, (start, steps) = grid[-1] - grid[-2], torch.cartesian_prod(grid[-3:], torch.arange(5).double()).T
    stored = store_of(sign * start[None], weights, residual, unit=0.5)
    delta = (sign * steps * gap * 0.5).float()[None]
    counts = stored.add_rounded_(ALL, delta, words_like(delta))
    wanted = start + steps * gap
    new = wanted.clamp(max=grid[-1])
    assert torch.equal(numbers(stored, weights, residual)[0], sign * new)
    changed, moves, held, way, lost = counts.tolist()
    assert (changed, held) == (int((new != start).sum()), int((wanted > grid[-1]).sum())) == (8, 9)
    assert moves == (wanted != start).sum() == 12
    unit = 2.0**-9 if weights == "fp8" else gap
    assert (way, lost) == ((wanted - start).sum() / unit, (wanted - new).sum() / unit) and (way, lost) == (
        (30 * 32 * 512, 19 * 32 * 512) if weights == "fp8" else (30, 19)
    )
    start = everywhere(weights, residual)
    for size in (1e6, 1e30, 3e38):
        stored = store_of(start[None], weights, residual, unit=1e-3)
        delta = torch.full((1, len(start)), sign * size)
        _, moves, held, way, lost = stored.add_rounded_(ALL, delta, words_like(delta)).tolist()
        assert (numbers(stored, weights, residual) == sign * grid[-1]).all() and moves == held == len(start)
        farthest = 2**16 * len(start) * (512 if weights == "fp8" else 1)  # what is infinite counts as that
        assert lost == farthest if size > 1e6 else 0 < lost <= farthest
        assert way - lost == (numbers(stored, weights, residual) - start).abs().sum() / unit


@pytest.mark.parametrize("weights", FORMATS)
def test_add_rounded_is_add_rounded_in_place_without_writing(weights):
    """On the grid that a forward reads.  Rows that are not stepped stay, and so do all bits where a step is 0.  Steps
    from far below a spacing to far beyond the ends; the counts are of what changed."""
    x, rows = gaussian(6, 140), slice(1, 4)
    stored = encode(x, weights)
    for size, chance in product((0.0, -0.0, 1e-5, 0.1, 10.0), (True, False)):
        delta = torch.full((3, 140), size) if size == 0 else gaussian(3, 140, seed=1) * size
        bits = words_like(delta) if chance else None
        moved = encode(x, weights)
        landed = moved.add_rounded(rows, delta, bits)
        assert same_tensors(moved, stored) and landed.dtype == torch.float32
        changed, moves, held, way, lost = moved.add_rounded_(rows, delta, bits).tolist()
        assert torch.equal(moved.dequantise(rows).float(), landed)
        assert torch.equal(moved.dequantise()[[0, 4, 5]], stored.dequantise()[[0, 4, 5]])
        assert changed == (moved.dequantise() != stored.dequantise()).sum()
        assert size != 0 or same_tensors(moved, stored)
        edge = weights not in FLOATS and size == 10
        assert changed <= moves and held <= moves and (lost > 0) == (held > 0) >= edge and lost <= way


def test_fp32_adds_plainly_and_counts():
    """A vector, or one number, is one row."""
    stored = Float(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert stored.add_rounded_(slice(1, 2), torch.tensor([[0.5, 0.0, 1e-9]]), None).tolist() == [1, 1, 0, 0, 0]
    assert stored.value.tolist() == [[1, 2, 3], [4.5, 5, 6]], "6 + 1e-9 is 6 in float32"
    for value in (torch.tensor([1.0, 2.0]), torch.tensor(1.0)):
        stored, delta = Float(value), torch.tensor([[1.0, 0.0]])[:, : value.numel()]
        assert stored.shape == value.shape and stored.dequantise(slice(0, 1)).shape == (1, value.numel())
        assert stored.add_rounded_(slice(0, 1), delta, None).tolist() == [1, 1, 0, 0, 0]
        assert stored.value.flatten().tolist() == [2, 2][: value.numel()]
    assert not stored.rounds and Float(torch.zeros(1, dtype=torch.bfloat16)).rounds


# ---------------------------------------------------------------- rows, elements, brackets


@pytest.mark.parametrize("weights, residual, oracle", [
    ("fp32", 0, False), ("bf16", 0, False), *((*grid, False) for grid in GRIDS),
    *((*grid, True) for grid in GRIDS if grid[0] in MAX_CODES),
])  # fmt: skip
def test_rows_and_elements_are_those_of_the_whole(weights, residual, oracle):
    """Rows by a slice and by numbers, and every element by its row and column, in no order.  A step of some elements,
    no two in one byte, is a step of the whole that is 0 elsewhere: the same bits and counts, some held at the ends."""
    C = 141
    x, delta = gaussian(5, C), gaussian(5, C, seed=1) * torch.logspace(-2, 1, C)
    stored, bits = encode(x, weights, residual, oracle), words_like(x)
    places = tuple(torch.cartesian_prod(torch.arange(5), torch.arange(C)).T[:, torch.randperm(
        5 * C, generator=torch.Generator().manual_seed(2))])  # fmt: skip
    methods = ["dequantise", "add_rounded", *(["code"] if weights in QUANTISED else [])]
    for name in [*methods, "spacing", "fine"] if weights in MAX_CODES else methods:
        for rows in (slice(2, 4), torch.tensor([4, 0, 3, 3]), places):
            got, want = (
                getattr(stored, name)(r, *((delta[r], bits[r]) if name == "add_rounded" else ())) for r in (rows, ALL)
            )
            want = want.expand(5, C)[rows]
            assert torch.equal(got.expand(want.shape) if rows is not places else got, want), (name, rows)
    want = codes_of(stored, weights).float() * scales_of(stored, weights)
    assert torch.equal(stored.dequantise().float(), want)
    view, index = StoredWeights({"w": stored}, torch.bfloat16), torch.tensor([4, 0, 4])
    assert torch.equal(view.read("w", index), want[None, index]), "chosen rows in float32"
    row, column = (axis[places[1] % 8 == places[0]] for axis in places)
    few = torch.zeros(5, C).index_put((row, column), delta[row, column])
    for chance in (True, False):
        by_place, by_row = (encode(x, weights, residual, oracle) for _ in range(2))
        counts = by_place.add_rounded_((row, column), delta[row, column], bits[row, column] if chance else None)
        assert torch.equal(counts, by_row.add_rounded_(ALL, few, bits if chance else None))
        assert same_tensors(by_place, by_row) and counts[0] > 20 and (counts[2] > 3 or weights in FLOATS)
    if weights in MAX_CODES and not oracle:
        fine = stored.fine(ALL).index_put((row, column), stored.max_fine - stored.fine((row, column)).abs())
        stored.write((row, column), fine[row, column])
        assert torch.equal(stored.fine(ALL), fine)


@pytest.mark.parametrize("weights, residual", [("fp32", 0), ("bf16", 0), *GRIDS])
def test_a_bracket_is_the_nearest_points_that_far_away(weights, residual):
    """Of points all over the grid and of several reaches, from a 100th of the finest scale to 300 of them; a residual
    changes nothing, nor does the oracle.  fp8 stops at its ends, integers do not: a probe reads numbers."""
    start = everywhere(weights, residual)
    start = start[(start.abs() < 50) & (start.abs() > 2**-7)] if weights in FLOATS else start
    stored = store_of(start.repeat(5, 1), weights, residual)
    x, scale = codes_of(stored, weights), scales_of(stored, weights)
    places = tuple(torch.cartesian_prod(torch.arange(5), torch.arange(len(start))).T)
    stores = [stored]
    if weights in MAX_CODES:
        stores.append(from_tensors(copies(stored), stored.shape, weights, residual, oracle=True))
    for t in torch.tensor([0.0037, 0.3, 0.37, 1.0, 3.7, 111.0]):
        low, high = bracket(x, t.double() / scale.double(), weights)
        for store in stores:
            below, above, unit = store.bracket(places, t.item())
            assert torch.equal(below, low[places].float()) and torch.equal(above, high[places].float())
            assert torch.equal(unit, scale[places])
    assert weights != "fp8" or (below.min(), above.max()) == (-448, 448)


@given(st.sampled_from(["cpu", "cuda"]), st.integers(1, 5000), st.integers(1, 2**27))
def test_row_chunks_cover_all_rows_once(device, rows, columns):
    chunks = row_chunks((rows, columns), torch.device(device))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    bound = 2**25 if device == "cuda" else 2**17
    assert all(c.stop - c.start == 1 or (c.stop - c.start) * columns <= bound for c in chunks)


# ---------------------------------------------------------------- residuals


@every_residual
def test_a_residual_is_the_rest_of_a_finer_number(weights, residual):
    """All pairs: fine = code * 2^b + residual, and every fine number is one pair, found by encoding its weight."""
    grid, end, unit = points(weights, residual), MAX_CODES[weights], 2**residual
    stored = store_of(grid[None], weights, residual)
    assert len(grid) == (2 * end + 1) * unit == stored.max_fine - stored.min_fine + 1
    assert torch.equal(stored.fine(ALL)[0].double(), grid * unit - 0.5)
    code, rest = codes_of(stored, weights), fields(stored.tensors()[".residual"], residual, len(grid))
    assert torch.equal((code * unit + rest)[0], grid * unit - 0.5)
    assert (rest.min(), rest.max(), code.min(), code.max()) == (-unit // 2, unit // 2 - 1, -end, end)
    assert torch.equal(stored.dequantise(), code.float() * scales_of(stored, weights))
    weight = numbers(stored, weights, residual).float() * scales_of(stored, weights)
    assert same_tensors(encode(weight, weights, residual, scale=stored.scale), stored)


@every_residual
def test_a_forward_reads_the_code_alone(weights, residual):
    """Whatever the residual: the weights, and where a probe lands.  The code is the nearest one."""
    x = gaussian(6, 150)
    stored = encode(x, weights, residual)
    nearby = (numbers(stored, weights, residual) - codes_of(stored, weights)).abs()
    assert nearby.max() == 0.5 - 0.5 / 2**residual
    delta, bits, index = gaussian(6, 150, seed=1), words_like(x), torch.tensor([5, 0, 0])

    def reads() -> list[Tensor]:
        landed = stored.add_rounded(ALL, delta, bits)
        return [stored.dequantise(), landed, stored.dequantise(index)]

    before = reads()
    stored.residual.random_(generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(before, reads(), strict=True))


@every_residual
def test_small_steps_add_up_in_the_residual(weights, residual):
    """2^b steps of a 2^b-th of the scale are one code, with no rounding at all, and a read changes on the way once."""
    unit = 2**residual
    stored = encode(torch.tensor([[1.0, -1.0, 0.0] * 5]), weights, residual)
    code, delta = [codes_of(stored, weights)], torch.full((1, 15), -1.0) * stored.spacing(ALL) / unit
    for _ in range(unit):
        stored.add_rounded_(ALL, delta, words_like(delta))
        code.append(codes_of(stored, weights))
    changes = torch.stack(code).diff(dim=0)
    assert torch.equal(changes.sum(0), torch.tensor([[-1.0, 0.0, -1.0] * 5]).double())
    assert torch.equal(changes.abs().sum(0), changes.sum(0).abs()), "one way only"


# ---------------------------------------------------------------- saving


def copies(stored: Store) -> dict[str, Tensor]:
    return {suffix: tensor.clone() for suffix, tensor in stored.tensors().items()}


SHAPES = [(1, 1), (3, 7), (4, 128), (2, 129), (5, 257), (6,), (), (5, 3, 3, 3), (2, 3, 47), (2, 1, 1, 1)]


@pytest.mark.parametrize("weights, residual", [("fp32", 0), ("bf16", 0), *GRIDS])
def test_tensors_come_back_and_have_the_promised_shapes(weights, residual):
    """Tensors of any number of axes.  Those of three and more are the matrix of their first axis and all others: the
    same codes, the same step, however the tensor lies in memory; forwards read them in their own shape."""
    for shape in map(torch.Size, SHAPES):
        x = gaussian(*shape)
        stored = encode(x, weights, residual)
        specs = {suffix: (tensor.dtype, tensor.shape) for suffix, tensor in stored.tensors().items()}
        assert specs == tensor_specs(shape, weights, residual)
        again = from_tensors(copies(stored), shape, weights, residual)
        assert type(again) is type(stored) and again.shape == stored.shape == shape and same_tensors(again, stored)
        if len(shape) > 2:
            other = encode(x.transpose(0, -1).contiguous().transpose(0, -1), weights, residual)
            assert same_tensors(other, stored) and torch.equal(other.dequantise(), stored.dequantise())
            matrix, delta = encode(x.flatten(1), weights, residual), gaussian(*x.flatten(1).shape, seed=1)
            counts = [store.add_rounded_(ALL, delta, words_like(delta)) for store in (stored, again, matrix)]
            assert counts[0].any() and torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])
            assert same_tensors(stored, again)
            for a, b in zip(stored.tensors().values(), matrix.tensors().values(), strict=True):
                assert same_bits(a.flatten(1), b)
            view = StoredWeights({"w": stored, "matrix": matrix}, torch.float32)
            assert torch.equal(view.read("w"), view.read("matrix").view(1, *shape))


def refused(tensors: dict, weights: str, residual: int, message: str, shape=(3, 5)) -> None:
    with pytest.raises(ValueError) as error:
        from_tensors(tensors, torch.Size(shape), weights, residual)
    assert message in str(error.value)


@every_grid
def test_wrong_scales_and_types_are_refused(weights, residual):
    for value in (0.0, -0.0, -1.0, 7e-31, np.inf, -np.inf, np.nan):
        tensors = copies(encode(gaussian(3, 5), weights, residual))
        tensors[".scale"][1] = value
        refused(tensors, weights, residual, ".scale must hold finite numbers of at least 8e-31")
    for suffix, (dtype, _) in tensor_specs(torch.Size((3, 5)), weights, residual).items():
        for other in {torch.int8, torch.uint8, torch.float8_e5m2, torch.float16} - {dtype}:
            tensors = copies(encode(gaussian(3, 5), weights, residual))
            tensors[suffix] = tensors[suffix].to(other)
            refused(tensors, weights, residual, f"{suffix} is {other}, expected {dtype}")


def test_fp8_bytes_that_are_no_numbers_are_refused():
    """Of all 256, one of each sign."""
    number = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    for byte in range(256):
        tensors = {"": number[byte].expand(1, 1).clone(), ".scale": torch.ones(1, 1)}
        if number[byte].double().isfinite():
            stored = from_tensors(tensors, torch.Size((1, 1)), "fp8")
            assert stored.dequantise().item() == number[byte].double()
        else:
            refused(tensors, "fp8", 0, " holds codes outside [-448.0, 448.0]", (1, 1))
    assert (~number.double().isfinite()).nonzero().flatten().tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("weights, residual", [grid for grid in GRIDS if grid[0] in MAX_CODES])
def test_integers_without_a_mirror_image_are_refused(weights, residual):
    """-128 and -8, with any residual, also in the last of many chunks."""
    end, unit = MAX_CODES[weights], 2**residual
    for rest in {-unit // 2, unit // 2 - 1} if residual else {0}:
        tensors = copies(encode(torch.zeros(3, 5), weights, residual))
        codes, rests = torch.zeros(2, 3, 5, dtype=torch.int64)
        codes[2, 4], rests[2, 4] = -end - 1, rest
        tensors[""] = packed(codes, BITS[weights]).view(tensors[""].dtype)
        if residual:
            tensors[".residual"] = packed(rests, residual)
        refused(tensors, weights, residual, f" holds codes outside [-{end}, {end}]")
    rows = 2 * row_chunks((10**6, 64), torch.device("cpu"))[0].stop + 1
    tensors = {"": torch.zeros(rows, 64, dtype=torch.int8), ".scale": torch.ones(rows, 1)}
    tensors[""][-1, -1] = -128
    refused(tensors, "int8", 0, "[-127, 127]", (rows, 64))


@pytest.mark.parametrize("weights, residual, oracle, message", [
    ("int3", 0, False, "weights must be one of fp32, bf16, int8, int4, fp8, got 'int3'"),
    ("int8", 3, False, "residual must be one of 0, 1, 2, 4, 8 bits, got 3"),
    ("int4", -1, False, "got -1"),
    ("fp8", 4, False, "a residual needs weights int8 or int4, got fp8"),
    ("bf16", 1, False, "a residual needs weights int8 or int4, got bf16"),
    ("fp8", 0, True, "the oracle needs weights int8 or int4, got fp8"),
])  # fmt: skip
def test_formats_that_do_not_go_together(weights, residual, oracle, message):
    for call in (check_format, lambda *form: encode(torch.zeros(2, 2), *form)):
        with pytest.raises(ValueError) as error:
            call(weights, residual, oracle)
        assert message in str(error.value)
