"""Tensor-train layers, TT-SVD and factorisations, against entry-by-entry definitions, known bounds and brute force.

All in float64, where rounding is 1e-16 and a tolerance of 1e-10 is far from both rounding and any real error.
"""

from __future__ import annotations

import math
from functools import cache, partial, reduce
from itertools import product as grid

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tensor_train import MAX_FACTOR, TABLE, TensorTrain, balanced, factors_of, from_dense, to_dense


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- definitions


def by_entry(cores: list[Tensor], inputs: int, outputs: int) -> Tensor:
    """W [I, O] of cores [r, k, s], one entry at a time: G_1[:, i_1, :] G_2[:, i_2, :] ... G_d[:, i_d, :]."""
    entries = []
    for index in grid(*(range(core.shape[1]) for core in cores)):  # the last one runs fastest
        row = torch.ones(1, dtype=cores[0].dtype)
        for core, i in zip(cores, index, strict=True):
            row = torch.stack([sum(row[a] * core[a, i, b] for a in range(len(row))) for b in range(core.shape[2])])
        assert row.shape == (1,)
        entries.append(row)
    return torch.cat(entries).view(inputs, outputs)


def contracted(cores: list[Tensor], inputs: int, outputs: int) -> Tensor:
    """The same for larger matrices: each bond summed over, [1, k_1 ... k_d, 1] -> [I, O]."""
    return reduce(partial(torch.tensordot, dims=1), cores).reshape(inputs, outputs)


def random_cores(factors: tuple[int, ...], ranks: list[int], seed: int = 0) -> list[Tensor]:
    shapes = zip([1, *ranks], factors, [*ranks, 1], strict=True)
    return [gaussian(*shape, seed=seed + i) / shape[0] ** 0.5 for i, shape in enumerate(shapes)]


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm()).item()


# ---------------------------------------------------------------- the layer

SPLIT = {  # inputs, outputs, factors, ranks: some of the first factors multiply to the inputs
    "two and two": (6, 4, (2, 3, 2, 2), [2, 3, 2]),
    "uneven ranks": (12, 10, (3, 4, 2, 5), [7, 1, 5]),
    "one and three": (5, 12, (5, 2, 3, 2), [3, 4, 2]),
    "three and one": (12, 5, (2, 3, 2, 5), [2, 6, 3]),
    "LoRA": (6, 5, (6, 5), [2]),
    "factors of one": (6, 2, (1, 6, 1, 2), [2, 3, 2]),
    "one input": (1, 6, (1, 2, 3), [2, 2]),
    "one output": (6, 1, (2, 3, 1), [3, 2]),
    "one entry": (1, 1, (1, 1), [3]),
}
WHOLE = {  # none do, so that the matrix is built
    "across": (8, 3, (4, 3, 2), [2, 3]),
    "past": (4, 9, (3, 4, 3), [3, 4]),
    "two": (8, 3, (4, 6), [5]),
    "one core": (3, 4, (12,), []),
    "as the papers' 1024 x 8": (8, 6, (4, 4, 3), [2, 2]),
    "one output of two": (6, 1, (2, 3), [2]),
}
SHAPES = SPLIT | WHOLE
by_shape = pytest.mark.parametrize("shape", SHAPES)


def layer(shape: str, bias: bool = False) -> TensorTrain:
    inputs, outputs, factors, ranks = SHAPES[shape]
    return TensorTrain(inputs, outputs, ranks, bias, factors)


def weights_of(layer: TensorTrain, probes: int) -> dict[str, Tensor]:
    """Each probe's own cores and bias, by parameter name: [P, *shape]."""
    return {name: gaussian(probes, *p.shape, seed=i) for i, (name, p) in enumerate(layer.named_parameters())}


def cores_of(weights: dict[str, Tensor], probe: int) -> list[Tensor]:
    return [weights[f"cores.{i}"][probe] for i in range(sum("cores" in name for name in weights))]


