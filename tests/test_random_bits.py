"""Random bits and data order, against known answers, a slow twin, and derived bounds.

Where a bound is statistical it is 5 standard deviations, which one draw in 2 million would exceed by chance; and as
every draw has a key, what passes once passes always.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import KEY, WORD, patterns, signed, words_like

from quant import Integers
from random_bits import Key, Purpose, bits16, bits32, permutation, philox, philox_blocks

# ---------------------------------------------------------------- random bits


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, words", [  # Random123's kat_vectors, philox4x32 with 10 rounds
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_known_answers(counter, key, words):
    """philox_blocks' counter is block, step, tensor, query << 4 | purpose; its key is the seed, low word first."""
    counter, (low, high), words = hexes(counter), hexes(key), hexes(words)
    assert [int(w[0]) for w in philox(tuple(np.array([c], np.uint64) for c in counter), (low, high))] == words
    block, step, tensor, last = counter
    got = philox_blocks(Key(high << 32 | low, step, last >> 4, tensor), last & 15, torch.tensor([block]), 8)
    assert torch.equal(got, patterns(words)[None, None])


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in plain integers, from section 3 of the paper: two multiplications and a key bump a round."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@given(st.lists(WORD, min_size=4, max_size=4), st.lists(WORD, min_size=2, max_size=2))
def test_philox_equals_its_slow_twin(counter, key):
    got = philox(tuple(np.array([c, 0], np.uint64) for c in counter), tuple(key))
    assert [int(word[0]) for word in got] == slow_philox(counter, key)
    assert [int(word[1]) for word in got] == slow_philox([0] * 4, key)


def slow_halves(key: Key, purpose: Purpose, row: int, column: int, columns: int) -> list[int]:
    """An element's half of 16 bits and the next one.  A block is of its row alone: 8 halves, a word's low one first."""
    block = row * -(-columns // 8) + column // 8
    words = slow_philox([block, key.step, key.tensor, key.query * 16 + purpose], [key.seed % 2**32, key.seed >> 32])
    return [words[half % 8 // 2] >> 16 * (half % 2) & 0xFFFF for half in (column, column + 1)]


@pytest.mark.parametrize("columns", [1, 8, 13])
def test_bits_are_the_layouts_bits(columns):
    rows = [0, 5, 2**20]
    halves = [[slow_halves(KEY, Purpose.UPDATE_ROUNDING, r, c, columns) for c in range(columns)] for r in rows]
    draw = (KEY, Purpose.UPDATE_ROUNDING, torch.tensor(rows), columns)
    assert bits16(*draw).tolist() == [[low for low, _ in row] for row in halves]
    assert bits32(*draw).tolist() == [[signed(high << 16 | low) for low, high in row] for row in halves]


@settings(max_examples=40)
@given(columns=st.integers(1, 20), rows=st.lists(st.integers(0, 29), min_size=1, max_size=30))
def test_bits_do_not_depend_on_which_rows_are_drawn_or_in_what_order(columns, rows):
    for draw in (bits16, bits32):
        together = draw(KEY, Purpose.DIRECTION, torch.arange(30), columns)
        assert torch.equal(draw(KEY, Purpose.DIRECTION, torch.tensor(rows), columns), together[rows])


def test_a_long_draw_is_its_parts():
    """Long enough to be cut for the cache, at an odd place; the parts are short enough not to be."""
    rows = torch.arange(40_003).flip(0)
    parts = [philox_blocks(KEY, Purpose.DIRECTION, part, 8) for part in rows.split(1000)]
    assert torch.equal(philox_blocks(KEY, Purpose.DIRECTION, rows, 8), torch.cat(parts))


def test_no_two_streams_share_a_block():
    """128-bit blocks of different streams are equal by chance once in 10^31 draws of this size."""
    changes = [{}, dict(seed=KEY.seed + 1), dict(seed=KEY.seed ^ 1 << 40), dict(step=8), dict(query=4), dict(query=0),
               dict(tensor=0xDEADBEEE)]  # fmt: skip
    keys, rows = [KEY._replace(**change) for change in changes], torch.arange(1000)
    drawn = torch.cat([philox_blocks(key, purpose, rows, 8)[:, 0] for key in keys for purpose in Purpose])
    assert len(drawn.unique(dim=0)) == len(keys) * len(Purpose) * 1000


@pytest.mark.parametrize("chance", [2.0**-16, 0.01, 0.7])
def test_neighbours_that_share_bits_decide_apart(chance):
    """Of eight neighbours, each pair is rounded up together as often as by chance.

    Where an upper half is as small as the threshold's, a neighbour's lower half is too: that is 2^-15 of the cases.
    """
    n, generator = 2**19, torch.Generator().manual_seed(0)
    words = bits32(KEY, Purpose.WEIGHT_ROUNDING, torch.randint(2**28, (n,), generator=generator), 8)
    below = ((words >> 1 & 0x7FFFFFFF) < int(chance * 2**31)).double()
    together = below.T @ below / n
    for j, k in itertools.combinations(range(8), 2):
        assert abs(together[j, k] - chance**2) < 5 * (chance**2 / n) ** 0.5 + 3 / n + 2.0**-15 * chance
    assert ((below.mean(0) - chance).abs() < 5 * (chance / n) ** 0.5 + 3 / n).all()


def test_nothing_touches_the_global_generator():
    before = torch.get_rng_state()
    bits16(KEY, Purpose.DIRECTION, torch.arange(5), 7)
    store = Integers.encode(torch.eye(5), 8)
    store.add_rounded_(slice(None), torch.ones(5, 5), words_like(torch.empty(5, 5)))
    permutation(1, 2, 10)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- data order


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_a_permutation_is_one(seed, epoch, n):
    assert permutation(seed, epoch, n).sort().values.tolist() == list(range(n))


def test_a_permutation_has_a_key():
    """Two random orders of 50 are equal once in 50!."""
    first = permutation(0, 0, 50)
    assert torch.equal(first, permutation(0, 0, 50))
    for other in (permutation(1, 0, 50), permutation(2**32, 0, 50), permutation(0, 1, 50)):
        assert not torch.equal(first, other)


def test_permutations_are_uniform():
    """Each of the 6 orders of 3 comes up n / 6 times, give or take binomial deviations."""
    n = 1200
    drawn = [tuple(permutation(0, epoch, 3).tolist()) for epoch in range(n)]
    for order in itertools.permutations(range(3)):
        assert abs(drawn.count(order) - n / 6) < 5 * (n * 1 / 6 * 5 / 6) ** 0.5
