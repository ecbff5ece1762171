"""The fused kernels against the plain definitions, on a CPU through Triton's interpreter: equal bits, equal counts.

tests/test_gpu.py demands the same of the compiled kernels.  The interpreter is chosen when Triton is imported, so the
tests run in a process of their own.  It cuts float32 to bfloat16 where a GPU rounds: pairs are compared in float32.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import random_bits
import zo_optim
from model import StoredView
from quant import Float, Fp8, Stored, encode
from random_bits import Key, Use, random_words, tensor_id
from zo_optim import ZO, Pair, normal_knots, normal_table, update

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs these")

if INTERPRETED:
    import triton
    import triton.language as tl

    import fused

    @triton.jit
    def _normal_kernel(knots, bits, out):
        at = tl.program_id(0) * 256 + tl.arange(0, 256)
        tl.store(out + at, fused._normal(knots, tl.load(bits + at)))

    @triton.jit
    def _nearest_kernel(x, out):
        at = tl.program_id(0) * 256 + tl.arange(0, 256)
        tl.store(out + at, fused._nearest8(tl.load(x + at), 3, -6, 448.0))

    @triton.jit
    def _hit_kernel(words, out, unit, power, grain, KIND: tl.constexpr):
        at = tl.arange(0, 8)[None, :]
        units, powers = tl.full([1, 1], unit, tl.float32), tl.full([1, 8], power, tl.float32)
        _, hit = fused._grid_step(1.0, tl.load(words + at).to(tl.uint32), units, powers, grain, KIND, False)
        tl.store(out + at, hit.to(tl.int32))


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of casts whose results are not selected

SEED = 2**63 + 2**40 + 1  # both halves have their top bit, or bits of their own
KNOTS = normal_knots(torch.device("cpu"))
FORMATS = [("fp32", 0), ("bf16", 0), ("int8", 0), ("int8", 4), ("int8", 8), ("int4", 0), ("int4", 1), ("int4", 2),
           ("int4", 4), ("int4", 8), ("fp8", 0), ("fp8-e5m2", 0)]  # fmt: skip
CASES = [  # every direction, estimator, probe; rows of several scale groups, with a short last one, and of few
          # elements; 32 x 128 are programs without a tail
    ((9, 136), ZO(bits=4, queries=2, eps=0.02)),
    ((32, 128), ZO(grid=True, estimator="q-rge1", probe="codes", eps=3e-3, stride=3)),
    ((3, 264), ZO(grid=True, queries=3, eps=5e-3)),
    ((150, 8), ZO(bits=None, estimator="q-rge1", probe="codes", eps=0.02)),
    ((5, 24), ZO(bits=2, estimator="q-rge1", eps=0.3)),
]
# the first two with every format, the others in turn, for the time they take
RUNS = [(*form, *CASES[i]) for f, form in enumerate(FORMATS) for i in (0, 1, 2 + f % 3)]
# rows of one program of a pair and half of an update's, of two and one, and of four and two
RUNS += [(w, r, (3, 4096), ZO(grid=True, eps=0.02)) for w, r in FORMATS if w in ("int8", "fp8", "fp8-e5m2")]
RUNS += [("int8", 0, (2, 8192), ZO(grid=True, eps=0.02))]
RUNS += [("int8", 4, (3, 4096), ZO(grid=True, probe="codes", queries=2, eps=0.02))]
RUNS += [("int8", 0, (3, C), ZO(bits=4, eps=0.02)) for C in (2048, 4096)]
RUNS += [("fp8", 0, (3, C), ZO(bits=4, eps=0.02, probe="codes")) for C in (2048, 4096)]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def stores(shape: tuple[int, ...], weights: str, residual: int) -> list[dict[str, Stored]]:
    """Two equal ones.  Signed zeros, tiny numbers and the ends of the range are among the weights."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    x.view(-1)[: min(4, x.numel() - 1)] = torch.tensor([-0.0, 1e-9, -1e-9, 0.3])[: min(4, x.numel() - 1)]
    return [{"w": encode(x, weights, residual)} for _ in range(2)]


