"""Tensor trains in one file: TT-SVD, LoRETTA's small adapters, and AdaZeta's averaged zeroth-order steps on them.

`python docs/walkthrough_tensor_train.py` prints its tables in seconds.  It imports nothing of the project, and
tests/test_walkthrough.py holds it to tensor_train.py and zo_optim.py.  Read walkthrough.py first.
Sources: Oseledets, 2011 (TT-SVD); LoRETTA, NAACL 2024, section 3; AdaZeta, EMNLP 2024.

Shape key: I inputs, O outputs, k factors, r ranks, N tokens, n trained numbers, P vectors of them, Q queries.
"""

import math

import torch

# ---- 1. A matrix W [I, O] is read as a tensor k_1 x ... x k_d with k_1 ... k_d = I O and kept as a chain of cores:
# W[i_1 ... i_d] = G_1[:, i_1, :] G_2[:, i_2, :] ... G_d[:, i_d, :],   G_j [r_{j-1}, k_j, r_j],   r_0 = r_d = 1


def chain(cores):
    """Neighbouring cores [r, k, s] multiplied together: [r_first, k ... k, s_last]."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.einsum("akr,rlb->aklb", whole, core).flatten(1, 2)  # the last factor's index runs fastest
    return whole


def tt_svd(matrix, factors, rank):
    """W [I, O] -> cores [r, k, s], by one SVD a bond.  The error is at most sqrt(d - 1) times the best train's."""
    rest, cores, r = matrix, [], 1
    for k in factors[:-1]:
        U, S, V = torch.linalg.svd(rest.reshape(r * k, -1), full_matrices=False)
        cores.append(U[:, :rank].reshape(r, k, -1))
        rest, r = S[:rank, None] * V[:rank], min(rank, len(S))  # left for the factors to come
    return [*cores, rest.reshape(r, factors[-1], 1)]


# ---- 2. An adapter is not decomposed: it starts as random cores, and they are trained.  For a given rank their numbers
# grow with the sum of the factors, where the matrix has their product.
def core_shapes(factors, rank):
    ranks = [1, *[rank] * (len(factors) - 1), 1]
    return list(zip(ranks, factors, ranks[1:], strict=False))


def cores_of(vector, shapes):
    """Views of one vector that holds all cores: it is what gets perturbed and stepped."""
    parts = vector.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


# ---- 3. Where the first factors multiply to I, W is left [I, r] times right [r, O] (AdaZeta's "fast forward").  It is
# never built then, and a token costs r (I + O) products instead of I O.
def forward(x, cores, split):
    """x [N, I] -> [N, O]; split: how many of the factors multiply to I."""
    left, right = chain(cores[:split])[0], chain(cores[split:])[..., 0]
    return x @ left @ right


# ---- 4. One query's estimate is mostly noise.  AdaZeta takes the mean of Q, and more of them as training goes on.
def adazeta_queries(epoch, alpha, beta, most):
    """Q = min(max(floor(alpha * epoch^beta), 1), most), epoch from 0; alpha and beta in (0, 1)."""
    return min(max(math.floor(alpha * epoch**beta), 1), most)


def averaged_estimate(vector, losses, directions, eps):
    """All queries probe the same weights: vector [n], directions [Q, n] ~ N(0, I); losses: vectors [P, n] -> [P].

    -> projected gradients [Q], and the gradient as estimated: the mean of projected_grad * u over the queries, [n].
    """
    plus, minus = losses(vector + eps * directions), losses(vector - eps * directions)
    projected_grads = (plus - minus) / (2 * eps)
    return projected_grads, (projected_grads[:, None] * directions).mean(0)  # a sum would be a rate of Q times lr


def gaussian(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy(eps=1e-3, lr=8e-3):
    """A train of 48 numbers learns to act as another one: -> (Q, loss) by step, and the noise of the estimate by Q."""
    shapes = core_shapes((4, 4, 4, 4), rank=2)
    n = sum(map(math.prod, shapes))
    x, (vector, target) = gaussian(64, 16, seed=0), 0.7 * gaussian(2, n, seed=2)

    def loss(vector):
        return (forward(x, cores_of(vector, shapes), 2) - forward(x, cores_of(target, shapes), 2)).square().mean()

    losses, history, noise = torch.vmap(loss), {}, {}
    true, directions = torch.func.grad(loss)(vector), gaussian(6400, n, seed=3)  # the gradient only to compare with
    single = averaged_estimate(vector, losses, directions, eps)[0][:, None] * directions  # [6400, n], a query each
    for Q in (1, 4, 16, 64):
        noise[Q] = ((single.view(-1, Q, n).mean(1) - true).square().sum(1).mean() / true.square().sum()).item()
    for step in range(401):
        Q = adazeta_queries(step // 5, 0.85, 0.45, 20)  # an epoch is 5 steps
        if step % 100 == 0:
            history[step] = Q, loss(vector).item()
        vector = vector - lr * averaged_estimate(vector, losses, gaussian(Q, n, seed=100 + step), eps)[1]
    return history, noise


def main():
    print("1. TT-SVD of 64 x 64 matrices, factors 4 4 4 4 4 4: relative error by rank")
    i = torch.arange(64, dtype=torch.float64)
    for name, W in {"1 / (1 + i + j)": 1 / (1 + i[:, None] + i), "Gaussian noise": gaussian(64, 64, seed=0)}.items():
        trains = {rank: chain(tt_svd(W, (4,) * 6, rank)).view(64, 64) for rank in (1, 2, 4, 8, 16, 64)}
        print(f"   {name:15}", *(f"  r={rank}: {(W_tt - W).norm() / W.norm():.0e}" for rank, W_tt in trains.items()))
    (I, O), r, shapes = (4096, 64), 5, core_shapes((16, 16, 16, 4, 4, 4), 5)  # noqa: E741
    cores, x = [gaussian(*shape, seed=j) for j, shape in enumerate(shapes)], gaussian(10, I, seed=9)
    y, dense = forward(x, cores, 3), x @ chain(cores).view(I, O)
    print(f"2. LLaMA-2-7B's adapter, {I} x {O}: {sum(map(math.prod, shapes)):,} numbers in a train of rank {r}, "
          f"{r * (I + O):,} in LoRA of that rank, {I * O:,} in the matrix\n3. Its forward: {r * (I + O):,} products a "
          f"token instead of {I * O:,}, relative difference {(y - dense).norm() / dense.norm():.0e}")  # fmt: skip
    history, noise = toy()
    print("4. AdaZeta's queries:", *(f"  epoch {e}: {adazeta_queries(e, 0.85, 0.45, 20)}" for e in (0, 10, 40, 159)))
    print("   squared error of an estimate over the squared gradient, 48 numbers (theory: 49 / Q):",
          *(f"  Q={Q}: {error:.2f}" for Q, error in noise.items()))  # fmt: skip
    print("   loss:", *(f"  step {step} (Q={Q}): {loss:.2f}" for step, (Q, loss) in history.items()))
    print(f"The loss went from {history[0][1]:.2f} to {history[400][1]:.2f} by forward passes alone.")


if __name__ == "__main__":
    main()
