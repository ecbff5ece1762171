"""Tensor-train layers, TT-SVD and factorisations, against entry-by-entry definitions, known bounds and brute force.

All in float64, where rounding is 1e-16 and a tolerance of 1e-10 is far from both rounding and any real error.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product as grid

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tensor_train import MOST, TABLE, TensorTrain, balanced, factors_of, from_dense, to_dense


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


def by_gathering(cores: list[Tensor], inputs: int, outputs: int) -> Tensor:
    """The same, all entries side by side, for larger matrices and for autograd: digits of the entry's number choose
    the slices."""
    number, slices = torch.arange(inputs * outputs), []
    for core in reversed(cores):
        slices.insert(0, core[:, number % core.shape[1]].movedim(1, 0))  # [I O, r, s]
        number = number // core.shape[1]
    assert not number.any()
    whole = slices[0]
    for part in slices[1:]:
        whole = torch.einsum("ers,est->ert", whole, part)
    return whole.reshape(inputs, outputs)


def random_cores(factors: tuple[int, ...], ranks: list[int], seed: int = 0) -> list[Tensor]:
    shapes = zip([1, *ranks], factors, [*ranks, 1], strict=True)
    return [gaussian(*shape, seed=seed + i) / shape[0] ** 0.5 for i, shape in enumerate(shapes)]


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm()).item()


# ---------------------------------------------------------------- the forward

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


def weights_of(shape: str, bias: bool, probes: int) -> dict[str, Tensor]:
    """Each probe's own cores and bias, by parameter name: [P, *shape]."""
    named = layer(shape, bias).named_parameters()
    return {name: gaussian(probes, *p.shape, seed=i) for i, (name, p) in enumerate(named)}


def cores_of(weights: dict[str, Tensor], probe: int) -> list[Tensor]:
    return [weights[f"cores.{i}"][probe] for i in range(sum("cores" in name for name in weights))]


@by_shape
def test_the_two_definitions_agree(shape):
    inputs, outputs, factors, ranks = SHAPES[shape]
    cores = random_cores(factors, ranks)
    assert relative(by_gathering(cores, inputs, outputs), by_entry(cores, inputs, outputs)) < 1e-12


@by_shape
def test_cores_make_the_matrix_of_the_definition(shape):
    inputs, outputs, _, _ = SHAPES[shape]
    weights = weights_of(shape, False, probes=3)
    got = to_dense(list(weights.values()), inputs)
    assert got.shape == (3, inputs, outputs)
    for p in range(3):
        assert relative(got[p], by_entry(cores_of(weights, p), inputs, outputs)) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@by_shape
def test_the_forward_is_the_definition(shape, bias):
    """Each of one or three probes' tokens meets its own cores.  Sequences of one token too."""
    inputs, outputs, _, _ = SHAPES[shape]
    train, weights = layer(shape, bias), weights_of(shape, bias, 3)
    assert (train.split is None) == (shape in WHOLE)
    matrices = torch.stack([by_entry(cores_of(weights, p), inputs, outputs) for p in range(3)])
    for probes, tokens in grid((1, 3), (1, 5)):
        x = gaussian(probes, tokens, inputs, seed=99)
        y = functional_call(train, {name: tensor[:probes] for name, tensor in weights.items()}, (x,))
        want = x @ matrices[:probes] + (weights["bias"][:probes, None] if bias else 0.0)
        assert y.shape == (probes, tokens, outputs)
        assert all(relative(y[p], want[p]) < 1e-12 for p in range(probes))


@pytest.mark.parametrize("bias", [False, True])
@by_shape
def test_probes_can_share_their_cores(shape, bias):
    """P = 1 of the weights beside three probes' tokens."""
    inputs = SHAPES[shape][0]
    shared, x = weights_of(shape, bias, 1), gaussian(3, 4, inputs, seed=99)
    own = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in shared.items()}
    train = layer(shape, bias)
    assert relative(functional_call(train, shared, (x,)), functional_call(train, own, (x,))) < 1e-12


@pytest.mark.parametrize("shape", SPLIT)
def test_the_fast_forward_equals_the_reconstruction(shape):
    inputs = SHAPES[shape][0]
    train, weights, x = layer(shape, True), weights_of(shape, True, 2), gaussian(2, 7, inputs, seed=99)
    fast = functional_call(train, weights, (x,))
    train.split = None
    assert relative(fast, functional_call(train, weights, (x,))) < 1e-12


def test_the_fast_forward_never_builds_the_matrix(monkeypatch):
    """Left and right halves only: r (I + O) numbers instead of I O."""
    monkeypatch.setattr("tensor_train.to_dense", lambda *_: pytest.fail("the matrix was built"))
    functional_call(layer("two and two"), weights_of("two and two", False, 2), (gaussian(2, 3, 6),))


