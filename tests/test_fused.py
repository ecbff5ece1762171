"""gpu/ against the definitions, on a CPU: equal bits, equal counts.  tests/test_gpu.py demands the same on a GPU.

The kernels run through Triton's interpreter, which is chosen when Triton is imported, hence in a process of their own.
It cuts float32 to bfloat16 where a GPU rounds: perturbed copies are compared in float32.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import bottleneck_weights, tiny_llama, tiny_roberta
from oracles import gaussian, same_bits, same_tensors
from torch import Tensor
from torch.func import functional_call

import gpu
import random_bits
import zo_optim
from family.mazo import mazo
from family.subzero import SubZero
from gpu.code_products import enable_code_products, multiply
from model import create
from quant import E4M3, Float, Fp8, Integers, Store, StoredWeights, encode, quantise_tokens
from random_bits import Key, Purpose, bits32, philox_blocks, tensor_id
from runtime.checkpoints import weights_sha256
from tensor_train import TRAINED_VECTOR, Bottleneck, Spec, attach
from zo_optim import ZO, PerturbedWeights, SparseZO, as_kind, normal_table, update, zo_step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs these")
full = pytest.mark.full

if INTERPRETED:
    import triton
    import triton.language as tl

    from gpu import kernels, sparse
    from gpu.adapters import FusedBottleneck, enable_fused_bottlenecks
    from gpu.in_place import enable_probes_in_place

    KNOTS = kernels.normal_knots(torch.device("cpu"))

    @triton.jit
    def _normal_kernel(knots, bits, out):
        at = tl.program_id(0) * 256 + tl.arange(0, 256)
        tl.store(out + at, kernels._normal(knots, tl.load(bits + at)))

    @triton.jit
    def _nearest_kernel(x, out):
        at = tl.program_id(0) * 256 + tl.arange(0, 256)
        tl.store(out + at, kernels._nearest8(tl.load(x + at), 3, -6, 448.0))


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of casts whose results are not selected


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("some", ["not full", pytest.param("full", marks=full)])
def test_in_the_interpreter(some):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", some, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing, and lets pass what no compiler does")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kind, value", [("bf16", "*bf16"), ("int8", "*i8"), ("int4", "*i32"), ("fp8", "*u8")])
def test_kernels_compile_for_a_gpu_that_is_not_here(kind, value):
    """Landings and the adapters' kernel, for a Hopper GPU; a Triton without a GPU compiles too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpu import adapters, kernels

    def compiles(kernel, types: dict[str, str], **constants) -> None:
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        at = {(names.index(name),): constant for name, constant in constants.items()}
        assert triton.compile(ASTSource(kernel, signature, at, {}), target=GPUTarget("cuda", 90, 32)).asm["cubin"]

    types = {"value": value, "residual": value, "scale": "*bf16" if kind == "int4" else "*fp32", "counts": "*i64",
             "delta": "*fp32", "left": "*fp64", "right": "*fp32", "factors": "*fp32"}  # fmt: skip
    form = dict(KIND=kind, MAX=7.0, RESIDUAL=0, BY_HAND=False)
    compiles(kernels._land_kernel, types, **form, TAIL="groups", BLOCK=kernels.UPDATE_BLOCK)
    compiles(kernels._land_kernel, types | {"step": "*i32"}, **form, TAIL="", BLOCK=kernels.UPDATE_BLOCK)
    compiles(kernels._land_product_kernel, types, **form, LENGTH=1.5, QUERIES=2, RANK=24, ROOM=32, ROWS=64, COLUMNS=64)
    if kind == "bf16":
        types = dict.fromkeys(("left_d", "right_d", "bias_d", "left_u", "right_u", "bias_u"), "*fp32")
        for h, rank, B in ("*bf16", 5, 64), ("*fp32", 16, 256):
            compiles(adapters._bottleneck_kernel, types | {"h": h, "y": h}, D=4096, R_D=rank, R_U=rank, B=B, WIDTH=B,
                     ROWS=adapters.ROWS, COLUMNS=adapters.COLUMNS)  # fmt: skip


def test_nothing_changes_on_a_cpu():
    zo = ZO(bits=4)
    assert gpu.estimator(zo, "cpu") is zo and not random_bits.DEVICE_TWINS