@by_shape
def test_cores_make_the_matrix_of_the_definition(shape):
    inputs, outputs, _, _ = SHAPES[shape]
    weights = weights_of(layer(shape), probes=3)
    got = to_dense(list(weights.values()), inputs)
    assert got.shape == (3, inputs, outputs)
    for p in range(3):
        want = by_entry(cores_of(weights, p), inputs, outputs)
        assert relative(got[p], want) < 1e-12
        assert relative(contracted(cores_of(weights, p), inputs, outputs), want) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@by_shape
def test_the_forward_is_the_definition(shape, bias):
    """Each probe's tokens meet its own cores, or all the same ones; sequences of no token and of one too.  The fast
    forward, where there is one, is that of the whole matrix."""
    inputs, outputs, _, _ = SHAPES[shape]
    train = layer(shape, bias)
    weights, split = weights_of(train, 3), train.split
    assert (split is None) == (shape in WHOLE)
    matrices = torch.stack([contracted(cores_of(weights, p), inputs, outputs) for p in range(3)])
    added = weights["bias"][:, None] if bias else torch.zeros(3, 1, 1)
    for own, probes, tokens in ((3, 3, 5), (3, 3, 0), (1, 1, 1), (1, 3, 4)):  # sets of cores, probes
        x = gaussian(probes, tokens, inputs, seed=99)
        want = x @ matrices[:own] + added[:own]
        for train.split in {split, None}:
            y = functional_call(train, {name: tensor[:own] for name, tensor in weights.items()}, (x,))
            assert y.shape == (probes, tokens, outputs)
            assert tokens == 0 or all(relative(y[p], want[p]) < 1e-12 for p in range(probes))


def test_the_fast_forward_never_builds_the_matrix(monkeypatch):
    """Left and right halves only: r (I + O) numbers instead of I O."""
    monkeypatch.setattr("tensor_train.to_dense", lambda *_: pytest.fail("the matrix was built"))
    train = layer("two and two")
    functional_call(train, weights_of(train, 2), (gaussian(2, 3, 6),))


@by_shape
def test_gradients_are_those_of_the_definition(shape):
    inputs, outputs, _, _ = SHAPES[shape]
    train = layer(shape, True)
    weights, x, upstream = weights_of(train, 1), gaussian(1, 4, inputs, seed=99), gaussian(1, 4, outputs, seed=98)
    for tensor in weights.values():
        tensor.requires_grad_()
    ours = torch.autograd.grad((functional_call(train, weights, (x,)) * upstream).sum(), weights.values())
    y = x[0] @ contracted(cores_of(weights, 0), inputs, outputs) + weights["bias"][0]
    theirs = torch.autograd.grad((y * upstream[0]).sum(), weights.values())
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_parameters_are_the_sum_of_the_cores_and_the_bias():
    """LoRETTA's 768 x 64 adapter at rank 5: 2,392 with both biases."""
    pair = [TensorTrain(768, 64, 5, bias=True), TensorTrain(64, 768, 5, bias=True)]
    assert sum(p.numel() for train in pair for p in train.parameters()) == 2392
    assert [tuple(core.shape) for core in pair[0].cores] == [(1, 8, 5), (5, 8, 5), (5, 12, 5), (5, 8, 5), (5, 8, 1)]


@pytest.mark.parametrize("factors, rank, message", [
    ((2, 3), 2, "do not multiply to 6 x 4"), ((2, 3, 2, 3), 2, "do not multiply"),
    ((2, 3, 4), [2], "3 factors need 2 ranks"), ((2, 3, 4), [2, 2, 2], "3 factors need 2 ranks"),
    ((2, 3, 4), 0, "at least 1, got 0"), ((2, 3, 4), [3, -1], "at least 1"),
])  # fmt: skip
def test_a_layer_that_cannot_be_is_refused(factors, rank, message):
    with pytest.raises(ValueError, match=message):
        TensorTrain(6, 4, rank, False, factors)