@pytest.mark.parametrize("shape", ["two and two", "across"])
def test_no_token_gives_no_output(shape):
    inputs, outputs, _, _ = SHAPES[shape]
    y = functional_call(layer(shape, True), weights_of(shape, True, 2), (gaussian(2, 0, inputs),))
    assert y.shape == (2, 0, outputs)


@by_shape
def test_gradients_are_those_of_the_definition(shape):
    inputs, outputs, _, _ = SHAPES[shape]
    weights, x = weights_of(shape, True, 1), gaussian(1, 4, inputs, seed=99)
    upstream = gaussian(1, 4, outputs, seed=98)
    for tensor in weights.values():
        tensor.requires_grad_()
    ours = torch.autograd.grad((functional_call(layer(shape, True), weights, (x,)) * upstream).sum(), weights.values())
    y = x[0] @ by_entry(cores_of(weights, 0), inputs, outputs) + weights["bias"][0]
    theirs = torch.autograd.grad((y * upstream[0]).sum(), weights.values())
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_parameters_are_the_sum_of_the_cores_and_the_bias():
    """LoRETTA's 768 x 64 adapter at rank 5: 2,392 with both biases (PAPERS 3.3, where it gives the papers' totals)."""
    pair = [TensorTrain(768, 64, 5, bias=True), TensorTrain(64, 768, 5, bias=True)]
    assert sum(p.numel() for train in pair for p in train.parameters()) == 2392
    assert [tuple(core.shape) for core in pair[0].cores] == [(1, 8, 5), (5, 8, 5), (5, 12, 5), (5, 8, 5), (5, 8, 1)]


@pytest.mark.parametrize("factors, rank, told", [
    ((2, 3), 2, "do not multiply to 6 x 4"), ((2, 3, 2, 3), 2, "do not multiply"),
    ((2, 3, 4), [2], "3 factors need 2 ranks"), ((2, 3, 4), [2, 2, 2], "3 factors need 2 ranks"),
    ((2, 3, 4), 0, "at least 1, got 0"), ((2, 3, 4), [3, -1], "at least 1"),
])  # fmt: skip
def test_a_layer_that_cannot_be_is_refused(factors, rank, told):
    with pytest.raises(ValueError, match=told):
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
    """Also zero, rank one, and numbers of very different size."""
    inputs, outputs, factors = MATRICES[matrix]
    plain = gaussian(inputs, outputs)
    scaled = plain * 10.0 ** torch.arange(inputs).remainder(9).sub(4)[:, None]
    for W in (plain, scaled, plain[:, :1] @ plain[:1]):
        cores = from_dense(W, factors)
        assert [core.shape[1] for core in cores] == list(factors) and cores[0].shape[0] == cores[-1].shape[2] == 1
        assert all(a.shape[2] == b.shape[0] for a, b in zip(cores, cores[1:], strict=False))
        assert relative(by_gathering(cores, inputs, outputs), W) < 1e-10
        assert relative(to_dense([core[None] for core in cores], inputs)[0], W) < 1e-10
    assert not by_gathering(from_dense(torch.zeros(inputs, outputs), factors), inputs, outputs).any()


def test_float32_matrices_get_float64_cores():
    """So that the only error is the truncation, not 24 bits of an SVD."""
    W = gaussian(12, 20).float()
    cores = from_dense(W, (3, 4, 4, 5))
    assert all(core.dtype == torch.float64 for core in cores)
    assert relative(by_gathering(cores, 12, 20), W.double()) < 1e-10


@pytest.mark.parametrize("tolerance", [1e-9, 1e-3, 0.03, 0.1, 0.3, 0.7, 1.0])
@by_matrix
def test_the_error_stays_within_the_tolerance(matrix, tolerance):
    """|W - result| <= tolerance |W|.  Spectra from flat to steep, as flat ones never come near the bound."""
    inputs, outputs, factors = MATRICES[matrix]
    for seed, decay in grid(range(4), (0.0, 0.5, 2.0)):
        U, S, V = torch.linalg.svd(gaussian(inputs, outputs, seed=seed), full_matrices=False)
        W = U * (S * torch.arange(1, len(S) + 1) ** -decay) @ V
        got = by_gathering(from_dense(W, factors, tolerance=tolerance), inputs, outputs)
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


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 100])
@by_matrix
def test_a_capped_rank_is_respected_and_near_the_best(matrix, rank):
    """Oseledets 2011, theorem 2.2: no tensor train of these ranks is nearer than the worst bond's dropped singular
    values, and TT-SVD is within the root of the sum of squares over the bonds."""
    inputs, outputs, factors = MATRICES[matrix]
    for seed in range(4):
        W = gaussian(inputs, outputs, seed=seed)
        cores = from_dense(W, factors, rank=rank)
        ranks = ranks_of(cores)
        assert max(ranks, default=1) <= rank
        error = (by_gathering(cores, inputs, outputs) - W).square().sum().item()
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
    W = by_gathering(random_cores(factors, ranks, seed=3), 20, 24)
    found = from_dense(W, factors, tolerance=1e-10)
    assert ranks_of(found) == ranks
    for cores in (found, from_dense(W, factors, rank=max(ranks))):
        assert relative(by_gathering(cores, 20, 24), W) < 1e-9


