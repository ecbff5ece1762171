"""family/fedtt.py: one client is plain training, bit for bit; which averages are exact; and what is sent.

The embedded model, batches of 4.  A round's messages are watched on their way to the server.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import shortened
from torch import Tensor

import train
from data.scoring import Encoded
from family import fedtt
from family.fedtt import Client, federate, federated_round, main, mean, redo, split, trained_in
from quant import Float
from runtime.checkpoints import weights_sha256
from runtime.config import Config, parse
from runtime.first_order import adamw_step, optimizer
from runtime.problem import Problem, prepare
from tensor_train import TRAINED_VECTOR, Adapters, Place, to_dense
from zo_optim import zo_step

K = 2  # local steps


def given(mode: str, *flags: str) -> tuple[Config, Problem]:
    kind = "zo" if mode == "zo" else "adamw"
    c = parse(["--method", "loretta-adp", "--no-norms", "--optimizer", kind, "--batch-size", "4", *flags])
    with shortened():
        return c, prepare(c)[0]


def members(problem: Problem, count: int, seed: int = 0) -> list[Client]:
    vector = problem.lm.weights[TRAINED_VECTOR].value.detach()
    return [Client(i, part, vector.clone()) for i, part in enumerate(split(problem.train, count, 1.0, seed))]


def sha256(vector: Tensor) -> str:
    return weights_sha256({TRAINED_VECTOR: Float(vector.detach())})


@pytest.fixture
def sent(monkeypatch) -> list[list[bytes]]:
    """Each round's messages to the server."""
    rounds = []
    monkeypatch.setattr(fedtt, "mean", lambda messages, *kind, **header: (
        rounds.append(messages) or mean(messages, *kind, **header)
    ))  # fmt: skip
    return rounds


# ---------------------------------------------------------------- one client


@pytest.mark.parametrize("mode", ["cores", "zo"])
def test_one_client_is_plain_training_bit_for_bit(mode):
    """Three rounds of two steps are six of train.py's; in zo with two queries."""
    c, problem = given(mode, "--seed", "5", *(["--queries", "2"] if mode == "zo" else []))
    clients = members(problem, 1)
    for number in range(3):
        federated_round(problem, c, clients, mode, number, K)
    _, plain = given(mode, "--seed", "5")
    weights = {TRAINED_VECTOR: plain.lm.weights[TRAINED_VECTOR]}
    before, adamw = sha256(weights[TRAINED_VECTOR].value), optimizer(weights, c.lr, 0.0) if mode == "cores" else None
    for step in range(3 * K):
        examples = [plain.train[i] for i in train.batch_indices(c.seed, step, c.batch_size, len(plain.train))]
        loss_fn = plain.loss_fn(c.micro_batch_size)(examples)
        if adamw is not None:
            adamw_step(adamw, loss_fn.parts(plain.lm.stored_view()), c.lr)
        else:
            zo_step(weights, loss_fn, train.Key(c.seed, step), train.estimator(c, plain.lm), c.lr)
    assert sha256(clients[0].vector) == sha256(weights[TRAINED_VECTOR].value) != before


# ---------------------------------------------------------------- cores


def matrices(adapters: Adapters, vector: Tensor) -> dict[str, Tensor]:
    """The dense matrix of every chain, flat, float64."""
    chains: dict[str, list[Tensor]] = {}
    for name, (of, start, shape) in adapters.places.items():
        if ".cores." in name and of == TRAINED_VECTOR:
            core = vector[start : start + shape.numel()].view(1, *shape).double()
            chains.setdefault(name.rpartition(".cores.")[0], []).append(core)
    return {chain: to_dense(cores, 1).flatten() for chain, cores in chains.items()}


@pytest.mark.parametrize("mode", ["one-core", "cores"])
def test_the_mean_of_one_core_is_the_mean_of_the_matrices(mode, sent):
    """The averaged core is off by 2^-24 of itself, its rounding to float32, and the matrix by as much of its product
    with the others' sizes (float64's own rounding is 2^-50 of that).  Of all cores at once the mean is another: off by
    more than 100 such bounds.  Four rounds that leave no core 0, then one of each core."""
    c, problem = given(mode)
    clients, adapters = members(problem, 3), problem.lm.adapters
    for number in range(8):
        start = clients[0].vector.clone()
        federated_round(problem, c, clients, mode, number, K if number >= 4 else 1)
        if number < 4:
            continue
        trained = trained_in(adapters, number % 4 if mode == "one-core" else -1, len(start))
        ends = []
        for message in sent[number]:
            ends.append(start.clone())
            ends[-1][trained] = torch.tensor(np.frombuffer(message, np.float32))
        assert len({sha256(end) for end in ends}) == 3
        of_clients = [matrices(adapters, end) for end in ends]
        averaged, sizes = matrices(adapters, clients[0].vector), matrices(adapters, clients[0].vector.abs())
        assert len(averaged) == 18
        worst = 0.0
        for chain, matrix in averaged.items():
            gap = (matrix - torch.stack([of_client[chain] for of_client in of_clients]).mean(0)).abs()
            worst = max(worst, (gap / (2.0**-24 * sizes[chain] + 1e-40)).max().item())
        assert worst <= 1 + 2**-20 if mode == "one-core" else worst > 100, (number, worst)