# ---------------------------------------------------------------- TT-SVD

MATRICES = {  # inputs, outputs, factors
    "split": (12, 20, (3, 4, 4, 5)), "no split": (8, 9, (4, 3, 6)), "flat": (2, 64, (2, 4, 4, 4)),
    "tall": (81, 2, (3, 3, 3, 3, 2)), "one core": (3, 5, (15,)), "with ones": (4, 6, (1, 4, 1, 6, 1)),
}  # fmt: skip
by_matrix = pytest.mark.parametrize("matrix", MATRICES)


def ranks_of(cores: list[Tensor]) -> list[int]:
    return [core.shape[2] for core in cores[:-1]]


def dropped_at_bonds(W: Tensor, factors: tuple[int, ...], ranks: list[int]) -> list[float]:
    """For each bond, the sum of squares of the singular values of W's unfolding there beyond the rank."""
    tails = []
    for bond, rank in enumerate(ranks, 1):
        values = torch.linalg.svdvals(W.reshape(math.prod(factors[:bond]), -1))
        tails.append(values[rank:].square().sum().item())
    return tails


@by_matrix
def test_full_rank_is_exact(matrix):
    """Also zero, rank one, numbers of very different size, and float32: cores are float64, so that the only error is
    ever the truncation and not 24 bits of an SVD."""
    inputs, outputs, factors = MATRICES[matrix]
    plain = gaussian(inputs, outputs)
    scaled = plain * 10.0 ** torch.arange(inputs).remainder(9).sub(4)[:, None]
    for W in (plain, scaled, plain[:, :1] @ plain[:1], plain.float()):
        cores = from_dense(W, factors)
        assert [core.shape[1] for core in cores] == list(factors) and cores[0].shape[0] == cores[-1].shape[2] == 1
        assert all(a.shape[2] == b.shape[0] for a, b in zip(cores, cores[1:], strict=False))
        assert all(core.dtype == torch.float64 for core in cores)
        assert relative(contracted(cores, inputs, outputs), W.double()) < 1e-10
        assert relative(to_dense([core[None] for core in cores], inputs)[0], W.double()) < 1e-10
    assert not contracted(from_dense(torch.zeros(inputs, outputs), factors), inputs, outputs).any()


@by_matrix
def test_the_error_stays_within_the_tolerance(matrix):
    """|W - result| <= tolerance |W|.  Spectra from flat to steep, as flat ones never come near the bound."""
    inputs, outputs, factors = MATRICES[matrix]
    for seed, decay, tolerance in grid(range(4), (0.0, 0.5, 2.0), (1e-9, 1e-3, 0.03, 0.1, 0.3, 0.7, 1.0)):
        U, S, V = torch.linalg.svd(gaussian(inputs, outputs, seed=seed), full_matrices=False)
        W = U * (S * torch.arange(1, len(S) + 1) ** -decay) @ V
        got = contracted(from_dense(W, factors, tolerance=tolerance), inputs, outputs)
        assert relative(got, W) <= tolerance + 1e-12