@full
@pytest.mark.skipif(INTERPRETED, reason="no kernel of Triton's")
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("shared", [False, True])
def test_products_of_codes_are_those_of_fake_quantised_numbers(shared, kind):
    """Each copy's own weights, or one for all.  The sum is in float32, or exact, then rounded to bfloat16."""
    x, w = gaussian(2, 5, 64), gaussian(2, 48, 64)[: 1 if shared else 2]
    stores = [encode(matrix, kind) for matrix in w]
    codes, scale = torch.stack([stored.codes for stored in stores]), stores[0].scale
    got = multiply(x.bfloat16(), codes, scale)
    want = quantise_tokens(x.bfloat16().float(), kind) @ (codes.float() * scale).mT
    assert got.dtype == torch.bfloat16 and got.shape == want.shape
    assert ((got - want).abs() <= 2**-8 * want.abs() + 1e-5).all()


# ---------------------------------------------------------------- whole kernels

SEED = 2**63 + 2**40 + 1  # both halves have their top bit, or bits of their own
FORMATS = [("fp32", 0), ("bf16", 0), ("int8", 0), ("int8", 4), ("int8", 8), ("int4", 0), ("int4", 1), ("int4", 2),
           ("int4", 4), ("int4", 8), ("fp8", 0)]  # fmt: skip
# every direction, estimator, probe; rows of several scale groups, with a short last one, and of few elements; 32 x 128
# are programs without a tail
CASES = [
    ((9, 2, 4, 17), ZO(bits=4, queries=2, eps=0.02)),
    ((32, 128), ZO(bits=8, estimator="q-rge1", probe="codes", eps=3e-3)),
    ((3, 264), ZO(bits=3, queries=3, eps=5e-3)),
    ((150, 8), ZO(bits=None, estimator="q-rge1", probe="codes", eps=0.02)),
    ((5, 24), ZO(bits=2, estimator="q-rge1", eps=0.3)),
]
# the first two with every format, the others in turn, for the time they take
RUNS = [(*form, *CASES[i]) for f, form in enumerate(FORMATS) for i in (0, 1, 2 + f % 3)]
# rows of one program of a pair and half of an update's, of two and one, and of four and two
RUNS += [("int8", 0, (3, C), ZO(bits=4, eps=0.02)) for C in (2048, 4096, 8192)]
RUNS += [("int8", 4, (3, 4096), ZO(probe="codes", queries=2, eps=0.02))]
RUNS += [("fp8", 0, (3, C), ZO(bits=4, eps=0.02, probe="codes")) for C in (2048, 4096)]
RUNS += [("fp32", 0, (1003,), zo) for zo in (ZO(bits=4), ZO(bits=4, probe="codes", queries=2))]
# sparse: cells of parts of a row, across two rows, and of more than the tensor; rows of whole bytes and groups or not;
# two programs with a tail, and one without; vectors
SPARSE = [
    ((9, 2, 4, 17), SparseZO(eps=2e-3, cell=64, queries=2)),
    ((66, 85), SparseZO(eps=1e-3, cell=32)),  # the last row has a hit in its fourth cell
    ((16, 64), SparseZO(eps=2e-2, cell=8, queries=3)),
    ((3, 264), SparseZO(eps=3e-3, cell=1024)),
]
RUNS += [(*form, *case) for form in FORMATS for case in SPARSE]
RUNS += [(weights, 0, (1003,), SparseZO(eps=1e-3, cell=32, queries=2)) for weights in ("fp32", "bf16")]
QUICK = [("fp32", CASES[0]), ("int8", CASES[0]), ("int8", CASES[1]), ("int4", CASES[1]), ("fp8", CASES[0]),
         *((weights, SPARSE[1]) for weights in ("fp32", "bf16", "int8", "int4", "fp8"))]  # fmt: skip


def stores(shape: tuple[int, ...], weights: str, residual: int = 0) -> list[dict[str, Store]]:
    """Two equal ones.  Signed zeros, tiny numbers, the range's ends and a row of outliers are among the weights."""
    x = gaussian(*shape) * 0.05
    x[-1:] *= 40 if len(shape) > 1 else 1
    x.view(-1)[: min(4, x.numel() - 1)] = torch.tensor([-0.0, 1e-9, -1e-9, 0.3])[: min(4, x.numel() - 1)]
    return [{"w": encode(x, weights, residual)} for _ in range(2)]