def test_a_round_moves_one_core_and_the_biases(sent):
    """Two turns, so that a momentum would move a frozen core if there were one for all.  With three clients, whose
    mean of equal numbers is that number; and what is sent is what was trained, float32."""
    c, problem = given("one-core")
    clients, places = members(problem, 3), problem.lm.adapters.places
    for number in range(8):
        before = clients[0].vector.clone()
        up, down = federated_round(problem, c, clients, "one-core", number, 1)
        numbers = 0
        for name, (_, start, shape) in places.items():
            at, of_client = slice(start, start + shape.numel()), clients[2].vector
            in_turn = ".cores." not in name or name.endswith(f".cores.{3 - number % 4}")
            moved = in_turn and (number > 0 or ".up." in name)  # up begins at 0, so that down has no gradient yet
            assert torch.equal(before[at], of_client[at]) != moved, (number, name)
            numbers += shape.numel() * in_turn
        assert up == down == sum(map(len, sent[number])) == 3 * 4 * numbers
        frozen = ~trained_in(problem.lm.adapters, number % 4, len(before))
        last = problem.lm.weights[TRAINED_VECTOR].value  # where the last client came to by itself
        assert torch.equal(last[frozen], before[frozen]) and int(frozen.sum()) * 4 * 3 == 3 * 4 * 13968 - up
        assert len({sha256(client.vector) for client in clients}) == 1


def test_all_cores_are_sent_as_float32(sent):
    c, problem = given("cores")
    assert federated_round(problem, c, members(problem, 2), "cores", 0, 1) == (2 * 4 * 13968,) * 2
    assert [len(message) for message in sent[0]] == [4 * 13968] * 2


def test_chains_of_different_lengths_take_turns_each():
    """Three cores and four, a bias, and a vector that is frozen."""
    names = [*(f"a.cores.{i}" for i in range(3)), *(f"b.cores.{i}" for i in range(4)), "b.bias"]
    places = {name: Place(TRAINED_VECTOR, i, torch.Size([1])) for i, name in enumerate(names)}
    places["first_a.cores.0"] = Place("adapters.first", 0, torch.Size([1]))
    adapters = Adapters(None, places)
    for turn in range(12):
        trained = trained_in(adapters, turn, 8)
        found = [name for name, is_trained in zip(names, trained, strict=True) if is_trained]
        assert found == [f"a.cores.{2 - turn % 3}", f"b.cores.{3 - turn % 4}", "b.bias"]
    assert trained_in(adapters, -1, 8).all()


# ---------------------------------------------------------------- scalars


def test_scalars_are_all_that_zo_sends(sent):
    """Three clients, two rounds of two steps of three queries: 8 bytes of seed and 6 float64.  All ends, and a server
    that has seen nothing but the messages, hold the same bits: the mean of what the clients came to by themselves.
    Each number has K roundings of |w| and four of a step's length at most, 2^-24 of them each, on either side."""
    c, problem = given("zo", "--queries", "3", "--seed", str(2**64 - 3))
    clients = members(problem, 3)
    zo = train.estimator(c, problem.lm)
    for number in range(2):
        start, steps = clients[0].vector.clone(), range(number * K, (number + 1) * K)
        assert federated_round(problem, c, clients, "zo", number, K) == (3 * 56, 3 * 56)
        assert [len(message) for message in sent[number]] == [8 + 8 * K * 3] * 3
        assert len(set(sent[number])) == 3 and len({message[:8] for message in sent[number]}) == 1
        assert int.from_bytes(sent[number][0][:8], "little") == c.seed
        assert len({sha256(client.vector) for client in clients}) == 1 and not torch.equal(clients[0].vector, start)
        server, ends = start.clone(), [start.clone() for _ in clients]
        redo(server, mean(sent[number], np.float64, header=8), steps, zo, c.lr)
        assert sha256(server) == sha256(clients[0].vector)
        for end, message in zip(ends, sent[number], strict=True):
            redo(end, message, steps, zo, c.lr)
        grads = torch.tensor(np.stack([np.frombuffer(message, offset=8) for message in sent[number]]))
        step = c.lr * grads.abs().max().item() * 4  # a direction is within 4 sigma
        bound = 2 * K * 2.0**-24 * (start.abs() + (K + 4) * step)
        of_ends = torch.stack(ends).double().mean(0)
        assert ((of_ends - clients[0].vector).abs() <= bound).all()
        assert (ends[0] - ends[1]).abs().max() > 100 * bound.max()


