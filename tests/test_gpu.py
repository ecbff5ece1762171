"""The GPU draws the same integers as the CPU, and lands them the same way.  Skipped without CUDA."""

from functools import partial

import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from torch import Tensor

import train
import zo_optim
from checkpoint import BUFFERS, staged
from data.scoring import Encoded, collate, losses, width
from first_order import make_trainable
from model import StoredView, create, load
from quant import Stored, encode, multiply_codes, token_codes
from random_bits import Key, Use, bits16, bits32, random_words, tensor_id
from zo_optim import ZO, Pair, direction, estimate, grid_step, land_steps, update

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KEY = Key(seed=2**63 + 12345, step=2**31 + 7, query=3, tensor=tensor_id("model.norm.weight") | 2**31)


def test_words_are_the_same_integers():
    blocks = torch.tensor([0, 1, 2, 511, 512, 2**31 - 1, 2**31, 2**32 - 1] + list(range(5000, 6001)))
    for use in Use:
        assert torch.equal(random_words(KEY, use, blocks), random_words(KEY, use, blocks.cuda()).cpu())


@pytest.mark.parametrize("columns", [1, 7, 8, 384, 1001])
def test_draws_are_the_same_integers(columns):
    rows = torch.tensor([5, 0, 300])
    for draw in (bits16, bits32):
        cpu, gpu = (draw(KEY, Use.DIRECTION, r, columns) for r in (rows, rows.cuda()))
        assert torch.equal(cpu, gpu.cpu())
    for bits in (None, 2, 4, 8):
        cpu, gpu = (direction(KEY, r, columns, bits, Use.PROBE_ROUNDING) for r in (rows, rows.cuda()))
        assert torch.equal(cpu, gpu.cpu())
    spacing = torch.rand(3, columns, generator=torch.Generator().manual_seed(0)) * 4e-3
    cpu, gpu = (grid_step(KEY, s.new_tensor([5, 0, 300], dtype=torch.int64), s, columns, 1e-3)
                for s in (spacing, spacing.cuda()))  # fmt: skip
    assert torch.equal(cpu, gpu.cpu())


FORMATS = [("fp32", 0), ("bf16", 0), *((f"int{bits}", residual) for bits in (8, 4) for residual in (0, 4, 8)),
           ("fp8", 0), ("fp8-e5m2", 0)]  # fmt: skip
WAYS = {
    "full": ZO(eps=0.02, queries=2),
    "4 bits, one rounding": ZO(eps=0.02, queries=3, bits=4, estimator="q-rge1"),
    "8 bits, codes": ZO(eps=0.01, queries=2, bits=8, probe="codes"),
    "grid": ZO(eps=7e-3, queries=2, grid=True, stride=7),
    "grid, codes": ZO(eps=5e-3, queries=1, grid=True, probe="codes", estimator="q-rge1"),
}
# 264: two int4 groups and a short one; a width that is no multiple of 8 has no kernel, a vector of such a length has
SHAPES = [(65, 136), (3, 1000), (300,), (1003,), (1, 8), (7, 24), (5, 264), (9, 13), (2, 4096), (3, 2048), (2, 8192)]
every_format = pytest.mark.parametrize("weights, residual", FORMATS)
every_way = pytest.mark.parametrize("zo", WAYS.values(), ids=WAYS)


