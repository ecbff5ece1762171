"""The GPU draws the same integers as the CPU, and lands them the same way.  Skipped without CUDA.

Paths, which come to the same bits: the definition on a CPU ("cpu"); the same on a GPU, with bits drawn by numpy
("numpy") or by their Triton twin ("twin"); and one kernel a tensor ("fused").
"""

import json
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import bottleneck_weights, direction, tiny_llama, tiny_roberta
from oracles import gaussian, same_bits
from torch import Tensor
from torch.func import functional_call

import gpu
import random_bits
import train
import zo_optim
from data.scoring import BatchLoss, Encoded
from family.elasticzo import tail_of
from family.mazo import MaZO
from family.subzero import SubZero
from family.zo2 import Deferred, Lane, offload
from gpu import graphs
from gpu.code_products import enable_code_products, multiply_e4m3, multiply_int8
from model import LanguageModel, create, load
from quant import COUNTED, Store, StoredWeights, encode, from_tensors, quantise_tokens, token_codes
from random_bits import Key, Purpose, bits16, bits32, philox_blocks, tensor_id
from runtime.checkpoints import BUFFERS, save_stored, staged, weights_sha256
from runtime.first_order import make_trainable
from tensor_train import Bottleneck, Spec, TensorTrain, to_dense
from zo_optim import ZO, PerturbedWeights, SparseZO, adazeta_queries, epoch_of, probe_losses, update, zo_step

if torch.cuda.is_available():
    from gpu import kernels, sparse
    from gpu.adapters import FusedBottleneck

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KEY = Key(seed=2**63 + 12345, step=2**31 + 7, query=3, tensor=tensor_id("model.norm.weight") | 2**31)
PATHS = ("cpu", "numpy", "twin", "fused")
FORMATS = [("fp32", 0), ("bf16", 0), *((f"int{bits}", residual) for bits in (8, 4) for residual in (0, 4, 8)),
           ("fp8", 0)]  # fmt: skip
WAYS = {
    "full": ZO(eps=0.02, queries=2),
    "4 bits, one rounding": ZO(eps=0.02, queries=3, bits=4, estimator="q-rge1"),
    "8 bits, codes": ZO(eps=0.01, queries=2, bits=8, probe="codes"),
    "2 bits, one rounding, codes": ZO(eps=5e-3, bits=2, probe="codes", estimator="q-rge1"),
    "sparse": SparseZO(eps=2e-3, queries=2, cell=64),
    "sparse, small cells": SparseZO(eps=1e-3, queries=3, cell=8),
}
# 264: two int4 groups and a short one; a width that is no multiple of 8 has no kernel but in sparse directions, while a
# vector of such a length has
SHAPES = [(65, 136), (3, 1000), (300,), (1003,), (1, 8), (7, 3, 2, 4), (5, 264), (9, 13), (2, 4096), (3, 2048),
          (2, 8192)]  # fmt: skip
every_format = pytest.mark.parametrize("weights, residual", FORMATS)
every_way = pytest.mark.parametrize("zo", WAYS.values(), ids=WAYS)


@pytest.fixture(autouse=True)
def no_twin():
    """Bits are drawn by numpy where a test does not ask for the twin; gpu.install would leave it there."""
    clear_twins()
    yield
    clear_twins()


def clear_twins() -> None:
    random_bits.DEVICE_TWINS.clear()
    zo_optim.LANDING_TWINS.clear()


@contextmanager
def on(path: str, zo: ZO):
    """-> the estimator of a path; bits are drawn as it does meanwhile."""
    if path in ("twin", "fused"):
        random_bits.DEVICE_TWINS["cuda"] = kernels.philox_blocks
        zo_optim.LANDING_TWINS["cuda"] = kernels.land_
    try:
        yield gpu.estimator(zo, "cuda") if path == "fused" else zo
    finally:
        clear_twins()


def matrix(shape: tuple[int, ...] = (65, 136)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    x.view(-1)[:3] = torch.tensor([0.0, 1e-9, -1e-9])[: x.numel()]
    return x


def stored(path: str, x: Tensor, weights: str, residual: int = 0) -> dict[str, Store]:
    return {"w": encode(x if path == "cpu" else x.cuda(), weights, residual)}


def pair(store: dict[str, Store], zo: ZO) -> PerturbedWeights:
    return PerturbedWeights(store, Key(5, 6), zo, [(7, 1), (7, -1)], 2)


def same(a: Store, b: Store) -> bool:
    """Every stored bit; -0 is not 0."""
    return all(same_bits(x.cpu(), y.cpu()) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


def all_equal(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], tensor) for tensor in tensors[1:])


