"""FedTT: federated tensor-train adapters.  `python -m family.fedtt` trains the embedded model in three ways.

Each round every client c takes K steps on its own examples from the server's cores, and the server averages them:

    G_j <- 1 / C * sum over c of G_j^c          W = G_1 G_2 ... G_d is a chain of cores (tensor_train.py)

cores     FedTT (Ghiasvand et al., ACL 2025, arXiv 2410.13097): every core and bias is trained by AdamW (there at 2e-4,
          with ranks of 5 to 8 and a bottleneck of 64) and averaged.  But a mean of products is no product of means: W
          is then not the mean of the clients' matrices.
one-core  W is that mean exactly, since a product is linear in each of its cores: a round trains one core of every
          chain, and the biases.  FedTT+ freezes cores too; its abstract does not say which, and the turn is ours.
zo        sends no core at all (DeComFL: Li et al., ICLR 2025).  All draw the same directions z_k from the seed, a
          client sends its projected gradients g_k^c, and everyone, the server too, redoes K steps with their means:
          w <- w - lr * sum over k of (1 / C * sum over c of g_k^c) z_k, the mean of the clients' weights.

A message is the very bytes to be sent.  All know the frozen model and the seed, by which the adapters begin.  Ours too,
where we have read an abstract alone: all clients are there in every round, weigh the same and keep AdamW's moments.

Shape key: C clients, n trained numbers, K local steps, Q queries.  Imports data.scoring, quant, random_bits,
tensor_train, zo_optim, and of runtime config, first_order, flags and problem.
"""

from __future__ import annotations

import argparse
import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from data.scoring import BatchLoss, Encoded
from quant import Float
from random_bits import Key, permutation
from runtime.config import parse, probes_per_forward, validate
from runtime.first_order import adamw_step, optimizer
from runtime.flags import Config
from runtime.problem import Problem, prepare
from tensor_train import TRAINED_VECTOR, Adapters
from zo_optim import ZO, update, zo_step

ROUNDS = {"cores": 10, "one-core": 10, "zo": 100}  # after which the embedded model has learned (seeds 0 to 2)
_order = lru_cache(maxsize=64)(permutation)

# ---------------------------------------------------------------- participants


