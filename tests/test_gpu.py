"""The GPU draws the same integers as the CPU, and lands them the same way.  Skipped without CUDA."""

import pytest
import torch

from quant import encode
from random_bits import Key, Use, bits16, bits32, random_words, tensor_id
from zo_optim import ZO, Pair, direction, update

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


FORMATS = [("int8", 4), ("int8", None), ("bf16", None), ("fp32", None), ("fp32", 8)]


def matrices(shape=(65, 131)):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    return matrix, matrix.cuda()


@pytest.mark.parametrize(("weights", "bits"), FORMATS)
@pytest.mark.parametrize("shape", [(65, 131), (3, 1003), (300,), (1, 4), (7, 12)])
def test_fifty_updates_land_on_the_same_bits(weights, bits, shape):
    """CPU, the same definition on the GPU, and the fused kernel: equal bits and equal counts, floats included."""
    cpu, gpu = matrices(shape)
    stores = [{"w": encode(m, weights)} for m in (cpu, gpu, gpu.clone())]
    zo = ZO(queries=2, bits=bits)
    for step in range(50):
        counts = [
            update(store, [3.0, -7.5], seed=2**40 + 1, step=step, zo=zo, lr=1e-5 * step, plain=plain)
            for store, plain in zip(stores, (True, True, False), strict=True)
        ]
        assert counts[0].tolist() == counts[1].tolist() == counts[2].tolist()
    for parts in zip(*(store["w"].parts().values() for store in stores), strict=True):
        assert torch.equal(parts[0], parts[1].cpu())
        assert torch.equal(parts[0], parts[2].cpu())


@pytest.mark.parametrize(("weights", "bits"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_pair_equals_plain_pair(weights, bits, dtype):
    cpu, gpu = matrices()
    pairs = [
        Pair({"w": encode(m, weights)}, 5, 6, 7, ZO(eps=1e-3, bits=bits), dtype, plain).read("w").cpu()
        for m, plain in ((cpu, True), (gpu, True), (gpu, False))
    ]
    assert torch.equal(pairs[0], pairs[1])
    assert torch.equal(pairs[0], pairs[2])


def test_lr_zero_changes_no_bit():
    for weights, bits in FORMATS:
        store = {"w": encode(matrices()[1], weights)}
        before = [part.clone() for part in store["w"].parts().values()]
        for step in range(200):
            counts = update(store, [1e3], seed=0, step=step, zo=ZO(bits=bits), lr=0.0)
            assert counts.tolist() == [0, 0]
        assert all(torch.equal(a, b) for a, b in zip(before, store["w"].parts().values(), strict=True))