def grads(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# ---------------------------------------------------------------- draws


def test_words_are_the_same_integers():
    """A step's number may be in memory, where graphs have it."""
    rows = torch.tensor([0, 1, 2, 511, 512, 2**31 - 1, 2**31, 2**32 - 1] + list(range(5000, 6001)))
    in_memory = KEY._replace(step=torch.tensor([KEY.step - 2**32], dtype=torch.int32).cuda())
    for purpose in Purpose:
        wanted = philox_blocks(KEY, purpose, rows, 8)
        for key in (KEY, in_memory):
            assert torch.equal(kernels.philox_blocks(key, purpose, rows.cuda(), 8).cpu(), wanted)
        assert torch.equal(philox_blocks(KEY, purpose, rows.cuda(), 8).cpu(), wanted)


@pytest.mark.parametrize("columns", [1, 7, 8, 384, 1001])
def test_draws_are_the_same_integers(columns):
    rows, drawn = torch.tensor([5, 0, 300]), []
    for path in ("cpu", "numpy", "twin"):
        store, rows = stored(path, matrix((301, columns)), "int8")["w"], rows if path == "cpu" else rows.cuda()
        with on(path, ZO()):
            of_path = [draw(KEY, Purpose.DIRECTION, rows, columns) for draw in (bits16, bits32)]
            of_path += [direction(KEY, rows, columns, b, Purpose.PROBE_ROUNDING) for b in (None, 2, 4, 8)]
            for some in (None, rows):
                owner, places, *rest = SparseZO(eps=1e-3, cell=16).hits(store, KEY, some)
                of_path += [owner, *places, *rest]
        drawn.append([x.cpu() for x in of_path])
    for of_paths in zip(*drawn, strict=True):
        assert all_equal(of_paths)


# ---------------------------------------------------------------- stores


@every_format
def test_encoding_is_the_same_on_both(weights, residual):
    for shape in SHAPES:
        cpu, cuda = (stored(path, matrix(shape), weights, residual)["w"] for path in ("cpu", "fused"))
        assert same(cpu, cuda) and cuda.device.type == "cuda"


def test_no_buffer_is_filled_while_the_gpu_still_copies_from_it(monkeypatch):
    """The GPU is held up for some tenths of a second, in which the host could have filled every buffer five times."""
    monkeypatch.setattr("runtime.checkpoints.BUFFER_BYTES", 2**20)
    tensors = [(str(i), torch.full((2**20,), i, dtype=torch.uint8)) for i in range(5 * BUFFERS)]
    list(staged(tensors, torch.device("cuda")))  # allocating would wait for the GPU; from now on memory is cached
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # clock cycles
    moved = list(staged(tensors, torch.device("cuda")))
    for (name, tensor), (same_name, copy) in zip(tensors, moved, strict=True):
        assert name == same_name and copy.is_cuda and torch.equal(copy.cpu(), tensor)


@pytest.mark.parametrize("buffer_bytes", [1001, 2**24])
@every_format
def test_a_checkpoint_loads_to_the_same_bits(weights, residual, buffer_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.checkpoints.BUFFER_BYTES", buffer_bytes)
    create(tiny_llama(), seed=1).save(tmp_path / "m")
    cpu, cuda = (load(tmp_path / "m", device, weights=weights, residual=residual) for device in ("cpu", "cuda"))
    wanted = weights_sha256(cpu.weights)
    assert weights_sha256(cuda.weights) == wanted and {s.device.type for s in cuda.weights.values()} == {"cuda"}
    save_stored(tmp_path / "codes", cuda.raw_config, cuda.format, cuda.residual, cuda.weights, [])
    again = load(tmp_path / "codes", "cuda", weights=weights, residual=residual)
    assert weights_sha256(again.weights) == wanted


@every_format
def test_what_is_not_finite_is_named(weights, residual, tmp_path):
    lm = create(tiny_llama(), seed=1)
    lm.weights["model.norm.weight"].value[-1] = float("nan")
    lm.save(tmp_path / "m")
    with pytest.raises(ValueError, match="model.safetensors: model.norm.weight holds NaN or infinity"):
        load(tmp_path / "m", "cuda", weights=weights, residual=residual)


@every_format
def test_stored_weights_are_read_alike(weights, residual):
    index = torch.tensor([4, 1, 1])
    for shape in ((9, 136), (5, 264), (9, 13), (6, 3, 2, 4)):
        cpu, cuda = (stored(path, matrix(shape), weights, residual) for path in ("cpu", "fused"))
        views = [StoredWeights(cpu, torch.bfloat16), StoredWeights(cuda, torch.bfloat16),
                 kernels.FusedStoredWeights(cuda, torch.bfloat16)]  # fmt: skip
        assert all_equal([view.read("w").cpu() for view in views])
        assert all_equal([view.read("w", index.to(view.weights["w"].device)).cpu() for view in views])


# ---------------------------------------------------------------- probes and updates


@every_way
@every_format
def test_fifty_updates_land_on_the_same_bits(weights, residual, zo):
    """Equal bits and equal counts on every path, floats included.

    The steps grow until most codes are at the ends of the range.
    """
    for shape in SHAPES:
        stores, g = {path: stored(path, matrix(shape), weights, residual) for path in PATHS}, [3.0, -7.5, 0.1]
        for step in range(50 if shape == SHAPES[0] else 8):
            counts = []
            for path, store in stores.items():
                with on(path, zo) as way:
                    key, lr = Key(2**40 + 1, step), 1e-5 * 1.2**step
                    counts.append(update(store, grads(*g[: zo.queries]), key, way, lr).tolist())
            assert counts == counts[:1] * len(PATHS)
        assert all(same(stores["cpu"]["w"], store["w"]) for store in stores.values())


@every_format
def test_steps_to_nearest_and_the_oracle_have_no_kernel(weights, residual):
    """They take the definition's way on a GPU too."""
    stores = {path: stored(path, matrix(), weights, residual) for path in PATHS}
    if weights in ("int8", "int4"):
        stores["fused, oracle"] = {"w": encode(matrix().cuda(), weights, residual, oracle=True)}
    for zo in (ZO(bits=4, nearest=True), ZO(bits=4), SparseZO(cell=8)):
        pairs, counts = [], []
        for path, store in stores.items():
            with on(path.split(",")[0], zo) as way:
                pairs.append(pair(store, way).read("w").cpu())
                counts.append(update(store, grads(2.0), Key(1, 2), way, 0.01).tolist())
        assert all_equal(pairs) and counts == counts[:1] * len(stores)
        assert all(same(stores["cpu"]["w"], store["w"]) for store in stores.values())


@every_way
@every_format
def test_a_pair_is_the_same_on_every_path(weights, residual, zo):
    for i, shape in enumerate(SHAPES):
        pairs, dtype = [], (torch.float32, torch.bfloat16)[i % 2]
        for path in PATHS:
            with on(path, replace(zo, dtype=dtype)) as way:
                pairs.append(pair(stored(path, matrix(shape), weights, residual), way).read("w").cpu())
        assert all_equal(pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_way
@every_format
def test_rows_are_rows_of_read(weights, residual, zo, dtype):
    """The embedding's way; one sign alone is its half of the pair; and a pair's codes."""
    reads = []
    for path in PATHS:
        with on(path, replace(zo, dtype=dtype)) as way:
            store, index = stored(path, matrix(), weights, residual), torch.tensor([64, 3, 3, 0])
            view, half = pair(store, way), PerturbedWeights(store, Key(5, 6), way, [(7, -1)], 1)
            rows, both = view.read("w", index.to(store["w"].device)), view.read("w")
            assert torch.equal(rows.cpu().to(dtype), both.cpu()[:, index]) and torch.equal(half.read("w"), both[1:])
            codes = [view.read("w", as_codes=True).view(torch.uint8)] if weights in ("fp8", "int8") else []
            reads.append([tensor.cpu() for tensor in (rows, both, *codes)])
    assert all(all_equal(of_paths) for of_paths in zip(*reads, strict=True))


def test_minus_zero():
    """Codes by their bits.  Weights of a thousandth of the smallest fp8 number, and a step that leaves most of them."""
    x = torch.full((8, 40), -1e-12)
    x[:, 0] = 1.0
    for zo in (ZO(bits=4), SparseZO(cell=8)):
        stores = {path: stored(path, x, "fp8") for path in PATHS}
        for path, store in stores.items():
            with on(path, zo) as way:
                update(store, grads(1.0), Key(1, 0), way, 1e-12)
        assert all(same(stores["cpu"]["w"], store["w"]) for store in stores.values())


@every_way
@every_format
def test_lr_zero_changes_no_bit(weights, residual, zo):
    store, before = (stored("fused", matrix((12, 136)), weights, residual) for _ in range(2))
    with on("fused", zo) as way:
        for step in range(200):
            done = zo_step(store, lambda view: view.read("w").float().sum((1, 2)), Key(0, step), way, 0.0)
            assert done.counts.tolist() == [0] * COUNTED
            large = torch.full_like(done.projected_grads, 1e3)
            assert update(store, large, Key(0, step), way, 0.0).tolist() == [0] * COUNTED
    assert same(store["w"], before["w"])


# ---------------------------------------------------------------- whole models


def loss_of(lm: LanguageModel) -> BatchLoss:
    rows = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return BatchLoss.of(lm, [Encoded([row], [[5], [6]], 8, i % 2) for i, row in enumerate(rows)], 0, 6)


def on_gpu(lm: LanguageModel) -> LanguageModel:
    """The same model there."""
    weights = {}
    for name, store in lm.weights.items():
        tensors = {suffix: tensor.cuda() for suffix, tensor in store.tensors().items()}
        weights[name] = from_tensors(tensors, store.shape, lm.format, lm.residual)
    return type(lm)(lm.config, lm.raw_config, weights, lm.dtype, lm.format, lm.residual)


@pytest.mark.parametrize("way", ["4 bits, one rounding", "8 bits, codes", "sparse"])
@pytest.mark.parametrize("weights, residual", [("fp32", 0), ("int8", 0), ("int4", 0), ("int4", 4), ("fp8", 0)])
def test_fifty_steps_of_training_are_the_same_with_and_without_kernels(weights, residual, way):
    """Projected gradients and all bits; and the CPU redoes the same updates from the projected gradients."""
    raw = tiny_llama(intermediate_size=136, hidden_size=40, head_dim=8)
    cpu = create(raw, device="cpu", weights=weights, residual=residual)
    models, runs = {path: on_gpu(cpu) for path in ("twin", "fused")}, {}
    for path, lm in models.items():
        if path == "fused":
            gpu.install(lm)
            assert type(lm.stored_view()) is kernels.FusedStoredWeights and random_bits.DEVICE_TWINS
        with on(path, WAYS[way]) as zo:
            steps = [zo_step(lm.weights, loss_of(lm), Key(7, step), zo, 1e-3) for step in range(50)]
        runs[path] = torch.stack([step.projected_grads for step in steps])
    assert torch.equal(runs["twin"], runs["fused"]) and runs["fused"].all()
    for step, projected_grads in enumerate(runs["fused"]):
        update(cpu.weights, projected_grads, Key(7, step), WAYS[way], 1e-3)
    assert len({weights_sha256(lm.weights) for lm in (cpu, *models.values())}) == 1


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("probes", [1, 2])
def test_compiled_blocks_and_products_of_codes(raw, kind, probes):
    """Beside products of fake-quantised numbers, in eager mode: what is left is bfloat16's rounding, which now and then
    takes an activation to the next of its few codes: 1 to 3 % of the logits, on a CPU too."""
    raw = raw | {"hidden_size": 64, "intermediate_size": 96}
    torch.compiler.reset()
    models = {way: create(raw, device="cuda", dtype=torch.bfloat16, weights=kind) for way in ("fake", "codes", "all")}
    for way, lm in models.items():
        gpu.install(lm)
        lm.round_inputs(partial(quantise_tokens, kind=kind))
        if way != "fake":
            enable_code_products(lm)
        if way == "all":
            lm.compile_blocks()
    weights = models["fake"].weights
    zo = gpu.estimator(SparseZO(eps=1e-3, cell=64, dtype=torch.bfloat16), "cuda")
    view = models["fake"].stored_view()
    view = view if probes == 1 else PerturbedWeights(weights, Key(1, 2), zo, [(3, 1), (3, -1)], 2)
    with torch.no_grad():
        for B, T in (3, 12), (2, 7):
            tokens = torch.randint(3, 90, (B, T), generator=torch.Generator().manual_seed(T)).cuda()
            want, *others = (lm(tokens, view=view) for lm in models.values())
            for logits in others:
                assert (logits - want).square().mean().sqrt() < 0.04 * want.square().mean().sqrt()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int8 products", "int4", "fp8", "fp8 products"])
def test_both_signs_by_one_copy_of_a_matrix(kind):
    """Beside copies of their own, in eager mode; and no stored bit is another afterwards.  Sums may be added in another
    order: in bf16 by a rounding, which takes some activations to the next of their codes."""
    weights, dtype = kind.split()[0], torch.float32 if kind == "fp32" else torch.bfloat16
    raw = tiny_llama(hidden_size=64, intermediate_size=96)
    plain, placed = (create(raw, device="cuda", dtype=dtype, weights=weights) for _ in range(2))
    zo = SparseZO(eps=2e-2, cell=8, dtype=dtype)
    for lm in (plain, placed):
        gpu.install(lm)
        if "products" in kind:
            lm.round_inputs(partial(quantise_tokens, kind=weights))
            enable_code_products(lm)
    gpu.probe_in_place(placed, zo)
    before, tokens = weights_sha256(placed.weights), torch.arange(3, 24, device="cuda").view(3, 7)
    want, got = (lm(tokens, view=PerturbedWeights(lm.weights, Key(2**63 + 1, 7), gpu.estimator(zo, "cuda"),
                                                  [(3, 1), (3, -1)], 2)) for lm in (plain, placed))  # fmt: skip
    bound = (0.04 if dtype == torch.bfloat16 else 1e-4) * want.square().mean().sqrt()
    assert (got - want).square().mean().sqrt() < bound and (want[0] - want[1]).abs().max() > 0.1
    assert weights_sha256(placed.weights) == before


GRAPHED = ["--weights int8 --direction-bits 4 --no-compile", "--weights int8 --direction-bits sparse --compile",
           "--weights int4 --direction-bits sparse --queries 2 --micro-batch-size 5 --no-compile",
           "--weights fp8 --activations fp8 --compile",
           "--weights int8 --activations int8 --direction-bits sparse --compile",
           "--weights int8 --rounding nearest --no-compile",
           "--method adazeta --alpha 1 --beta 1", "--method adazeta --queries 3 --no-compile",
           "--method adazeta --queries 3 --compile",
           "--method subzero --subspace-rank 4 --subspace-steps 5 --no-compile", "--method mazo --weights int8",
           "--method subzero --weights int8 --subspace-rank 4 --subspace-steps 5 --compile",
           "--method mezo --weights bf16 --probes-per-forward 1 --no-compile"]  # fmt: skip


@pytest.mark.parametrize("flags", GRAPHED)
def test_graphs_replay_the_same_steps(flags, tmp_path):
    """Batches of several lengths, each met once, twice and more often, with evaluations between: all projected
    gradients and all bits as launch by launch."""
    hashes, seen = [], {"--graphs": [], "--no-graphs": []}
    for name, of_run in seen.items():
        torch.compiler.reset()
        more = f"{name} --device cuda --batch-size 300 --steps 12 --eval-every 6 --out {tmp_path / name}"
        c = train.parse([*flags.split(), *more.split()])
        problem = train.prepare(c)[0]
        lm, weights, n, at = problem.lm, train.trained(problem.lm), len(problem.train), 0
        assert problem.multiple == 8
        masks = None
        if c.method == "mazo":
            masks = {name: torch.ones(w.matrix_shape, device="cuda").cumsum(1) % 2 > 0 for name, w in weights.items()}
        zo = gpu.estimator(train.estimator(c, lm, masks), c.device, c.graphs)
        ways = (sparse.GraphedSparseZO, sparse.FusedSparseZO) if c.cell else (kernels.GraphedZO, kernels.FusedZO)
        own = {"subzero": SubZero, "mazo": MaZO}.get(c.method)
        ways = (kernels.graphed_kind(own), own) if own else ways
        assert type(zo) is ways[name == "--no-graphs"]
        for repeat in range(4):
            for longest in (8, 16, 23):
                examples = [e for e in problem.train if e.width <= longest][:12]
                examples = examples[repeat:] + examples[:repeat]
                loss_fn = BatchLoss.of(lm, examples, problem.pad, c.micro_batch_size, problem.multiple)
                if c.queries is None:
                    epoch = epoch_of(at, n, c.batch_size)
                    zo = replace(zo, queries=adazeta_queries(epoch, c.alpha, c.beta, c.max_queries))
                done, at = zo_step(weights, loss_fn, Key(c.seed, at), zo, 1e-4), at + 1
                of_run.append((done.projected_grads.tolist(), done.counts.tolist(), problem.quality(problem.dev[:9])))
        assert name == "--no-graphs" or zo.graphed.graphs
        hashes.append(weights_sha256(lm.weights))
    assert seen["--graphs"] == seen["--no-graphs"] and hashes[0] == hashes[1]
    assert len({str(projected_grads) for projected_grads, *_ in seen["--graphs"]}) == at


def test_more_graphs_are_asked_for_than_are_kept(monkeypatch):
    """AdaZeta's growing queries times a real task's lengths; CUDA records into no pool that lost its last graph."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    graphed = graphs.CudaGraphed("cuda")
    for step in range(40):
        ones = torch.ones(1 + step % 5, device="cuda")
        assert graphed("key", lambda step, inputs: inputs[0] * step, step, [ones]).tolist() == [step] * len(ones)
        assert len(graphed.graphs) <= 3


def test_products_of_fp8_codes():
    """Beside the same numbers multiplied in float64: bfloat16's rounding of a sum, and the sum's own, whose 14 bits are
    cut at every 32nd term."""
    g = torch.Generator("cuda").manual_seed(0)
    for P, N, C, R in (2, 14, 64, 96), (2, 1, 64, 96), (1, 32, 512, 64), (2, 5, 4096, 32):
        x = torch.randn(P, N, C, device="cuda", generator=g)
        weight = torch.randn(P, R, C, device="cuda", generator=g).to(torch.float8_e4m3fn)
        scale = torch.rand(R, 1, device="cuda", generator=g) + 0.5
        codes, tokens = token_codes(x, "fp8")
        scales = (tokens * scale[:, 0]).double()[..., None]
        terms = codes.double()[:, :, None] * weight.double()[:, None] * scales
        wanted, sizes = terms.sum(-1), terms.abs().sum(-1)
        got = multiply_e4m3(codes, tokens, weight, scale).double()
        assert ((got - wanted).abs() <= 2**-8 * wanted.abs() + 2**-11 * sizes).all()


def test_products_of_int8_codes():
    """Exact, for few rows and many, and at the largest sums."""
    g = torch.Generator("cuda").manual_seed(0)
    for P, N, C, R in (2, 14, 64, 96), (2, 1, 64, 96), (1, 32, 512, 64), (2, 17, 11008, 32):
        codes = torch.randint(-127, 128, (P, N, C), device="cuda", generator=g, dtype=torch.int8)
        weight = torch.randint(-127, 128, (P, R, C), device="cuda", generator=g, dtype=torch.int8)
        codes[0, 0], weight[0, 0] = 127, -127
        got = multiply_int8(codes, weight).cpu()
        assert torch.equal(got.long(), codes.cpu().long() @ weight.cpu().long().mT)


@pytest.mark.parametrize("method", ["fo", "fo-ste"])
def test_first_order_gradients_are_those_of_the_cpu(method):
    """Of every tensor, the embedding's rows too, for which codes have a kernel."""
    cpu = create(tiny_llama(), device="cpu")
    cuda = on_gpu(cpu)
    gpu.install(cuda)
    for lm in (cpu, cuda):
        lm.weights = make_trainable(lm.weights, "int8" if method == "fo-ste" else None, torch.float32)
        loss_of(lm)(lm.stored_view())[0].backward()
    for name, store in cpu.weights.items():
        of_cpu, of_cuda = store.value.grad, cuda.weights[name].value.grad.cpu()
        assert of_cpu.abs().max() > 0 and (of_cpu - of_cuda).abs().max() < 1e-4 * of_cpu.abs().max() + 1e-7


# ---------------------------------------------------------------- family/: offloaded blocks, and a tail

WIDE = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=5, num_key_value_heads=4)  # 13 million a block
OFFLOADED = {  # format, whether codes are multiplied, and the estimator; sparse probes are made in place
    "int4, sparse": ("int4", False, SparseZO(eps=2e-3, cell=64)),
    "bf16, Gaussian": ("bf16", False, ZO(eps=1e-3)),
    "bf16, sparse": ("bf16", False, SparseZO(eps=2e-3, queries=2, cell=64)),
    "fp8 products, sparse": ("fp8", True, SparseZO(eps=2e-3, cell=64)),
}


def ready(lm: LanguageModel, products: bool, zo: ZO) -> ZO:
    """As runtime.problem.set_up_forwards and train.installed."""
    gpu.install(lm)
    if products:
        lm.round_inputs(partial(quantise_tokens, kind=lm.format))
        enable_code_products(lm)
    if isinstance(zo, SparseZO):
        gpu.probe_in_place(lm, zo)
    zo = gpu.estimator(zo, "cuda")
    return zo if lm.offloaded is None else Deferred(zo, lm.offloaded)


copy_soon, LATE = Lane.copy, random.Random(0)


def copy_late(lane: Lane, to: dict, of: dict, after: list) -> object:
    """As Lane.copy, up to a millisecond after it could: in the middle of a forward."""
    for event in filter(None, after):
        lane.stream.wait_event(event)
    with torch.cuda.stream(lane.stream):
        torch.cuda._sleep(LATE.randrange(2_000_000))
    return copy_soon(lane, to, of, after)


@pytest.mark.parametrize("case", OFFLOADED)
def test_offloaded_blocks_have_the_bits_of_resident_ones(case, monkeypatch):
    """Blocks so large that copies take as long as forwards of few tokens; at first as they come, then late: what reads
    or writes a slot or a home too early changes a bit.  All losses, and after every five steps all weights."""
    weights, products, zo = OFFLOADED[case]
    zo = replace(zo, dtype=torch.bfloat16)
    away = create(tiny_llama(**WIDE), device="cpu", dtype=torch.bfloat16, weights=weights)
    resident, start = on_gpu(away), weights_sha256(away.weights)
    before = torch.cuda.memory_allocated()
    offload(away, torch.device("cuda"))
    block = sum(t.nbytes for store in away.offloaded.home[0].values() for t in store.tensors().values())
    rest = sum(t.nbytes for n, s in away.weights.items() if not n.startswith(away.layers) for t in s.tensors().values())
    assert torch.cuda.memory_allocated() - before < 3 * block + rest + 2**22  # which is less than a fourth one
    estimators = {lm: ready(lm, products, zo) for lm in (resident, away)}
    for repeat in range(8):
        if repeat == 2:
            monkeypatch.setattr(Lane, "copy", copy_late)
        for step in range(5):
            done = [zo_step(lm.weights, loss_of(lm), Key(repeat, step), of, 1e-4) for lm, of in estimators.items()]
            assert torch.equal(done[0].plus, done[1].plus) and torch.equal(done[0].minus, done[1].minus), (repeat, step)
        away.offloaded.settle()
        assert weights_sha256(resident.weights) == weights_sha256(away.weights) != start, repeat
    assert done[0].projected_grads.any()


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
def test_a_tails_gradient_is_that_of_the_cpu(raw):
    """And the losses, of the first step, to float32's sums.  Of two more Adam turns a small gradient's rounding into
    a whole step of its weight: those are few."""
    cpu = create(raw, device="cpu")
    cuda, start = on_gpu(cpu), {name: store.value.clone() for name, store in cpu.weights.items()}
    gpu.install(cuda)
    zos = [replace(SparseZO(eps=1e-2, queries=2, cell=8), moves=tail_of(lm, 1, 3.0)) for lm in (cpu, cuda)]
    zos[1] = gpu.estimator(zos[1], "cuda")
    for step in range(3):
        done = []
        for lm, zo in zip((cpu, cuda), zos, strict=True):
            watched = zo.moves.watch(loss_of(lm), 4)
            plus, minus = probe_losses(lm.weights, watched, Key(7, step), zo)
            found = {name: copy.grad.cpu() for name, copy in zo.moves.copies.items()}
            done.append((plus, found))
            update(lm.weights, (plus - minus) / (2 * zo.eps), Key(7, step), zo, 1e-4)
        (plus, of_cpu), (other, of_cuda) = done
        assert (plus - other).abs().max() < (1e-5 if step == 0 else 1e-3)
        for name, grad in of_cpu.items():
            assert step or (grad - of_cuda[name]).abs().max() < 1e-4 * grad.abs().max() + 1e-7
    moved, apart = (sum((cpu.weights[name].value - of[name]).square().sum() for name in zos[0].moves.names) for of in (
        start, {name: store.value.cpu() for name, store in cuda.weights.items()}
    ))  # fmt: skip
    assert apart < 0.01 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tails_steps_come_again_to_the_same_bits(dtype):
    """Which --resume and --replay need, whose tail has no record: sums that are added by whoever comes first would
    differ.  Texts of 700 tokens, so that attention's backward pass has several blocks of them."""
    raw = tiny_llama(hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=1024)
    rows = torch.randint(3, 90, (6, 700), generator=torch.Generator().manual_seed(0)).tolist()
    hashes = set()
    for _ in range(4):
        lm = create(raw, device="cuda", dtype=dtype, weights="fp32" if dtype == torch.float32 else "bf16")
        gpu.install(lm)
        zo = gpu.estimator(replace(ZO(eps=1e-3, dtype=dtype), moves=tail_of(lm, 2, 3.0)), "cuda")
        for step in range(3):
            examples = [Encoded([row], [[5], [6]], 699, i % 2) for i, row in enumerate(rows)]
            loss_fn = zo.moves.watch(BatchLoss.of(lm, examples, 0, 6), 2)
            zo_step(lm.weights, loss_fn, Key(7, step), zo, 1e-4)
        hashes.add(weights_sha256(lm.weights))
    assert len(hashes) == 1


@pytest.mark.parametrize("flags", ["--method zo2 --weights bf16", "--method elasticzo --weights int8",
                                   "--method mazo --weights bf16", "--method subzero --weights int8",
                                   "--method mezo-svrg --weights bf16"])  # fmt: skip
def test_runs_of_the_family_are_replayed(flags, tmp_path, capsys):
    """By train.py's own way, compiled; of offloaded blocks to the bits of resident ones."""
    short = "--device cuda --steps 6 --eval-every 2 --batch-size 16 --num-eval 32 --lr 1e-3".split()
    torch.compiler.reset()
    assert train.main([*short, *flags.split(), "--out", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    if "zo2" in flags:
        resident = [*short, *"--method mezo --weights bf16 --no-graphs --out".split(), str(tmp_path / "resident")]
        assert train.main(resident) == 0
        assert json.loads(capsys.readouterr().out)["weights_sha256"] == found["weights_sha256"]
    assert train.main(["--replay", str(tmp_path / "run"), "--verify", "6"]) == 0


@pytest.mark.parametrize("width, bottleneck, rank, tokens", [(4096, 64, 5, 1000), (768, 64, 16, 96), (136, 8, 3, 37)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_bottleneck_adapter_in_one_kernel(width, bottleneck, rank, tokens, compiled):
    """As near to the exact product as the definition in float32; of bf16, to a rounding of the result."""
    spec = Spec("adp", "mlp", bottleneck, rank)
    with torch.device("meta"):
        plain, fused = Bottleneck(width, spec), FusedBottleneck(width, spec)
    weights = bottleneck_weights(plain)
    h = gaussian(3, 2, tokens, width).bfloat16()
    x = h.flatten(1, 2).double()
    low = torch.relu(x @ dense(plain.down, weights, "down") + weights["down.bias"][:, None])
    exact = (x + low @ dense(plain.up, weights, "up") + weights["up.bias"][:, None]).view(h.shape)
    weights, h = {name: w.cuda() for name, w in weights.items()}, h.cuda()
    if compiled:
        fused.compile(dynamic=True)
    with torch.no_grad():
        want, got = (functional_call(module, weights, (h.float(),)).cpu() for module in (plain, fused))
        coarse = functional_call(fused, weights, (h,)).cpu()
        weights["down.bias"][1, 2] = torch.nan
        assert functional_call(fused, weights, (h,))[1].isnan().all(-1).sum() == 2 * tokens  # it is not hidden by relu
    scale = (exact - h.cpu()).abs().max()
    assert (got - exact).abs().max() <= 4 * (want - exact).abs().max() + 2**-22 * scale
    assert coarse.dtype == torch.bfloat16 and ((coarse - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * scale).all()


def dense(layer: TensorTrain, weights: dict[str, Tensor], part: str) -> Tensor:
    cores = [weights[f"{part}.cores.{i}"].double() for i in range(len(layer.factors))]
    return to_dense(cores, layer.inputs)