def fused(zo: ZO) -> ZO:
    return (sparse.FusedSparseZO if isinstance(zo, SparseZO) else kernels.FusedZO)(**vars(zo))


def in_memory(step: int) -> Tensor:
    """A step's number, as gpu/graphs.py has it."""
    return torch.tensor([step], dtype=torch.int32)


def read(weights: dict[str, Store], zo: ZO, step: int | Tensor, signs: tuple[int, ...] = (1, -1), **options) -> Tensor:
    """w + eps u1 and w - eps u1 of query 5."""
    copies = [(5, sign) for sign in signs]
    return PerturbedWeights(weights, Key(SEED, step), zo, copies, len(copies)).read("w", **options)


def moved_alike(plain: dict, quick: dict, grads: list[float], step: int, zo: ZO, lr: float) -> Tensor:
    """One update by the definition and one by kernels, which leave the same bits -> their counts."""
    grads = torch.tensor(grads, dtype=torch.float64)
    counts = update(plain, grads, Key(SEED, step), zo, lr)
    assert update(quick, grads, Key(SEED, in_memory(step)), fused(zo), lr).tolist() == counts.tolist()
    assert same_tensors(plain["w"], quick["w"])
    return counts


@inside
@pytest.mark.parametrize("weights, residual, shape, zo", [
    pytest.param(*run, marks=[] if run[1] == 0 and (run[0], run[2:]) in QUICK else full) for run in RUNS
])  # fmt: skip
def test_kernels_are_the_definitions(weights, residual, shape, zo):
    """An update, copies of either sign and of both, rows of them, codes to multiply, and an update so large that most
    weights go to the ends."""
    plain, quick = stores(shape, weights, residual)
    total = moved_alike(plain, quick, [0.7, -1.3, 2.0][: zo.queries], 0, zo, 0.02)
    reads = [dict(signs=signs) for signs in ((1, -1), (1,), (-1,))]
    if len(shape) > 1:
        reads += [dict(rows=torch.tensor([shape[0] - 1, 0, 0, 1]))]
    if weights in ("fp8", "int8") and len(shape) > 1:
        reads += [dict(as_codes=True)]
    for options, step in zip(reads, (0, in_memory(0), 0, in_memory(0), 0), strict=False):
        got, want = read(quick, fused(zo), step, **options), read(plain, zo, 0, **options)
        assert same_bits(got, want) if "as_codes" in options else torch.equal(got, want)
    total += moved_alike(plain, quick, [0.7, -1.3, 2.0][: zo.queries], 1, zo, 3.0)
    assert total[0] > 0 and (total[2] > 0) == (total[4] > 0) == (weights not in ("fp32", "bf16"))


@inside
@pytest.mark.parametrize("weights", ["fp32", "int4", "fp8"])
@pytest.mark.parametrize("zo", [ZO(bits=4), SparseZO(cell=8)], ids=["4 bits", "sparse"])
def test_a_row_that_is_not_there_is_not_a_number(weights, zo):
    weights, index = stores((9, 136), weights)[0], torch.tensor([8, 0, 9, 2**40, *range(-20, 0)])
    stored = kernels.dequantised(weights["w"], torch.float32, index)
    assert stored[:, 2:].isnan().all() and stored[:, :2].isfinite().all()
    for step in range(3):
        pair = read(weights, fused(zo), step, rows=index)
        assert pair[:, 2:].isnan().all() and pair[:, :2].isfinite().all()


@inside
@pytest.mark.parametrize("weights, residual", FORMATS)
def test_weights_as_they_are(weights, residual):
    for shape in ((9, 2, 68), (3, 2048), (7, 12)):
        store = stores(shape, weights, residual)[0]
        plain, quick = (view(store, torch.float32) for view in (StoredWeights, kernels.FusedStoredWeights))
        for rows in (None, torch.tensor([2, 1, 1])):
            assert torch.equal(quick.read("w", rows), plain.read("w", rows))