# ---------------------------------------------------------------- who has which examples


def labelled(per_label: int) -> list[Encoded]:
    return [Encoded([[i]], [[5], [6]], 0, i % 2) for i in range(2 * per_label)]


def test_every_example_has_one_owner_and_no_generator_is_shared():
    examples, before = labelled(200), (torch.get_rng_state(), np.random.get_state()[1].copy())
    parts = split(examples, 4, 1.0, seed=3)
    tokens = [[e.sequences[0][0] for e in part] for part in parts]
    assert sorted(sum(tokens, [])) == list(range(400)) and all(of_client == sorted(of_client) for of_client in tokens)
    assert split(examples, 4, 1.0, seed=3) == parts != split(examples, 4, 1.0, seed=4)
    assert split(examples, 1, 0.01, seed=3) == [examples]
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    with pytest.raises(ValueError, match="--alpha 0.001 leaves one of 8 clients without an example"):
        split(examples, 8, 0.001, seed=0)


@pytest.mark.parametrize("alpha", [0.5, 1e6])
def test_shares_are_dirichlets(alpha):
    """The sum of a label's squared shares has mean (alpha + 1) / (C alpha + 1): 1/2 and 1/4.  It is in [1/C, 1], so its
    deviation is at most 3/8; a share is rounded to a 200th.  Alpha 1 and 1/4 would give 0.4 and 0.625."""
    examples, squares, C = labelled(200), [], 4
    for seed in range(500):
        try:
            parts = split(examples, C, alpha, seed)
        except ValueError:  # a client without an example has none of either label
            continue
        shares = torch.tensor([[sum(e.label == label for e in part) / 200 for part in parts] for label in (0, 1)])
        assert ((shares.sum(1) - 1).abs() < 1e-6).all()
        squares += shares.square().sum(1).tolist()
    bound = 5 * 0.375 / len(squares) ** 0.5 + 2 * C / 400
    assert len(squares) > 900 and abs(sum(squares) / len(squares) - (alpha + 1) / (C * alpha + 1)) < bound


def test_each_client_has_an_order_of_its_own():
    """The first one's is train.py's.  Two passes over 10 examples in batches of 4."""
    c, problem = given("cores")
    examples, vector = problem.train[:10], torch.zeros(1)
    seen = []
    problem.loss_fn = lambda size: lambda batch: [e.sequences[0] for e in batch]
    for number in range(3):
        batches = [*Client(number, examples, vector).losses(problem, c, range(5))]
        assert sorted(sum(batches, [])) == sorted(2 * [e.sequences[0] for e in examples])
        seen.append(batches)
    places = [train.batch_indices(c.seed, step, 4, 10) for step in range(5)]
    assert seen[0] == [[examples[i].sequences[0] for i in of_step] for of_step in places]
    assert seen[0] != seen[1] != seen[2] != seen[0]


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("mode, rounds", [("cores", 3), pytest.param("one-core", 5, marks=pytest.mark.full)])
def test_it_learns(mode, rounds):
    """Dev loss falls below half of ln 2, and all is right but for a few."""
    with shortened():
        before, after, up, down = federate(mode, rounds, 3, 5, 0.5, [])
    assert before.loss > 1.5 and after.loss < 0.35 and after.metric > 0.9
    assert up == down > 0


@pytest.mark.full
def test_scalars_learn():
    with shortened():
        before, after, up, _ = federate("zo", 50, 4, 5, 1.0, ["--lr", "2e-2"])
    assert before.loss > 1.5 and after.loss < 0.35 and after.metric > 0.9 and up == 50 * 4 * 48


def test_the_table(capsys):
    with shortened():
        main("--rounds 1 --clients 2 --local-steps 1 --tt-rank 2".split())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["mode", "cores", "one-core", "zo"]
    sizes = [[int(word.replace(",", "")) for word in line.split()[1:4]] for line in lines[1:]]
    assert all(rounds == 1 and up == down for rounds, up, down in sizes)
    assert sizes[0][1] > sizes[1][1] > 100 * sizes[2][1] and sizes[2][1] == 2 * 16


@pytest.mark.parametrize("flags, message", [
    ("--clients 0", "no federation: 10 rounds, 0 clients"), ("--alpha 0", "alpha 0.0"), ("--rounds 0", "0 rounds"),
    ("--tt-rank 0", "--tt-rank must be in"), ("--nonsense", "unrecognized arguments: --nonsense"),
])  # fmt: skip
def test_bad_input_ends_with_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(flags.split())
    assert error.value.code == 2 and message in capsys.readouterr().err
