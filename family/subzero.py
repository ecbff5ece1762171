"""SubZero: MeZO in random subspaces (Yu et al., "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", ICCV 2025).

For F steps each matrix W [m, n] moves in one subspace, which two short bases with orthonormal columns span:

    U = qr(randn(m, r)),    V = qr(randn(n, r))           new every F steps
    D = sqrt(m n) / r * U Z V^T,    Z ~ N(0, 1) [r, r]    new every step and query; of a vector D ~ N(0, I)
    g = (L(w + eps D) - L(w - eps D)) / (2 eps),    w <- w - lr g D

r: rank, F: every (8 to 48 and 1,000 to 2,000 in the paper).  sqrt(m n) / r aligns norms: E|D|^2 = m n is MeZO's, so
that MeZO's eps and lr carry over.  The mean estimate is the gradient G projected and made longer, E[(D . G) D] =
m n / r^2 U U^T G V V^T; over the subspaces, where E[U U^T] = r / m I and E[V V^T] = r / n I, it is G itself.

That much is the paper's and its released code's (github.com/zimingyy/SubZero).  Ours:
- Gaussians are this project's keyed ones (zo_optim.normal_table).  All queries of a step share U and V.
- Where min(m, n) <= r, D ~ N(0, I).  A smaller rank would hold a table of two rows to 4 numbers for F steps, and a
  square matrix of m = n = r has this D anyway, since U Z V^T is then distributed as Z.
- A tensor of more axes is the matrix that its store has; the released code draws N(0, I) for it.
- Adapters are one vector here (tensor_train.TRAINED_VECTOR), so their D is N(0, I), MeZO's.  The paper reshapes each
  LoRA factor to its most nearly square form first; a vector of all factors has no such form.
- On codes the step is rounded stochastically as any other (quant.Store.add_rounded_).
- `enable_low_rank_reads`, the fast twin: the released code adds eps D to the weights.

What a replay has the bits of: given U and V, every direction, on any device, in any chunks and by any number of
threads, because products are taken between numbers on grids so coarse that float64 sums are exact.  U and V are rounded
from a QR in float64 on the CPU, whose last bits LAPACK does not promise (one thread and two give others): the grid's
points are 10^7 to 10^8 times as far apart, so that another LAPACK moves next to no element, but it may move one.

Shape key: P perturbed copies, N tokens, R rows (m), C columns (n), r rank.  Imports model, quant, random_bits and
zo_optim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import LanguageModel, Linear, View
from quant import COUNTED, Store
from random_bits import Key, Purpose, tensor_id
from zo_optim import PRODUCT_TWINS, ZO, PerturbedWeights

# ---------------------------------------------------------------- the definition

OF_U, OF_V = 2**28 - 1, 2**28 - 2  # in place of a query, of which a key has 28 bits and no step so many: no new purpose
BASIS_GRID, PRODUCT_GRID = 2.0**22, 2.0**20  # points to one, of U and V, and of U Z
MAX_RANK = 256  # |row of U Z V^T| <= |row of U| |Z| |row of V| <= 4 r: up to 2^(10 + 22 + 20) grid units, below 2^53


@dataclass(frozen=True)
class SubZero(ZO):
    """Directions sqrt(R C) / r * U Z V^T of matrices [R, C] with R, C > rank, and N(0, I) of all else (see above).

    The bases of the present window of `every` steps are kept, rank * (R + C) float32 numbers a matrix.
    Raises ValueError for bits (there is no quantised form), for a rank outside 1 to MAX_RANK, and for every < 1.
    """

    rank: int = 24  # r: the released code's README
    every: int = 1000  # F: steps that U and V stay for
    bases: dict = field(default_factory=dict, repr=False, compare=False)  # (seed, window), U, V; of copies too
    graphable = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits is not None or not 1 <= self.rank <= MAX_RANK or self.every < 1:
            raise ValueError(
                f"SubZero needs bits None, rank 1 to {MAX_RANK} and every 1 or more, got bits {self.bits}, "
                f"rank {self.rank} and every {self.every}: leave bits out, and give such a rank and number of steps"
            )

    def direction(self, key: Key, shape: tuple[int, int], rows: Tensor, rounding: Purpose) -> Tensor:
        """Chosen rows of D: shape (R, C), rows [n] int64 -> [n, C] float32 on their device.

        `rounding` names nothing here: the direction that is probed is the one that is stepped along.
        """
        if not self.is_low_rank(shape):
            return super().direction(key, shape, rows, rounding)
        left, right = self.factors(key, shape, rows)
        product = left @ right.T
        return torch.mul(product, self.scale(shape), out=torch.empty_like(product, dtype=torch.float32))  # in one pass

    def add_directions_(self, weights: dict[str, Store], factors: Tensor, key: Key) -> Tensor:
        twin = PRODUCT_TWINS.get(factors.device.type)
        counts = torch.zeros(COUNTED, dtype=torch.int64, device=factors.device)
        for name, store in weights.items():
            shape, counted = store.matrix_shape, None
            if twin is not None and not self.nearest and self.is_low_rank(shape):
                keys = [key._replace(tensor=tensor_id(name), query=query) for query in range(len(factors))]
                rows = torch.arange(shape[0], device=store.device)
                left = torch.stack([self.factors(key_of_query, shape, rows)[0] for key_of_query in keys])
                right = self.subspace(keys[0], shape, store.device)[1]
                counted = twin(store, left, right, self.scale(shape), factors, keys[0])
            counts += super().add_directions_({name: store}, factors, key) if counted is None else counted
        return counts

    def is_low_rank(self, shape: tuple[int, int]) -> bool:
        return min(shape) > self.rank

    def scale(self, shape: tuple[int, int]) -> float:
        """sqrt(R C) / r."""
        return math.sqrt(shape[0] * shape[1]) / self.rank

    def factors(self, key: Key, shape: tuple[int, int], rows: Tensor) -> tuple[Tensor, Tensor]:
        """U[rows] Z [n, r] and V [C, r], float64: D[rows] is scale * left right^T.  rows [n] int64."""
        U, V = self.subspace(key, shape, rows.device)
        left = U[rows].double() @ self.gaussian(key, self.rank, rows.device)
        return on_grid(left, PRODUCT_GRID), V.double()

    def subspace(self, key: Key, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """U [R, r] and V [C, r] float32, functions of (key.seed, key.step // every, key.tensor).

        Those of the present window are kept, and the next one's take their memory, where recorded launches look for
        them.  With key.step in memory they are those that `fill_buffers` left.
        """
        at = key.tensor, shape, device, self.rank, self.every
        kept, *bases = self.bases.get(at, (None,))
        if isinstance(key.step, Tensor):
            return tuple(bases)
        window = key._replace(step=key.step // self.every, query=0)
        if kept != window[:2]:
            new = [self.basis(window._replace(query=side), n).to(device)
                   for side, n in zip((OF_U, OF_V), shape, strict=True)]  # fmt: skip
            bases = [old.copy_(basis) for old, basis in zip(bases, new, strict=True)] if bases else new
            self.bases[at] = window[:2], *bases
        return tuple(bases)

    def fill_buffers(self, weights: dict[str, Store], key: Key) -> None:
        """Make what recorded launches of this step read: bases come from the CPU."""
        for name, store in weights.items():
            if self.is_low_rank(store.matrix_shape):
                self.subspace(key._replace(tensor=tensor_id(name)), store.matrix_shape, store.device)

    def basis(self, key: Key, n: int) -> Tensor:
        """The orthonormal factor of randn(n, r), [n, r] float32 on the CPU, rounded to multiples of 1 / BASIS_GRID.

        Its triangular partner's diagonal is made positive, which leaves one factor: LAPACK's signs are its own.
        """
        Q, triangle = torch.linalg.qr(self.gaussian(key, n, torch.device("cpu")))
        return on_grid(Q * triangle.diagonal().sign(), BASIS_GRID).float()

    def gaussian(self, key: Key, n: int, device: torch.device) -> Tensor:
        """A key's standard normal numbers, [n, r] float64."""
        rows = torch.arange(n, device=device)
        return super().direction(key, (n, self.rank), rows, Purpose.DIRECTION).double()


def on_grid(x: Tensor, points: float) -> Tensor:
    """The nearest multiples of 1 / points, a power of two; ties to even."""
    return (x * points).round_().div_(points)


# ---------------------------------------------------------------- the fast twin: a probe as a low-rank read
# x (W + eps s D)^T = x W^T + (x V) (eps s scale U Z)^T: W is shared by all copies, so that its product is one large
# one, and no perturbed matrix is made.  Beside the definition it saves a rounding and differs by the order of sums.


class LowRankLinear(Linear):
    """A Linear with two more parameters: y = x W^T + (x right) left^T + b.

    x [P or 1, ..., C], weight [1, O, C], left [P, O, r], right [1, C, r], bias [P, O] -> [P, ..., O].  With r = 0 the
    weight may be [P, O, C], and it is a Linear.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.left = nn.Parameter(torch.empty(outputs, 0))
        self.right = nn.Parameter(torch.empty(inputs, 0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.right.shape[-1]:
            return super().forward(x)
        flat = x.flatten(1, -2)  # [P or 1, N, C]
        flat = flat if self.round_input is None else self.round_input(flat)
        low = (flat @ self.right[0]).expand(len(self.left), -1, -1)  # [P, N, r]
        y = torch.baddbmm(F.linear(flat, self.weight[0]), low, self.left.mT)
        y = y if self.bias is None else y + self.bias.to(y.dtype)[:, None]
        return y.view(len(y), *x.shape[1:-1], -1)


class LowRankView:
    """A view that gives LowRankLinear the stored weight and SubZero's factors, in the compute dtype.

    Where the view has no probe of SubZero's it gives what the view does, and factors of no rank: of the stored weights,
    other estimators, tensors that a step leaves alone, and probes of codes, which are no products.
    """

    def __init__(self, view: View, lm: LanguageModel):
        self.view, self.lm, self.probes = view, lm, view.probes

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        layer, _, part = name.rpartition(".")
        weight, view = f"{layer}.weight", self.view
        if part == "weight" and not as_codes and self.is_factored(weight):
            return self.lm.stored_view_class(view.weights, view.zo.dtype).read(weight, rows)
        if part not in ("left", "right"):
            return view.read(name, rows, as_codes)
        if not self.is_factored(weight):
            return torch.empty(1, 0, 0, device=self.lm.device)
        return (self.left if part == "left" else self.right)(view.weights[weight].matrix_shape, tensor_id(weight))

    def is_factored(self, name: str) -> bool:
        view = self.view
        if not isinstance(view, PerturbedWeights) or not isinstance(view.zo, SubZero) or view.zo.probe != "float":
            return False
        is_moved = view.zo.moves is None or view.zo.moves(name, view.key)
        in_block = name.startswith(self.lm.layers)  # of a block's tensors the matrices are its linear layers'
        return in_block and is_moved and view.zo.is_low_rank(view.weights[name].matrix_shape)

    def left(self, shape: tuple[int, int], tensor: int) -> Tensor:
        """sign * eps * scale * U Z of each copy: [P, O, r]."""
        zo, rows = self.view.zo, torch.arange(shape[0], device=self.lm.device)
        of_query = {
            query: zo.factors(self.view.key._replace(query=query, tensor=tensor), shape, rows)[0]
            for query in dict.fromkeys(query for query, _ in self.view.copies)
        }
        length = zo.eps * zo.scale(shape)
        return torch.stack([of_query[query] * (sign * length) for query, sign in self.view.copies]).to(zo.dtype)

    def right(self, shape: tuple[int, int], tensor: int) -> Tensor:
        """V, which all copies share: [1, C, r]."""
        key = self.view.key._replace(tensor=tensor)
        return self.view.zo.subspace(key, shape, self.lm.device)[1][None].to(self.view.zo.dtype)


def enable_low_rank_reads(lm: LanguageModel) -> None:
    """Let the blocks' linear layers read SubZero's probes as factors; embedding and output matrix stay as defined.

    It comes before compile_blocks.  Raises ValueError where a linear layer of the block is another one already
    (products of codes, or this one), and where the model has adapters: their direction has no factors.
    """
    if lm.adapters is not None:
        raise ValueError(f"low-rank reads are of a model's own matrices, and only {lm.adapters.spec} are trained")
    layers = [(path, layer) for path, layer in lm.block.named_modules() if isinstance(layer, Linear)]
    other = {path: type(layer).__name__ for path, layer in layers if type(layer) is not Linear}
    if other:
        raise ValueError(f"low-rank reads replace plain linear layers, and the block has {other}: enable them alone")
    for path, layer in layers:
        outputs, inputs = layer.weight.shape
        with torch.device("meta"):
            replacement = LowRankLinear(inputs, outputs, layer.bias is not None)
        replacement.round_input = layer.round_input
        lm.block.set_submodule(path, replacement)
    inner = lm.wrap_view
    lm.wrap_view = lambda view: LowRankView(inner(view), lm)