@inside
@pytest.mark.parametrize("weights, zo", [("int8", ZO(bits=4)), ("int8", SparseZO(cell=8)), ("fp8", ZO(bits=4))])
def test_what_has_no_kernel_is_left_to_the_definition(weights, zo):
    """Rows that are no whole groups of 8, the definition of fake quantisation, landing to nearest."""
    fits = {shape: kernels.fits(Float(torch.zeros(shape))) for shape in ((3,), (8,), (2, 8), (1, 12), (12, 1))}
    assert fits == {(3,): True, (8,): True, (2, 8): True, (1, 12): False, (12, 1): False}
    moved_alike(*stores((5, 12), weights), [1.0], 0, zo, 0.02)
    if not isinstance(zo, SparseZO):
        moved_alike(*stores((5, 16), weights), [1.0], 0, ZO(**vars(zo) | {"nearest": True}), 0.02)
    if weights == "int8":
        plain, quick = ({"w": encode(gaussian(5, 16), "int8", oracle=True)} for _ in range(2))
        assert torch.equal(read(quick, fused(zo), 0), read(plain, zo, 0))
        moved_alike(plain, quick, [1.0], 0, zo, 0.02)


# ---------------------------------------------------------------- fp8 codes


@inside
def test_minus_zero():
    """By the bits of the codes, which are what is hashed.  Weights of a thousandth of the smallest fp8 number."""
    x = torch.full((8, 40), -1e-12)
    x[:, 0] = 1.0
    plain, quick = ({"w": encode(x, "fp8")} for _ in range(2))
    assert (plain["w"].codes.view(torch.uint8) == 0x80).any()
    moved_alike(plain, quick, [1.0], 0, ZO(bits=4), 1e-12)
    assert not (plain["w"].codes.view(torch.uint8) == 0x80).any()


@inside
def test_fp8_bytes_are_taken_apart_by_hand():
    """All finite bytes: read as a pair with a probe of next to nothing, and stored again by a step of nothing."""
    byte = torch.arange(256, dtype=torch.uint8)
    code = byte[byte.view(E4M3.dtype).float().abs() <= E4M3.max_value]
    code = torch.cat((code, code[: -len(code) % 8])).view(1, -1)
    plain, quick = ({"w": Fp8(code.clone().view(E4M3.dtype), torch.full((1, 1), 0.5), code.shape)} for _ in range(2))
    zo, number = ZO(bits=4, eps=1e-30), code.view(E4M3.dtype).float()
    pair = read(quick, fused(zo), 0)
    assert torch.equal(pair, read(plain, zo, 0)) and ((pair[0] - number * 0.5).abs() < 1e-20).all()
    assert moved_alike(plain, quick, [1.0], 0, zo, 1e-30)[0] == 0
    assert torch.equal(quick["w"].codes.view(torch.uint8)[number != 0], code[number != 0])