@dataclass
class Client:
    number: int
    examples: list[Encoded]
    vector: Tensor  # [n] float32: its copy of the adapters; the frozen model is one for all
    adamw: dict[int, torch.optim.AdamW] = field(default_factory=dict)  # by core: momentum would move a frozen one

    def losses(self, problem: Problem, c: Config, steps: range) -> Iterator[BatchLoss]:
        """Of one batch a step (counted from 0), in an order of its own; client 0 has that of train.py."""
        n, seed = len(self.examples), c.seed ^ self.number << 40
        for step in steps:
            places = range(step * c.batch_size, (step + 1) * c.batch_size)
            batch = [self.examples[_order(seed, place // n, n)[place % n]] for place in places]
            yield problem.loss_fn(c.micro_batch_size)(batch)


def split(examples: list[Encoded], clients: int, alpha: float, seed: int) -> list[list[Encoded]]:
    """Each client's examples: it has a share of each label's, and the C shares are Dirichlet(alpha, ..., alpha).

    A large alpha makes clients alike, a small one gives each label to few.  The draws are numpy's, by its own generator
    of this seed.
    """
    generator, owner = np.random.default_rng(seed), np.empty(len(examples), dtype=np.int64)
    labels = np.array([e.label for e in examples])
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        ends = (generator.dirichlet([alpha] * clients).cumsum() * len(places)).round().astype(np.int64)
        for client, part in enumerate(np.split(places, ends[:-1])):
            owner[part] = client
    parts = [[examples[i] for i in np.flatnonzero(owner == client)] for client in range(clients)]
    if not all(parts):
        raise ValueError(f"--alpha {alpha} leaves one of {clients} clients without an example: use a larger one")
    return parts


def trained_in(adapters: Adapters, turn: int, n: int) -> Tensor:
    """[n] bool: one core of every chain, and all that is in no chain; turn -1: all.

    The last core comes first: it is 0 in an adapter that begins as the identity, and the others then have no gradient.
    """
    chain_of = {name: name.rpartition(".cores.")[0] for name in adapters.places}  # "": a bias or a norm
    cores, trained = Counter(chain_of.values()), torch.zeros(n, dtype=torch.bool)
    for name, (vector, start, shape) in adapters.places.items():
        chain = chain_of[name]
        in_turn = turn < 0 or not chain or int(name.rpartition(".")[2]) == (-1 - turn) % cores[chain]
        if vector == TRAINED_VECTOR and in_turn:
            trained[start : start + shape.numel()] = True
    return trained


# ---------------------------------------------------------------- messages


def cores_of(problem: Problem, c: Config, client: Client, steps: range, turn: int, trained: Tensor) -> bytes:
    """K steps of AdamW from the client's copy -> the numbers that they trained, float32."""
    lm, weights = problem.lm, {TRAINED_VECTOR: problem.lm.weights[TRAINED_VECTOR]}
    value = weights[TRAINED_VECTOR].value
    value.data.copy_(client.vector)
    if turn not in client.adamw:
        client.adamw[turn] = optimizer(weights, c.lr, c.weight_decay or 0.0)
    hook = value.register_hook(lambda grad: grad * trained)  # AdamW stays where there has never been a gradient
    for loss_fn in client.losses(problem, c, steps):
        adamw_step(client.adamw[turn], loss_fn.parts(lm.stored_view()), c.lr)
    hook.remove()
    return value.detach()[trained].cpu().numpy().tobytes()


def scalars_of(problem: Problem, c: Config, client: Client, steps: range, zo: ZO) -> bytes:
    """K zeroth-order steps from the client's copy -> the seed, 8 bytes, and K Q projected gradients, float64."""
    weights = {TRAINED_VECTOR: Float(client.vector.clone())}
    grads = [
        zo_step(weights, loss_fn, Key(c.seed, step), zo, c.lr).projected_grads
        for step, loss_fn in zip(steps, client.losses(problem, c, steps), strict=True)
    ]
    return struct.pack("<Q", c.seed) + torch.cat(grads).numpy().tobytes()


def redo(vector: Tensor, message: bytes, steps: range, zo: ZO, lr: float) -> None:
    """A round's steps by a message of scalars, in place: all that a participant needs."""
    grads = np.frombuffer(message, np.float64, offset=8).reshape(len(steps), -1)
    for step, of_step in zip(steps, torch.tensor(grads), strict=True):
        update({TRAINED_VECTOR: Float(vector)}, of_step, Key(*struct.unpack_from("<Q", message), step), zo, lr)


def mean(messages: list[bytes], kind: type, header: int = 0) -> bytes:
    """In float64, where C equal float32 add up exactly, so that what no client has moved stays as it is."""
    numbers = np.stack([np.frombuffer(message, kind, offset=header) for message in messages])
    return messages[0][:header] + numbers.astype(np.float64).mean(0).astype(kind).tobytes()


# ---------------------------------------------------------------- rounds


def federated_round(
    problem: Problem, c: Config, clients: list[Client], mode: str, number: int, local_steps: int
) -> tuple[int, int]:
    """Round `number` (from 0), after which all copies are equal -> bytes sent up, and bytes sent down."""
    lm, steps = problem.lm, range(number * local_steps, (number + 1) * local_steps)
    if mode == "zo":
        bits = int(c.direction_bits) if c.direction_bits.isdigit() else None
        zo = ZO(c.eps, c.queries, bits, dtype=lm.dtype, probes_per_forward=probes_per_forward(c))
        up = [scalars_of(problem, c, client, steps, zo) for client in clients]
        down = mean(up, np.float64, header=8)
        for client in clients:
            redo(client.vector, down, steps, zo, c.lr)
    else:
        order = len({name.rpartition(".")[2] for name in lm.adapters.places if ".cores." in name})
        turn = number % order if mode == "one-core" else -1
        trained = trained_in(lm.adapters, turn, len(clients[0].vector)).to(lm.device)
        up = [cores_of(problem, c, client, steps, turn, trained) for client in clients]
        down = mean(up, np.float32)
        for client in clients:
            client.vector[trained] = torch.tensor(np.frombuffer(down, np.float32)).to(lm.device)
    return sum(map(len, up)), len(down) * len(clients)


def federate(mode: str, rounds: int, clients: int, local_steps: int, alpha: float, flags: list[str]) -> tuple:
    """One federated run -> dev before, dev after, bytes sent up, bytes sent down.  flags: train.py's."""
    kind = "zo" if mode == "zo" else "adamw"
    c = parse(["--method", "loretta-adp", "--no-norms", "--batch-size", "8", *flags, "--optimizer", kind])
    validate(c)
    if c.lr is None:
        raise ValueError("--mode zo needs --lr beside this model: only train.py measures one")
    if "," in c.task:
        raise ValueError(f"clients learn one task, got --task {c.task}")
    if min(rounds, clients, local_steps) < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"no federation: {rounds} rounds, {clients} clients, {local_steps} local steps, alpha {alpha}")
    problem, _ = prepare(c)
    value = problem.lm.weights[TRAINED_VECTOR].value.detach()
    parts = split(problem.train, clients, alpha, c.seed)
    members = [Client(number, part, value.clone()) for number, part in enumerate(parts)]
    before = problem.quality(problem.dev)
    sent = [federated_round(problem, c, members, mode, number, local_steps) for number in range(rounds)]
    value.copy_(members[0].vector)
    return before, problem.quality(problem.dev), *map(sum, zip(*sent, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m family.fedtt", description="FedTT in one process.  Flags of train.py may follow, such as --model, "
        "--task, --tt-rank, --lr and --seed.", allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--mode", nargs="+", choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help=f"[{', '.join(f'{m} {n}' for m, n in ROUNDS.items())}]")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=5, help="K")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet split of labels")
    args, flags = parser.parse_known_args(argv)
    print(f"{'mode':10}{'rounds':>7}{'bytes up':>12}{'bytes down':>12}{'dev loss':>20}{'metric':>18}")
    for mode in args.mode:
        rounds = ROUNDS[mode] if args.rounds is None else args.rounds
        try:
            was, now, up, down = federate(mode, rounds, args.clients, args.local_steps, args.alpha, flags)
        except ValueError as error:
            parser.error(str(error))
        metrics = [math.nan if dev.metric is None else dev.metric for dev in (was, now)]  # of text to be written
        print(f"{mode:10}{rounds:7}{up:12,}{down:12,}{was.loss:10.4f} ->{now.loss:7.4f}{metrics[0]:9.3f} ->"
              f"{metrics[1]:6.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