def matrices(shape=(65, 136)) -> list[Tensor]:
    """For the CPU, for the definition on the GPU, and for the kernels."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    matrix.view(-1)[:3] = torch.tensor([0.0, 1e-9, -1e-9])[: matrix.numel()]
    return [matrix, matrix.cuda(), matrix.cuda().clone()]


def bits_of(stored: Stored) -> list[Tensor]:
    """Every stored bit, as bytes on the CPU: torch compares no fp8 on a GPU, and would take -0 for 0."""
    return [part.contiguous().view(torch.uint8).cpu() for part in stored.parts().values()]


def same(a: Stored, b: Stored) -> bool:
    return all(torch.equal(*parts) for parts in zip(bits_of(a), bits_of(b), strict=True))


@every_format
def test_encoding_is_the_same_on_both(weights, residual):
    for shape in SHAPES:
        cpu, gpu, _ = (encode(matrix, weights, residual) for matrix in matrices(shape))
        assert same(cpu, gpu)


def test_no_buffer_is_filled_while_the_gpu_still_copies_from_it(monkeypatch):
    """The GPU is held up for some tenths of a second, in which the host could have filled every buffer five times."""
    monkeypatch.setattr("checkpoint.BUFFER_BYTES", 2**20)
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
    monkeypatch.setattr("checkpoint.BUFFER_BYTES", buffer_bytes)
    create(tiny_llama(), seed=1).save(tmp_path / "m")
    cpu, gpu = (load(tmp_path / "m", device, weights=weights, residual=residual) for device in ("cpu", "cuda"))
    assert cpu.sha256() == gpu.sha256() and {s.device.type for s in gpu.store.values()} == {"cuda"}
    gpu.save_stored(tmp_path / "codes")
    assert load(tmp_path / "codes", "cuda", weights=weights, residual=residual).sha256() == cpu.sha256()


@every_format
def test_what_is_not_finite_is_named(weights, residual, tmp_path):
    lm = create(tiny_llama(), seed=1)
    lm.store["model.norm.weight"].value[-1] = float("nan")
    lm.save(tmp_path / "m")
    with pytest.raises(ValueError, match="model.safetensors: model.norm.weight holds NaN or infinity"):
        load(tmp_path / "m", "cuda", weights=weights, residual=residual)


SEED = 2**40 + 1


def plainly(store, zo, step, factors):
    return land_steps(store, factors, SEED, step, zo, plain=True)


@every_way
@every_format
def test_fifty_updates_land_on_the_same_bits(weights, residual, zo):
    """CPU, the same definition on the GPU, and the fused kernel: equal bits and equal counts, floats included.

    The steps grow until most codes are at the ends of the range.
    """
    for shape in SHAPES:
        stores = [{"w": encode(m, weights, residual)} for m in matrices(shape)]
        slopes = [3.0, -7.5, 0.1][: zo.queries]
        for step in range(50 if shape == SHAPES[0] else 8):
            counts = [
                update(store, slopes, SEED, step, zo, 1e-5 * 1.2**step, partial(plainly, store, zo) if plain else None)
                for store, plain in zip(stores, (True, True, False), strict=True)
            ]
            assert counts[0].tolist() == counts[1].tolist() == counts[2].tolist()
        assert same(stores[0]["w"], stores[1]["w"])
        assert same(stores[0]["w"], stores[2]["w"])


@every_format
def test_steps_to_nearest_and_the_oracle_have_no_kernel(weights, residual):
    """They take the definition's way on a GPU too."""
    stores = [{"w": encode(m, weights, residual)} for m in matrices()[:2]]
    if weights in ("int8", "int4"):
        stores.append({"w": encode(matrices()[1], weights, residual, oracle=True)})
    for nearest in (True, False):
        zo = ZO(bits=4, nearest=nearest)
        pairs = [Pair(store, 5, 6, 7, zo, torch.float32).read("w").cpu() for store in stores]
        counts = [update(store, [2.0], seed=1, step=2, zo=zo, lr=0.01).tolist() for store in stores]
        for store, pair, count in zip(stores[1:], pairs[1:], counts[1:], strict=True):
            assert torch.equal(pairs[0], pair) and counts[0] == count and same(stores[0]["w"], store["w"])