@inside
def test_rounding_to_the_nearest_fp8_number():
    """Torch's, at every point, every tie, just beside them, beyond the ends, and at zeros of both signs."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat((grid, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), torch.tensor([1e9, -1e9, 1e-30, -0.0])))
    x = torch.cat((x, x[: -len(x) % 256]))
    got = torch.empty_like(x)
    _nearest_kernel[(len(x) // 256,)](x, got)
    assert same_bits(got, x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


# ---------------------------------------------------------------- their parts


@inside
@full
def test_every_normal_number_is_the_tables():
    bits = torch.arange(2**16, dtype=torch.int32)
    got = torch.empty_like(bits)
    _normal_kernel[(256,)](KNOTS, bits, got)
    assert torch.equal(got, normal_table(torch.device("cpu")))


@inside
def test_the_same_words_hit():
    """Rows of one cell, whose chance is their own word / 2^32, and a little less and more: below 2^22 the numbers of
    words that hit lie one beside another, so that some rows are at the very edge, on either side."""
    zo, R, key = SparseZO(eps=1e-3, cell=8), 2**16, Key(SEED, 3, 5, tensor_id("w"))
    words = philox_blocks(key, Purpose.DIRECTION, torch.arange(R), 8)[:, 0, 1].long() & 0xFFFFFFFF
    rows, hits = torch.nonzero(words < 2**22)[:, 0], 0
    for change in range(-4, 5):
        scale = (zo.eps * 8**0.5 / (words.clamp(min=1) / 2**32).sqrt()).float() * (1 + change * 2.0**-23)
        store = {"w": Integers(torch.zeros(R, 8, dtype=torch.int8), scale[:, None], torch.Size((R, 8)), 8, None, 0)}
        got = read(store, fused(zo), 3, rows=rows)
        assert torch.equal(got, read(store, zo, 3, rows=rows))
        hits += (got[0] != 0).any(1).long()
    assert ((hits > 0) & (hits < 9)).sum() > 20
    certain = {"w": Float(torch.zeros(1, 8))}  # but a chance of 1 - 2^-24 would miss this step's word, 2^32 - 187
    assert all((read(certain, way, 13823556)[0] != 0).sum() == 1 for way in (zo, fused(zo)))


@inside
@pytest.mark.parametrize("weights", ["int4", "bf16"])
@pytest.mark.parametrize("zo", [
    SparseZO(eps=5e-3, cell=8, queries=2), SubZero(eps=5e-3, queries=2, rank=3, every=2),
    mazo(ZO(eps=5e-3, queries=2), {"w": gaussian(9, 136) > 0}),
], ids=["sparse", "SubZero", "MaZO"])  # fmt: skip
def test_recorded_steps_are_given_their_own_tensors(zo, weights, monkeypatch):
    """What is recorded is called with the step's number, batch and factors in memory, and under a key of its own."""
    (plain, quick), keys = stores((9, 136), weights), []
    batches = [torch.tensor([x]) for x in (2.0, -3.0, 1.0)]

    class Loss:
        def __init__(self, factor: Tensor):
            self.factor = factor

        def __call__(self, view: PerturbedWeights) -> Tensor:
            return view.read("w").square().sum((1, 2)) * self.factor

        def tensors(self) -> list[Tensor]:
            return [self.factor]

        def with_tensors(self, inputs: list[Tensor]) -> Loss:
            return Loss(*inputs)

    def graphed(key, run, step, inputs):
        keys.append(key)
        return run(in_memory(step), [x.clone() for x in inputs])

    kind = sparse.GraphedSparseZO if type(zo) is SparseZO else kernels.graphed_kind(type(zo))
    recorded = as_kind(kind, zo, graphed=graphed)
    for step, batch in enumerate(batches):
        want = zo_step(plain, Loss(batch), Key(SEED, step), zo, 1e-3)
        with monkeypatch.context() as twins:  # the plain draws take no number in memory
            twins.setitem(random_bits.DEVICE_TWINS, "cpu", kernels.philox_blocks)
            twins.setitem(zo_optim.LANDING_TWINS, "cpu", kernels.land_)
            twins.setitem(zo_optim.PRODUCT_TWINS, "cpu", kernels.land_product_)
            got = zo_step(quick, Loss(batch), Key(SEED, step), recorded, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)) and want.counts[0] > 0
        assert same_tensors(plain["w"], quick["w"])
    assert len(set(keys)) == 2 and len(keys) == 6
    grads = torch.tensor([0.3, -0.7], dtype=torch.float64)  # an update alone, in another of SubZero's windows
    update(plain, grads, Key(SEED, 9), zo, 1e-3)
    with monkeypatch.context() as twins:
        twins.setitem(random_bits.DEVICE_TWINS, "cpu", kernels.philox_blocks)
        update(quick, grads, Key(SEED, 9), recorded, 1e-3)
    assert same_tensors(plain["w"], quick["w"])


@inside
def test_rows_by_a_product_are_those_of_a_division():
    """Every divisor up to 3,000, around multiples and at the ends of 31 bits."""
    for divisor in [*range(1, 3000), 2**27 - 1, 2**28]:
        magic, shift = kernels._magic(divisor)
        last = (2**31 - 1) // divisor * divisor
        for n in {0, 1, divisor - 1, divisor, 7 * divisor - 1, 7 * divisor, last - 1, last, 2**31 - 1} - {-1}:
            assert n >= 2**31 or n * (magic % 2**32) >> shift == n // divisor


@inside
def test_random_bits(monkeypatch):
    """They have a kernel of their own, which stands in by the kind of device."""
    key, rows = Key(SEED, 2**31 + 7, 3, 2**31 + 5), torch.tensor([0, 1, 511, 512, 2**31 - 1, 2**31, 2**32 - 1])
    for columns, some in ((8, rows), (20, rows[:4])):
        want = random_bits.philox_blocks(key, Purpose.COIN, some, columns)
        assert torch.equal(kernels.philox_blocks(key, Purpose.COIN, some, columns), want)
        later = key._replace(step=torch.tensor([key.step - 2**32], dtype=torch.int32))
        assert torch.equal(kernels.philox_blocks(later, Purpose.COIN, some, columns), want)
    monkeypatch.setitem(random_bits.DEVICE_TWINS, "cpu", lambda *draw: kernels.philox_blocks(*draw) + 1)
    assert torch.equal(random_bits.philox_blocks(key, Purpose.COIN, some, columns), want + 1)