@pytest.mark.parametrize("factors", [(3, 4, 4, 4), (12,), (3, 4, 4, 5, 2), ()])
def test_factors_of_another_product_are_refused(factors):
    with pytest.raises(ValueError, match=r"multiply to .* not to \(12, 20\)"):
        from_dense(gaussian(12, 20), factors)


@pytest.mark.parametrize("changes", [
    dict(rank=0), dict(tolerance=-0.1), dict(tolerance=float("nan")), dict(tolerance=float("inf")),
], ids=str)  # fmt: skip
def test_ranks_and_tolerances_that_are_none_are_refused(changes):
    with pytest.raises(ValueError, match="rank must be at least 1 and tolerance a number of at least 0"):
        from_dense(gaussian(12, 20), (3, 4, 4, 5), **changes)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_matrix_of_what_is_no_number_is_refused(number):
    W = gaussian(12, 20)
    W[3, 7] = number
    with pytest.raises(ValueError, match="NaN or infinity"):
        from_dense(W, (3, 4, 4, 5))


# ---------------------------------------------------------------- factorisations

WIDTHS = range(64, 8193, 64)
BOTTLENECKS = (8, 16, 64)


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
    return [f for f in found if f > MOST]


def by_brute_force(n: int) -> tuple[int, ...]:
    """Fewest factors of at most 16, then the smallest distance between the least and the most; larger primes whole."""
    primes = large_primes(n)
    rest = min(all_splits(n // math.prod(primes)), key=lambda f: (len(f), f[-1] - f[0] if f else 0, f))
    return tuple(sorted([*rest, *primes])) or (1,)


@pytest.mark.parametrize("n, factors", [
    (512, (8, 8, 8)), (768, (8, 8, 12)), (3584, (14, 16, 16)), (50, (5, 10)), (1, (1,)), (2, (2,)), (16, (16,)),
    (17, (17,)), (34, (2, 17)), (289, (17, 17)), (4096, (16, 16, 16)), (8192, (8, 8, 8, 16)), (3072, (12, 16, 16)),
    (997, (997,)), (2 * 997, (2, 997)), (32 * 31, (4, 8, 31)), (13 * 13, (13, 13)), (225, (15, 15)),
])  # fmt: skip
def test_known_factors(n, factors):
    assert balanced(n) == factors


def test_factors_are_the_fewest_and_most_equal():
    """Against all factorisations: every number to 600, odd ones and primes with them, and every width."""
    for n in [*range(1, 601), *WIDTHS]:
        factors = balanced(n)
        assert factors == by_brute_force(n), n
        assert math.prod(factors) == n and list(factors) == sorted(factors)
        assert all(f <= MOST or large_primes(f) == [f] for f in factors), n


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_every_width_has_factors_with_a_split(bottleneck):
    """Where the papers have none: ascending ones of the inputs, then descending ones of the outputs.

    The papers' own need not have a split (1024 x 64 has none), but their product is right.
    """
    for width, (inputs, outputs) in grid(WIDTHS, ((0, bottleneck), (bottleneck, 0))):
        inputs, outputs = inputs or width, outputs or width
        factors = factors_of(inputs, outputs)
        assert math.prod(factors) == inputs * outputs
        if (inputs, outputs) in TABLE or (outputs, inputs) in TABLE:
            continue
        assert factors == balanced(inputs) + balanced(outputs)[::-1]
        with torch.device("meta"):
            train = TensorTrain(inputs, outputs, 2, bias=False)
        assert train.split == len(balanced(inputs))
        assert math.prod(train.factors[: train.split]) == inputs


def test_factors_of_odd_sizes_split_too():
    for inputs, outputs in grid((1, 3, 7, 50, 97, 257, 1000), repeat=2):
        with torch.device("meta"):
            train = TensorTrain(inputs, outputs, 2, bias=False)
        assert train.split is not None and math.prod(train.factors) == inputs * outputs


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
        weights = {name: gaussian(1, *p.shape, seed=i) for i, (name, p) in enumerate(train.named_parameters())}
        x = gaussian(1, 3, inputs, seed=99)
        want = x[0] @ by_gathering(cores_of(weights, 0), inputs, outputs)
        assert relative(functional_call(train, weights, (x,))[0], want) < 1e-12