def fused_update(store: dict[str, Stored], slopes: list[float], step: int, zo: ZO, lr: float) -> Tensor:
    """zo_optim.update, with the kernel for the definition, and the step's number in memory as graphs.py has it."""

    def land(step: int, factors: Tensor) -> Tensor:
        counts = torch.zeros(fused.SHARDS, 2, dtype=torch.int64)
        fused.update_(store["w"], Key(SEED, in_memory(step), 0, tensor_id("w")), factors, zo, KNOTS, counts)
        return counts.sum(0)

    return update(store, slopes, SEED, step, zo, lr, land)


def in_memory(step: int) -> Tensor:
    return torch.tensor([step], dtype=torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, signs of zeros too."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@inside
@pytest.mark.parametrize("weights, residual, shape, zo", RUNS)
def test_matrices(weights, residual, shape, zo):
    """An update, a pair, and an update so large that most weights go to the ends of the range."""
    plain, quick = stores(shape, weights, residual)
    total = torch.zeros(2, dtype=torch.int64)
    for step, lr in enumerate((0.02, 3.0)):
        slopes = [0.7, -1.3, 2.0][: zo.queries]
        counts = update(plain, slopes, SEED, step, zo, lr)
        assert fused_update(quick, slopes, step, zo, lr).tolist() == counts.tolist()
        total += counts
        for a, b in zip(plain["w"].parts().values(), quick["w"].parts().values(), strict=True):
            assert same(a, b)
        if step == 0:
            want = Pair(plain, SEED, step, 5, zo, torch.float32).read("w")
            for number in (step, in_memory(step)):
                got = fused.read_pair(quick["w"], Key(SEED, number, 5, tensor_id("w")), zo, KNOTS, torch.float32)
                assert torch.equal(got, want)
    assert total[0] > 0 and (total[1] > 0) == (weights not in ("fp32", "bf16"))


@inside
@pytest.mark.parametrize("weights", ["fp8", "fp8-e5m2"])
def test_minus_zero(weights):
    """By the bits of the codes, which are what is hashed.  Weights of a thousandth of the smallest fp8 number."""
    x = torch.full((8, 40), -1e-12)
    x[:, 0] = 1.0
    plain, quick = ({"w": encode(x, weights)} for _ in range(2))
    assert (plain["w"].codes.view(torch.uint8) == 0x80).any()
    update(plain, [1.0], SEED, 0, ZO(bits=4), 1e-12)
    fused_update(quick, [1.0], 0, ZO(bits=4), 1e-12)
    assert torch.equal(*(store["w"].codes.view(torch.uint8) for store in (plain, quick)))
    assert not (plain["w"].codes.view(torch.uint8) == 0x80).any()


@inside
@pytest.mark.parametrize("zo", [ZO(bits=4), ZO(grid=True, probe="codes", queries=2)], ids=["4 bits", "grid"])
def test_vectors(zo):
    plain, quick = stores((1003,), "bf16", 0)
    want = Pair(plain, SEED, 7, 5, zo, torch.bfloat16).read("w")
    got = fused.read_pair(quick["w"], Key(SEED, 7, 5, tensor_id("w")), zo, KNOTS, torch.float32)
    assert torch.equal(got.view(2, 1003), want)
    counts = update(plain, [0.5] * zo.queries, SEED, 7, zo, 0.01)
    assert fused_update(quick, [0.5] * zo.queries, 7, zo, 0.01).tolist() == counts.tolist()
    assert same(plain["w"].value, quick["w"].value)


@inside
@pytest.mark.parametrize("weights", ["fp8", "fp8-e5m2"])
def test_fp8_bytes_are_taken_apart_by_hand(weights):
    """All finite bytes: read as a pair with a probe of next to nothing, and stored again by a step of nothing."""
    kind = encode(torch.ones(1, 1), weights).grid
    byte = torch.arange(256, dtype=torch.uint8)
    code = byte[byte.view(kind.dtype).float().abs() <= kind.top]
    code = torch.cat((code, code[: -len(code) % 8])).view(1, -1)
    plain, quick = ({"w": Fp8(code.clone().view(kind.dtype), torch.full((1, 1), 0.5), kind)} for _ in range(2))
    zo, key = ZO(bits=4, eps=1e-30), Key(SEED, 0, 0, tensor_id("w"))
    read = fused.read_pair(quick["w"], key, zo, KNOTS, torch.float32)
    assert torch.equal(read, Pair(plain, SEED, 0, 0, zo, torch.float32).read("w"))
    assert ((read[0] - code.view(kind.dtype).float() * 0.5).abs() < 1e-20).all()
    assert fused_update(quick, [1.0], 0, zo, 1e-30).tolist()[0] == 0
    number = code.view(kind.dtype).float() != 0
    assert torch.equal(quick["w"].codes.view(torch.uint8)[number], code[number])


@inside
def test_every_normal_number_is_the_tables():
    bits = torch.arange(2**16, dtype=torch.int32)
    got = torch.empty_like(bits)
    _normal_kernel[(256,)](KNOTS, bits, got)
    assert torch.equal(got, normal_table(torch.device("cpu")))


@inside
@pytest.mark.parametrize("ratio", [2.0**-12, 1e-3, 0.011, 0.3, 0.9999999, 1.0])
@pytest.mark.parametrize("weights, power", [("int8", 1.0), ("fp8", 8.0), ("fp8-e5m2", 4.0)])
def test_the_same_words_hit(weights, power, ratio, monkeypatch):
    """Words on both sides of the edge, with a spacing of 1, by the kernel and by grid_step; both give two 31-bit words
    in 2^32 ratio^2 for each hit, rounded up."""
    grain = float(torch.tensor(ratio))
    edge = math.ceil(min(int(torch.tensor(grain).square() * 2.0**32), 2**32 - 1) / 2)
    words = torch.tensor([0, edge - 2, edge - 1, edge, edge + 1, edge + 600, 2**31 - 1]).clamp(0, 2**31 - 1)
    words = torch.cat((words, words[2:3] - 2**31)).to(torch.int32)[None]  # one with the top bit, below the edge
    monkeypatch.setattr(zo_optim, "bits32", lambda *args: words)
    want = zo_optim.grid_step(Key(0, 0), torch.arange(1), torch.ones(1, 1), 8, grain) != 0
    got = torch.empty_like(words)
    _hit_kernel[(1,)](words, got, 1.0, power, grain, KIND=weights)
    assert torch.equal(got != 0, want)
    if ratio < 0.99:
        assert want[0].tolist() == [True, True, True, False, False, False, False, True]


@inside
def test_rows_that_are_no_whole_groups_are_left_to_the_definition():
    fits = {shape: fused.fits(Float(torch.zeros(shape))) for shape in ((3,), (8,), (2, 8), (1, 12), (12, 1))}
    assert fits == {(3,): True, (8,): True, (2, 8): True, (1, 12): False, (12, 1): False}


@inside
def test_rows_by_a_product_are_those_of_a_division():
    """Every divisor up to 3,000, around multiples and at the ends of 31 bits."""
    for divisor in [*range(1, 3000), 2**27 - 1, 2**28]:
        magic, shift = fused._magic(divisor)
        last = (2**31 - 1) // divisor * divisor
        for n in {0, 1, divisor - 1, divisor, 7 * divisor - 1, 7 * divisor, last - 1, last, 2**31 - 1} - {-1}:
            assert n >= 2**31 or n * (magic % 2**32) >> shift == n // divisor


@inside
def test_words():
    """random_bits has a kernel of its own."""
    blocks = torch.tensor([0, 1, 511, 512, 2**31 - 1, 2**31, 2**32 - 1])
    key = Key(SEED, 2**31 + 7, 3, 2**31 + 5)
    counter, seed = (key.step, key.tensor, key.query << 4 | Use.COIN), (key.seed & 0xFFFFFFFF, key.seed >> 32)
    wanted = random_words(key, Use.COIN, blocks)
    assert torch.equal(random_bits._random_words_triton(counter, seed, blocks), wanted)
    counter = (torch.tensor([counter[0] - 2**32], dtype=torch.int32), *counter[1:])
    assert torch.equal(random_bits._random_words_triton(counter, seed, blocks), wanted)


@inside
@pytest.mark.parametrize("weights", ["fp32", "int4", "fp8"])
def test_one_sign_alone_is_its_half_of_the_pair(weights):
    plain, quick = stores((5, 136), weights, 0)
    zo, key = ZO(bits=4, eps=0.02), Key(SEED, 3, 5, tensor_id("w"))
    both = fused.read_pair(quick["w"], key, zo, KNOTS, torch.float32)
    for half, sign in enumerate((1, -1)):
        assert torch.equal(fused.read_pair(quick["w"], key, zo, KNOTS, torch.float32, (sign,)), both[half : half + 1])
        assert torch.equal(Pair(plain, SEED, 3, 5, zo, torch.float32, signs=(sign,)).read("w"), both[half : half + 1])


@inside
@pytest.mark.parametrize("weights, residual, shape, zo", [run for run in RUNS if run[2][0] > 7][::3])
def test_chosen_rows(weights, residual, shape, zo):
    plain, quick = stores(shape, weights, residual)
    index = torch.tensor([7, 0, 0, 3, shape[0] - 1])
    got = fused.read_pair(quick["w"], Key(SEED, 3, 5, tensor_id("w")), zo, KNOTS, torch.float32, rows=index)
    assert torch.equal(got, Pair(plain, SEED, 3, 5, zo, torch.float32).rows("w", index))


@inside
@pytest.mark.parametrize("weights", ["fp32", "int4", "fp8"])
@pytest.mark.parametrize("row", [9, -1, 2**40])
def test_a_row_that_is_not_there_is_not_a_number(weights, row):
    stored = stores((9, 136), weights, 0)[0]["w"]
    read = fused.read(stored, torch.float32, torch.tensor([8, row, 0]))
    assert read[:, 1].isnan().all() and read[:, [0, 2]].isfinite().all()
    pair = fused.read_pair(stored, Key(SEED, 0), ZO(grid=True), KNOTS, torch.float32, rows=torch.tensor([8, row, 0]))
    assert pair[:, 1].isnan().all() and pair[:, [0, 2]].isfinite().all()


@inside
@pytest.mark.parametrize("weights, residual", [form for form in FORMATS if form[0] not in ("fp32", "bf16")])
def test_weights_as_they_are(weights, residual):
    for shape in ((9, 136), (3, 2048)):
        store = stores(shape, weights, residual)[0]
        view, index = StoredView(store, torch.float32), torch.tensor([2, 1, 1])
        assert torch.equal(fused.read(store["w"], torch.float32), view.read("w"))
        assert torch.equal(fused.read(store["w"], torch.float32, index), view.rows("w", index))


@inside
@pytest.mark.parametrize("zo", [zo for _, zo in CASES], ids=str)
def test_fp8_codes_of_a_pair(zo):
    for shape in ((9, 136), (2, 2048)):
        plain, quick = stores(shape, "fp8", 0)
        got = fused.read_pair(quick["w"], Key(SEED, 3, 5, tensor_id("w")), zo, KNOTS, torch.float8_e4m3fn)
        assert same(got, Pair(plain, SEED, 3, 5, zo, torch.float32).codes("w"))


@inside
def test_rounding_to_the_nearest_fp8_number():
    """Torch's, at every point, every tie, just beside them, beyond the top, and at zeros of both signs."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat((grid, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), torch.tensor([1e9, -1e9, 1e-30, -0.0])))
    x = torch.cat((x, x[: -len(x) % 256]))
    got = torch.empty_like(x)
    _nearest_kernel[(len(x) // 256,)](x, got)
    assert same(got, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