@every_way
@every_format
def test_fused_pair_equals_plain_pair(weights, residual, zo):
    for shape, dtype in zip(SHAPES, (torch.float32, torch.bfloat16) * 5, strict=False):
        pairs = [
            Pair({"w": encode(m, weights, residual)}, 5, 6, 7, zo, dtype, plain).read("w").cpu()
            for m, plain in zip(matrices(shape), (True, True, False), strict=True)
        ]
        assert torch.equal(pairs[0], pairs[1])
        assert torch.equal(pairs[0], pairs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_way
@every_format
def test_rows_are_rows_of_read(weights, residual, zo, dtype):
    """The embedding's way, beside whole matrices and the definition."""
    index = torch.tensor([64, 3, 3, 0]).cuda()
    pair, plain = (
        Pair({"w": encode(m, weights, residual)}, 5, 6, 7, zo, dtype, plain)
        for m, plain in zip(matrices()[1:], (False, True), strict=True)
    )
    assert torch.equal(pair.rows("w", index).to(dtype), pair.read("w")[:, index])
    assert torch.equal(pair.rows("w", index), plain.rows("w", index))


@pytest.mark.parametrize("weights", ["fp8", "fp8-e5m2"])
def test_minus_zero(weights):
    """Codes by their bits.  Weights of a thousandth of the smallest fp8 number, and a step that leaves most of them."""
    x = torch.full((8, 40), -1e-12)
    x[:, 0] = 1.0
    stores = [{"w": encode(m, weights)} for m in (x, x.cuda())]
    for store in stores:
        update(store, [1.0], seed=1, step=0, zo=ZO(bits=4), lr=1e-12)
    assert same(*(store["w"] for store in stores))


@every_way
@every_format
def test_lr_zero_changes_no_bit(weights, residual, zo):
    store = {"w": encode(matrices((12, 136))[1], weights, residual)}
    before = bits_of(store["w"])
    for step in range(200):
        queries = estimate(store, lambda view: view.read("w").float().sum((1, 2)), 0, step, zo, torch.float32)
        counts = update(store, [query.slope or 1e3 for query in queries], seed=0, step=step, zo=zo, lr=0.0)
        assert counts.tolist() == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, bits_of(store["w"]), strict=True))


@every_format
def test_stored_weights_are_read_alike(weights, residual):
    index = torch.tensor([4, 1, 1])
    for shape in ((9, 136), (5, 264), (9, 13)):
        views = [StoredView({"w": encode(m, weights, residual)}, torch.bfloat16) for m in matrices(shape)[:2]]
        assert torch.equal(*(view.read("w").cpu() for view in views))
        assert torch.equal(views[0].rows("w", index), views[1].rows("w", index.cuda()).cpu())