# ---------------------------------------------------------------- products by one copy of a matrix

def fail(*_) -> None:
    raise MemoryError


IN_PLACE = [("fp32", torch.float32, None), ("bf16", torch.bfloat16, None), ("int8", torch.bfloat16, None),
            ("int8", torch.bfloat16, "int8"), ("int4", torch.float32, None), ("fp8", torch.float32, None),
            ("fp8", torch.bfloat16, "fp8")]  # fmt: skip


@full
@inside
@pytest.mark.parametrize("weights, dtype, activations", IN_PLACE)
@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
def test_both_signs_by_one_copy_of_a_matrix(raw, weights, dtype, activations):
    """The logits of perturbed copies, of each sign, and those of no probe; and no stored bit is another afterwards.
    Products may add in another order: in bf16 by a rounding, which takes some activations to the next code."""
    raw = raw | {"hidden_size": 64, "intermediate_size": 96}
    plain, placed = (create(raw, weights=weights, dtype=dtype, seed=3) for _ in range(2))
    zo, tokens = SparseZO(eps=2e-2, cell=8, dtype=dtype), torch.arange(3, 24).view(3, 7)
    for lm in (plain, placed):
        if activations:
            lm.round_inputs(partial(quantise_tokens, kind=activations))
            enable_code_products(lm)
    enable_probes_in_place(placed, zo)
    before = weights_sha256(placed.weights)
    with torch.no_grad():
        for key, query in (Key(SEED, 7), 3), (Key(5, in_memory(8)), 0):
            views = [PerturbedWeights(lm.weights, key, way, [(query, 1), (query, -1)], 2)
                     for lm, way in ((plain, zo), (placed, fused(zo)))]  # fmt: skip
            if isinstance(key.step, torch.Tensor):
                views[0].key = key._replace(step=8)
            want, got = plain(tokens, view=views[0]), placed(tokens, view=views[1])
            bound = (0.04 if dtype == torch.bfloat16 else 1e-5) * want.square().mean().sqrt()
            assert (got - want).square().mean().sqrt() <= bound and (want[0] - want[1]).abs().max() > 0.1
        assert torch.equal(placed(tokens), plain(tokens)) and weights_sha256(placed.weights) == before
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr("gpu.in_place.multiply_into", fail)
            placed(tokens, view=views[1])
        assert weights_sha256(placed.weights) == before
        one = PerturbedWeights(placed.weights, Key(5, 8), fused(zo), [(0, -1)], 1)  # one sign alone is read as before
        assert (placed(tokens, view=one) - want[1:]).square().mean().sqrt() <= bound


