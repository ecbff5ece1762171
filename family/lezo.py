"""LeZO: a step probes and moves a random share of the blocks (Wang et al., arXiv 2410.09823); and AdaLeZO: a bandit
chooses them (Wang et al., Findings of ACL 2026, arXiv 2604.18264).

LeZO.  At step t, with A_t some of the L blocks, drawn anew each step:

    u'_i = u_i where weight i is in a block of A_t, or in no block; else 0
    g = (L(w + eps u') - L(w - eps u')) / (2 eps),    w <- w - lr g u'

rho: the paper's sparsity; a share of 1 - rho of the blocks is in A_t.  Given A_t, E[g u'] is the gradient of what is
active and 0 elsewhere.  Over the draws a block's mean step is share times MeZO's, which nothing makes up for.

AdaLeZO.  Of k = share L draws with replacement, each of which is block l with chance p_l, c_l are l:

    A_t = the blocks with c_l > 0, probed as above;    w_l <- w_l - lr c_l / (k p_l) g u'_l
    p_l = (1 - gamma) softmax_l(R_l / (tau max R)) + gamma / L
    R_l <- (1 - alpha) R_l + alpha mean |g|    for l in A_t

E[c_l / (k p_l)] = 1, so that the mean step is MeZO's whatever p is.

The abstracts have blocks as the unit and a new set each step; the bandit, draws with replacement, the weights.  The
rules for p and R were read in a public trainer of that name; LeZO has no code.  Ours:
- |A_t| = k = max(1, round(share L)), halves to even, and share is 0.25.
- Embedding, final norm and head move in every step, in AdaLeZO by weight 1 (that trainer has them as arms).  Or they
  never do (rest=False): both signs then have the same input up to the first active block.
- Of AdaLeZO, gamma is 0.2, not 0.01, and no weight is clipped: so the mean stays right, and c_l / (k gamma / L) bounds
  them.  A block that was never drawn counts as the best, or the first ones drawn would keep all but gamma.

Which blocks move is a function of (seed, step), in AdaLeZO also of all projected gradients before: a replay has the
same ones, because zo_optim.update, which redoes a step, lets the bandit observe it.

Shape key: L blocks, k draws, Q queries.  Imports model, quant, random_bits and zo_optim.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor

from model import LanguageModel
from quant import COUNTED, Store
from random_bits import Key, Purpose, philox_blocks, tensor_id
from zo_optim import ZO, SparseZO, as_kind

# ---------------------------------------------------------------- LeZO


@dataclass(frozen=True)
class ActiveBlocks:
    """ZO.moves of LeZO: (tensor's name, key) -> whether the step of that key probes and moves it.

    key: seed and step decide, the step an int.  Raises ValueError for a share outside (0, 1] or no blocks.
    """

    prefix: str  # of a block's tensor names, before its number: LanguageModel.layers
    blocks: int  # L
    share: float = 0.25  # 1 - rho
    rest: bool = True  # whether what is in no block moves: always in the paper, never otherwise

    def __post_init__(self):
        number_of(self.blocks, self.share)

    def __call__(self, name: str, key: Key) -> bool:
        block = block_of(name, self.prefix)
        return self.rest if block is None else block in active_blocks(key.seed, key.step, self.blocks, self.share)


def lezo(zo: ZO, lm: LanguageModel, share: float = 0.25, rest: bool = True) -> ZO:
    """The same estimator in LeZO's blocks: share 1 gives its bits.

    Raises ValueError for a share outside (0, 1], and for a model with adapters, which are one tensor of all blocks.
    """
    return replace(zo, moves=ActiveBlocks(lm.layers, blocks_of(lm), share, rest))


def blocks_of(lm: LanguageModel) -> int:
    if lm.adapters is not None:
        raise ValueError(f"LeZO chooses among a model's blocks, and adapters are one tensor, of {lm.adapters.spec}")
    return lm.config.num_hidden_layers


def block_of(name: str, prefix: str) -> int | None:
    """The number of a tensor's block, None of what is in none."""
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def number_of(blocks: int, share: float) -> int:
    """Of a step's active blocks, or draws.  Raises ValueError for a share outside (0, 1], or no blocks."""
    if blocks < 1 or not 0 < share <= 1:
        raise ValueError(f"LeZO needs a share in (0, 1] of at least one block, got {share} of {blocks}")
    return max(1, round(share * blocks))


@lru_cache(maxsize=16)
def active_blocks(seed: int, step: int, blocks: int, share: float) -> frozenset[int]:
    """A_t: each set of that size is as likely.  64 bits order the blocks, so ties do not happen."""
    words = random_words(seed, step, blocks)
    return frozenset(sorted(range(blocks), key=words.__getitem__)[: number_of(blocks, share)])


def random_words(seed: int, step: int, n: int) -> list[int]:
    """n whole numbers of 64 random bits.  A stream of its own: the order of the data is drawn for tensor 0."""
    key = Key(seed, step, tensor=tensor_id("active blocks"))
    words = philox_blocks(key, Purpose.DATA_ORDER, torch.arange(n, device="cpu"), 8)[:, 0].tolist()
    return [(first & 0xFFFFFFFF) << 32 | second & 0xFFFFFFFF for first, second, *_ in words]


# ---------------------------------------------------------------- AdaLeZO


@dataclass(eq=False)
class Bandit:
    """ZO.moves of AdaLeZO, and what its steps are weighted by.  Its state is rewards, a function of what it observed.

    Raises ValueError for a share outside (0, 1] or no blocks.
    """

    prefix: str  # as ActiveBlocks
    blocks: int
    share: float = 0.25
    rest: bool = True
    temperature: float = 0.1  # tau
    uniform: float = 0.2  # gamma
    rate: float = 0.1  # alpha
    rewards: dict[int, float] = field(default_factory=dict, init=False)  # R of the blocks that were active once

    def __post_init__(self):
        self.draws = number_of(self.blocks, self.share)
        self.chances = (1 / self.blocks,) * self.blocks

    def __call__(self, name: str, key: Key) -> bool:
        return self.rest if block_of(name, self.prefix) is None else self.weight(name, key) > 0

    def weight(self, name: str, key: Key) -> float:
        """c_l / (k p_l) of a tensor's block, 1 of what is in none."""
        block = block_of(name, self.prefix)
        return 1.0 if block is None else self.counts(key)[block] / (self.draws * self.chances[block])

    def counts(self, key: Key) -> Counter[int]:
        """c_l of the blocks that are active at a step."""
        return drawn_blocks(key.seed, key.step, self.draws, self.chances)

    def observe(self, key: Key, projected_grads: Tensor, lr: float) -> None:
        """zo_optim.update calls this once after each step, of a run and of its replay: projected_grads [Q] float64,
        finite; lr does not matter.

        In Python's numbers, whose sums do not depend on a machine's vector width.  Libraries may differ in the last bit
        of math.exp, which moves one draw in some 10^15.
        """
        reward = fmean(map(abs, projected_grads.tolist()))
        for block in self.counts(key):
            before = self.rewards.get(block, reward)
            self.rewards[block] = (1 - self.rate) * before + self.rate * reward
        largest = max(self.rewards.values())
        scores = [self.rewards.get(block, largest) / largest if largest else 1.0 for block in range(self.blocks)]
        likely = [math.exp((score - 1) / self.temperature) for score in scores]
        chosen = (1 - self.uniform) / sum(likely)
        self.chances = tuple(chosen * x + self.uniform / self.blocks for x in likely)


@lru_cache(maxsize=16)
def drawn_blocks(seed: int, step: int, draws: int, chances: tuple[float, ...]) -> Counter[int]:
    """How often each block is drawn in so many draws with replacement."""
    ends = list(accumulate(chances))
    places = (bisect(ends, word / 2**64 * ends[-1]) for word in random_words(seed, step, draws))
    return Counter(min(place, len(chances) - 1) for place in places)  # word / 2^64 may be rounded to 1


class WeightedByBlock:
    """Put before an estimator whose moves is a Bandit: its steps are weighted, its probes are not."""

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        counts = torch.zeros(COUNTED, dtype=torch.int64, device=factors.device)
        for name, store in weights.items():
            counts += super().add_directions_({name: store}, factors * self.moves.weight(name, key), key)
        return counts


@dataclass(frozen=True)
class AdaLeZO(WeightedByBlock, ZO):
    """Dense directions."""


@dataclass(frozen=True)
class SparseAdaLeZO(WeightedByBlock, SparseZO):
    """Sparse ones."""


def adalezo(zo: ZO, lm: LanguageModel, share: float = 0.25, rest: bool = True) -> ZO:
    """The same estimator with AdaLeZO's blocks and weights; .moves is its Bandit, at its beginning.

    Raises ValueError as lezo does, and for other estimators than ZO and SparseZO.
    """
    kind = {ZO: AdaLeZO, SparseZO: SparseAdaLeZO}.get(type(zo))
    if kind is None:
        raise ValueError(f"AdaLeZO weights the steps of ZO and SparseZO, got {zo}")
    return as_kind(kind, zo, moves=Bandit(lm.layers, blocks_of(lm), share, rest))