@pytest.mark.parametrize("matrix", [name for name in MATRICES if name != "one core"])
def test_a_tolerance_drops_all_that_it_may(matrix):
    """The first bond has not been truncated before it, so its rank is known: the smallest whose dropped singular
    values stay below tolerance / sqrt(d - 1) of the norm.  Zero keeps one direction a bond."""
    inputs, outputs, factors = MATRICES[matrix]
    for tolerance in (0.05, 0.2, 0.6):
        W = gaussian(inputs, outputs) * 2.0 ** -torch.arange(outputs)
        allowed = (tolerance * W.norm()).square() / (len(factors) - 1)
        got = ranks_of(from_dense(W, factors, tolerance=tolerance))[0]
        full = min(factors[0], W.numel() // factors[0])
        fitting = [r for r in range(1, full + 1) if dropped_at_bonds(W, factors, [r])[0] <= allowed]
        assert got == min(fitting)
    assert set(ranks_of(from_dense(torch.zeros(inputs, outputs), factors, tolerance=0.1))) == {1}


@by_matrix
def test_a_capped_rank_is_respected_and_near_the_best(matrix):
    """Oseledets 2011, theorem 2.2: no tensor train of these ranks is nearer than the worst bond's dropped singular
    values, and TT-SVD is within the root of the sum of squares over the bonds.  The first bond's rank is the cap."""
    inputs, outputs, factors = MATRICES[matrix]
    for rank, seed in grid((1, 2, 3, 5, 100), range(4)):
        W = gaussian(inputs, outputs, seed=seed)
        cores = from_dense(W, factors, rank=rank)
        ranks = ranks_of(cores)
        assert max(ranks, default=1) <= rank
        assert matrix == "one core" or ranks[0] == min(rank, factors[0], W.numel() // factors[0])
        error = (contracted(cores, inputs, outputs) - W).square().sum().item()
        tails = dropped_at_bonds(W, factors, ranks)
        rounding = 1e-20 * W.square().sum().item()
        assert max(tails, default=0.0) - rounding <= error * (1 + 1e-9) + rounding
        assert error <= sum(tails) * (1 + 1e-9) + rounding


def test_a_rank_and_a_tolerance_both_hold():
    W = gaussian(12, 20)
    loose, capped = (ranks_of(from_dense(W, (3, 4, 4, 5), rank, 0.3)) for rank in (None, 3))
    assert capped[0] == min(3, loose[0]) and max(capped) <= 3 < max(loose)


@pytest.mark.parametrize("ranks", [[1, 1, 1], [2, 3, 2], [3, 2, 4], [1, 4, 1]])
def test_a_low_rank_matrix_is_recovered_with_its_ranks(ranks):
    """By a tolerance above rounding and far below its singular values, and by caps of its own largest rank."""
    factors = (4, 5, 6, 4)
    W = contracted(random_cores(factors, ranks, seed=3), 20, 24)
    found = from_dense(W, factors, tolerance=1e-10)
    assert ranks_of(found) == ranks
    for cores in (found, from_dense(W, factors, rank=max(ranks))):
        assert relative(contracted(cores, 20, 24), W) < 1e-9


RANGE = "rank must be at least 1 and tolerance a number of at least 0"


@pytest.mark.parametrize("changes, message", [
    *((dict(factors=f), r"multiply to .* not to \(12, 20\)") for f in ((3, 4, 4, 4), (12,), (3, 4, 4, 5, 2), ())),
    (dict(rank=0), RANGE), *((dict(tolerance=t), RANGE) for t in (-0.1, math.nan, math.inf)),
    *((dict(matrix=torch.full((12, 20), x).double()), "NaN or infinity") for x in (math.nan, math.inf)),
])  # fmt: skip
def test_what_has_no_tensor_train_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_dense(**dict(matrix=gaussian(12, 20), factors=(3, 4, 4, 5)) | changes)


# ---------------------------------------------------------------- factorisations

WIDTHS = range(64, 8193, 64)


@cache
def all_splits(n: int, least: int = 2) -> list[tuple[int, ...]]:
    """Every ascending factorisation of n into factors of 2 to 16."""
    if n == 1:
        return [()]
    return [(f, *rest) for f in range(least, 17) if n % f == 0 for rest in all_splits(n // f, f)]


def large_primes(n: int) -> list[int]:
    """Prime factors above 16, by trial division with every number."""
    found = []
    for f in range(2, n + 1):
        while n % f == 0:
            found.append(f)
            n //= f
    return [f for f in found if f > MAX_FACTOR]


def by_brute_force(n: int) -> tuple[int, ...]:
    """Fewest factors of at most 16, then the smallest distance between the least and the most; larger primes whole."""
    primes = large_primes(n)
    rest = min(all_splits(n // math.prod(primes)), key=lambda f: (len(f), f[-1] - f[0] if f else 0, f))
    return tuple(sorted([*rest, *primes])) or (1,)


KNOWN = {
    512: (8, 8, 8), 768: (8, 8, 12), 3584: (14, 16, 16), 50: (5, 10), 1: (1,), 2: (2,), 16: (16,), 17: (17,),
    34: (2, 17), 289: (17, 17), 4096: (16, 16, 16), 8192: (8, 8, 8, 16), 3072: (12, 16, 16), 997: (997,),
    2 * 997: (2, 997), 32 * 31: (4, 8, 31), 13 * 13: (13, 13), 225: (15, 15),
}  # fmt: skip


def test_known_factors():
    assert {n: balanced(n) for n in KNOWN} == KNOWN


@pytest.mark.full
def test_factors_are_the_fewest_and_most_equal():
    """Against all factorisations: every number to 600, odd ones and primes with them, and every width."""
    for n in [*range(1, 601), *WIDTHS]:
        factors = balanced(n)
        assert factors == by_brute_force(n), n
        assert math.prod(factors) == n and list(factors) == sorted(factors)
        assert all(f <= MAX_FACTOR or large_primes(f) == [f] for f in factors), n


@pytest.mark.parametrize("widths", [range(192, 8193, 1600), pytest.param(WIDTHS, marks=pytest.mark.full)], ids=len)
def test_every_width_has_factors_with_a_split(widths):
    """Where the papers have none: ascending ones of the inputs, then descending ones of the outputs.  Odd sizes too.

    The papers' own need not have a split (1024 x 64 has none).
    """
    shapes = {shape for width in widths for b in (8, 16, 64) for shape in ((width, b), (b, width))}
    for inputs, outputs in shapes | set(grid((1, 3, 7, 50, 97, 257, 1000), repeat=2)):
        factors = factors_of(inputs, outputs)
        assert math.prod(factors) == inputs * outputs
        if (inputs, outputs) in TABLE or (outputs, inputs) in TABLE:
            continue
        assert factors == balanced(inputs) + balanced(outputs)[::-1]
        with torch.device("meta"):
            train = TensorTrain(inputs, outputs, 2, bias=False)
        assert math.prod(train.factors[: train.split]) == inputs


PRINTED = {  # LoRETTA's tensor_util.py, of its rows those whose product is right; 768 x 16 is its table 10's
    (768, 64): (8, 8, 12, 8, 8), (1024, 64): (4, 8, 8, 8, 8, 4), (4096, 64): (16, 16, 16, 4, 4, 4),
    (5120, 64): (5, 8, 8, 16, 8, 8), (8192, 64): (4, 16, 16, 16, 8, 4), (768, 8): (8, 8, 12, 8),
    (1024, 8): (4, 8, 8, 8, 4), (4096, 8): (16, 16, 8, 4, 4), (5120, 8): (8, 8, 10, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4), (768, 16): (8, 8, 12, 4, 4), (4096, 16): (16, 16, 16, 4, 4),
}  # fmt: skip


def test_the_papers_factors_are_used_and_reversed():
    assert TABLE.keys() == PRINTED.keys()
    for (inputs, outputs), factors in PRINTED.items():
        assert math.prod(factors) == inputs * outputs
        assert factors_of(inputs, outputs) == factors
        assert factors_of(outputs, inputs) == factors[::-1]


def test_the_papers_factors_run_either_way():
    """768 x 8 has a split and 1024 x 8 has none; all give the definition's matrix."""
    for inputs, outputs, split in ((768, 8, True), (8, 768, True), (1024, 8, False), (8, 1024, False)):
        train = TensorTrain(inputs, outputs, 2, bias=False)
        assert (train.split is not None) == split
        weights, x = weights_of(train, 1), gaussian(1, 3, inputs, seed=99)
        want = x[0] @ contracted(cores_of(weights, 0), inputs, outputs)
        assert relative(functional_call(train, weights, (x,))[0], want) < 1e-12