@inside
@pytest.mark.parametrize("weights, residual", FORMATS)
@pytest.mark.parametrize("shape", [(3, 264), (66, 136), (1003,)])
def test_what_is_given_lands_by_a_kernel(weights, residual, shape):
    """In two pieces of rows, the second of which begins anywhere."""
    if len(shape) == 1 and weights not in ("fp32", "bf16"):
        pytest.skip("vectors are floats")
    (got, want), key = stores(shape, weights, residual), Key(SEED, 2**31 + 3, tensor=tensor_id("w"))
    R, C = got["w"].matrix_shape
    delta = 0.02 * gaussian(R, C, seed=1)
    delta[-1:, :3] = torch.tensor([0.0, 9.0, -9.0])[: min(3, C)]  # beyond the grid's ends
    for rows in (slice(0, R // 3), slice(R // 3, R)) if R > 1 else (slice(0, 1),):
        counts, bits = kernels.land_(got["w"], rows, delta[rows].clone(), key), None
        if want["w"].rounds:
            bits = bits32(key, Purpose.WEIGHT_ROUNDING, torch.arange(rows.start, rows.stop), C)
        assert counts.tolist() == want["w"].add_rounded_(rows, delta[rows].clone(), bits).tolist()
    assert same_tensors(got["w"], want["w"])


@inside
@pytest.mark.parametrize("weights, residual", FORMATS)
@pytest.mark.parametrize("shape, rank, queries", [((66, 136), 20, 2), ((130, 72), 3, 1)])
def test_a_product_that_is_nowhere_in_memory_lands_by_a_kernel(weights, residual, shape, rank, queries, monkeypatch):
    """SubZero's steps, small ones and one beyond the grid's ends: tiles with tails on both sides."""
    plain, quick = stores(shape, weights, residual)
    zo, done = SubZero(rank=rank, queries=queries, every=2), []
    for step, size in enumerate((0.01, 0.02, 3.0)):
        factors, key = torch.tensor([0.7, -1.3][:queries]) * size, Key(SEED, step)
        counts = zo.add_directions_(plain, factors, key)
        with monkeypatch.context() as twins:
            twins.setitem(zo_optim.PRODUCT_TWINS, "cpu", lambda *a: done.append(1) or kernels.land_product_(*a))
            assert zo.add_directions_(quick, factors, key).tolist() == counts.tolist()
        assert same_tensors(plain["w"], quick["w"]) and counts[0] > 0
    assert len(done) == 3 and (counts[2] > 0) == (weights not in ("fp32", "bf16"))


@inside
@pytest.mark.parametrize("width, bottleneck, rank, tokens", [
    (136, 8, 5, 37), (64, 64, 3, 32), (24, 20, 16, 3), (24, 256, 2, 1), (7, 1, 1, 1),
])  # fmt: skip
def test_a_bottleneck_adapter_in_one_kernel(width, bottleneck, rank, tokens):
    """Of three copies; sizes with and without tails."""
    spec = Spec("adp", "mlp", bottleneck, rank)
    with torch.device("meta"):
        plain, fused = Bottleneck(width, spec), FusedBottleneck(width, spec)
    weights = bottleneck_weights(plain)
    h = gaussian(3, 2, tokens, width)
    with torch.no_grad():
        want, got = (functional_call(module, weights, (h,)) for module in (plain, fused))
        coarse = functional_call(fused, weights, (h.bfloat16(),))
    assert got.shape == want.shape == (3, 2, tokens, width)
    assert (got - want).abs().max() <= 1e-5 * (want - h).abs().max() and (want - h).abs().max() > 0.1
    assert coarse.dtype == torch.bfloat16 and (coarse - want).abs().max() <= 2**-6 * want.abs().max()
    want = functional_call(fused, weights, (h,))  # gradients have no kernel
    assert same_bits(want, functional_call(plain, weights, (h,)))


@inside
@pytest.mark.parametrize("raw, rank", [(tiny_llama(), 4), (tiny_llama(), 20), (tiny_roberta(), 3)])
def test_a_models_adapters_in_one_kernel_each(raw, rank):
    """All layers' sides are multiplied at once; a rank beyond the kernel's leaves the model as it is; and gradients
    take the definition's way, with what the view gives for them."""
    models = [create(raw, dtype=torch.float32) for _ in range(2)]
    models[1].fuse_adapters = enable_fused_bottlenecks
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, grads = [], []
    for lm in models:
        attach(lm, Spec("adp", "sublayers", 8, rank), seed=1)
        vector = lm.weights[TRAINED_VECTOR].value
        vector += 0.3 * gaussian(*vector.shape)
        copies = [(0, 1), (0, -1), (1, 1)]
        view = PerturbedWeights({TRAINED_VECTOR: lm.weights[TRAINED_VECTOR]}, Key(5, 1), ZO(eps=0.1), copies, 3)
        with torch.no_grad():
            logits.append(lm(tokens, view=view))
        vector.requires_grad_()
        lm(tokens).square().mean().backward()
        grads.append(vector.grad)
    used = {type(m) for m in models[1].block.modules()} & {FusedBottleneck}
    assert bool(used) == (rank <= 16) and logits[0].shape[0] == 3
    assert (logits[1] - logits[0]).abs().max() <= 1e-4 * logits[0].abs().max()
    assert (logits[0][0] - logits[0][1]).abs().max() > 1e-2 * logits[0].abs().max()
    assert torch.equal(*grads) and grads[0].abs().max() > 0