@every_way
def test_fp8_codes_of_a_pair(zo):
    codes = [
        Pair({"w": encode(m, "fp8")}, 5, 6, 7, zo, torch.float32, plain).codes("w").view(torch.uint8).cpu()
        for m, plain in zip(matrices(), (True, True, False), strict=True)
    ]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def loss_of(lm):
    rows = torch.randint(3, 90, (6, 9), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = [Encoded([row], [[5], [6]], 8, i % 2) for i, row in enumerate(rows)]
    return partial(losses, lm, collate(encoded, 0, lm.device))


@pytest.mark.parametrize("way", ["4 bits, one rounding", "8 bits, codes", "grid"])
@pytest.mark.parametrize("weights, residual", [("fp32", 0), ("int8", 0), ("int4", 0), ("int4", 4), ("fp8", 0)])
def test_fifty_steps_of_training_are_the_same_with_and_without_kernels(weights, residual, way, monkeypatch):
    """Slopes and all bits; and the CPU redoes the same updates from the slopes."""
    raw = tiny_llama(intermediate_size=136, hidden_size=40, head_dim=8)
    models = [create(raw, device="cpu", weights=weights, residual=residual)]
    models += [load_like(models[0]) for _ in range(2)]
    zo, slopes = WAYS[way], {"plain": [], "fused": []}
    for path, lm in zip(slopes, models[1:], strict=True):
        with monkeypatch.context() as patch:
            if path == "plain":
                patch.setattr(zo_optim, "has_kernels", lambda stored: False)
            for step in range(50):
                queries = estimate(lm.store, loss_of(lm), 7, step, zo, torch.float32)
                slopes[path].append([query.slope for query in queries])
                update(lm.store, slopes[path][-1], 7, step, zo, 1e-3)
    for step, of_step in enumerate(slopes["plain"]):
        update(models[0].store, of_step, 7, step, zo, 1e-3)
    assert slopes["plain"] == slopes["fused"]
    assert models[0].sha256() == models[1].sha256() == models[2].sha256()


def load_like(lm):
    """The same model on the GPU."""
    copy = create(lm.raw_config, device="cpu", weights=lm.weights, residual=lm.residual)
    for stored in copy.store.values():
        for name, part in vars(stored).items():
            if isinstance(part, Tensor):
                setattr(stored, name, part.cuda())
    return copy


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
@pytest.mark.parametrize("probes", [1, 2])
def test_compiled_blocks_and_products_of_codes(raw, probes):
    """Beside products of fake-quantised numbers, in eager mode: what is left is bfloat16's rounding, which now and then
    takes an activation to the next of its few codes: 1 to 3 % of the logits, on a CPU too."""
    raw |= {"hidden_size": 64, "intermediate_size": 96}
    torch.compiler.reset()
    models = {way: create(raw, device="cuda", dtype=torch.bfloat16, weights="fp8") for way in ("fake", "codes", "all")}
    for way, lm in models.items():
        lm.round_activations("fp8")
        if way != "fake":
            lm.multiply_codes()
        if way == "all":
            lm.compile_blocks()
    store = models["fake"].store
    view = StoredView(store, torch.bfloat16)
    view = view if probes == 1 else Pair(store, 1, 2, 3, ZO(grid=True, eps=1e-3), torch.bfloat16)
    with torch.no_grad():
        for B, T in (3, 12), (2, 7):
            tokens = torch.randint(3, 90, (B, T)).cuda()
            want, *others = (lm(tokens, view=view) for lm in models.values())
            for logits in others:
                assert (logits - want).square().mean().sqrt() < 0.04 * want.square().mean().sqrt()


GRAPHED = ["--weights int8 --direction-bits 4 --no-compile", "--weights int8 --direction-bits grid --compile",
           "--weights int4 --direction-bits grid --queries 2 --micro-batch-size 5 --no-compile",
           "--weights fp8 --activations fp8 --compile", "--weights int8 --rounding nearest --no-compile",
           "--method adazeta --alpha 1 --beta 1", "--method adazeta --queries 3 --no-compile",
           "--method adazeta --queries 3 --compile",
           "--method mezo --weights bf16 --probes-per-forward 1 --no-compile"]  # fmt: skip


@pytest.mark.parametrize("flags", GRAPHED)
def test_graphs_replay_the_same_steps(flags, tmp_path):
    """Batches of several lengths, each met once, twice and more often, with evaluations between: all slopes and all
    bits as launch by launch."""
    hashes, seen = [], {"--graphs": [], "--no-graphs": []}
    for name, of_run in seen.items():
        torch.compiler.reset()
        more = f"{name} --device cuda --batch-size 300 --steps 12 --eval-every 6 --out {tmp_path / name}"
        c = train.parse([*flags.split(), *more.split()])
        problem = train.prepare(c)[0]
        assert problem.multiple == 8
        take_step, at = train.zeroth_order(c, problem), 0
        for repeat in range(4):
            for longest in (8, 16, 23):
                examples = [e for e in problem.train if width(e) <= longest][:12]
                done = take_step(at, examples[repeat:] + examples[:repeat], 1e-4)
                of_run.append((done.slopes, done.counts.tolist(), problem.quality(problem.dev[:9])))
                at += 1
        hashes.append(problem.lm.sha256())
    assert seen["--graphs"] == seen["--no-graphs"] and hashes[0] == hashes[1]
    assert len({str(slopes) for slopes, *_ in seen["--graphs"]}) == at


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
        got = multiply_codes(codes, tokens, weight, scale).double()
        assert ((got - wanted).abs() <= 2**-8 * wanted.abs() + 2**-11 * sizes).all()


@pytest.mark.parametrize("method", ["fo", "fo-ste"])
def test_first_order_gradients_are_those_of_the_cpu(method):
    """Of every tensor, the embedding's rows too, for which codes have a kernel."""
    models = [create(tiny_llama(), device="cpu") for _ in range(2)]
    models[1] = load_like(models[1])
    for lm in models:
        lm.store = make_trainable(lm.store, "int8" if method == "fo-ste" else None, torch.float32)
        loss_of(lm)(lm.stored_view())[0].backward()
    for name, stored in models[0].store.items():
        cpu, gpu = stored.value.grad, models[1].store[name].value.grad.cpu()
        assert cpu.abs().max() > 0 and (cpu - gpu).abs().max() < 1e-4 * cpu.abs().max() + 1e-7
