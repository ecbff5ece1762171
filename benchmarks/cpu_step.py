"""One MeZO fp32 step on a CPU: ours against the usual way on `transformers`, same weights, same real batch.

    QUZO_MODELS=... QUZO_DATA=... python -m benchmarks.cpu_step

The usual way is MeZO's own description: the weights are perturbed in place three times (+eps z, -2 eps z, +eps z)
with z drawn again from a seed, each loss is a full forward, and a fourth sweep updates.  Full means logits of every
word at every position, where ours are of two words at one; --last-only spares the usual way that.  It pads, ours lets
short texts share rows.  Both are run in turn in one process, so a slow moment of the machine meets both, and medians
over the repeats are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from data.files import load_splits
from data.scoring import Batch, BatchLoss, Encoder, collate
from data.tasks import get_task
from data.tokenizer import Tokenizer
from model import LanguageModel, load
from random_bits import Key
from train import batch_indices
from zo_optim import ZO, SparseZO, probe_losses, update

EPS, LR, SEED = 1e-3, 1e-6, 0


class Clock:
    """Seconds spent in each named phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


# ---------------------------------------------------------------- ours


def our_step(lm: LanguageModel, batch: Batch, sparse: bool, step: int, clock: Clock) -> None:
    """zo_optim.zo_step in two pieces, to time them apart."""
    zo, key = (SparseZO if sparse else ZO)(EPS, dtype=lm.dtype), Key(SEED, step)
    with clock("estimate"):
        plus, minus = probe_losses(lm.weights, BatchLoss(lm, [batch]), key, zo)
    with clock("update"):
        update(lm.weights, (plus - minus) / (2 * zo.eps), key, zo, LR)


# ---------------------------------------------------------------- the usual way


def usual_loss(model: nn.Module, batch: Batch, last_only: bool) -> Tensor:
    """Logits of every word, at every position or only at the last of the prompt; then the options' tokens."""
    if last_only:
        hidden = model.model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
        logits = model.lm_head(hidden[batch.row, batch.at])
    else:
        logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits[batch.row, batch.at]
    return F.cross_entropy(logits[:, batch.words], batch.labels)


def sweep(model: nn.Module, seed: int, scale: float) -> None:
    """param += scale * z for every parameter, z from the seed."""
    torch.manual_seed(seed)
    for param in model.parameters():
        z = torch.normal(mean=0, std=1, size=param.shape, dtype=param.dtype)
        param.add_(z, alpha=scale)


def usual_step(model: nn.Module, batch: Batch, last_only: bool, step: int, clock: Clock) -> None:
    with clock("sweeps"):
        sweep(model, step, EPS)
    with clock("forwards"):
        plus = usual_loss(model, batch, last_only).item()
    with clock("sweeps"):
        sweep(model, step, -2 * EPS)
    with clock("forwards"):
        minus = usual_loss(model, batch, last_only).item()
    with clock("sweeps"):
        sweep(model, step, EPS)
        sweep(model, step, -LR * (plus - minus) / (2 * EPS))


# ---------------------------------------------------------------- the comparison


def real_batch(lm: LanguageModel, model: str, data_dir: str, batch_size: int, pack: bool) -> Batch:
    """SST-2, published 16-shot split 42, in the order in which a run with seed 0 meets it."""
    task = get_task("sst2")
    train = load_splits(task, data_dir, 16, 42, 0, 0, 1).train
    encode = Encoder(Tokenizer(model), task, lm.config, max_length=2048)
    examples = [encode(train[i]) for i in batch_indices(SEED, 0, batch_size, len(train))]
    return collate(examples, 0, lm.device, pack=pack)


def check_same_loss(lm: LanguageModel, theirs: nn.Module, packed: Batch, padded: Batch, last_only: bool) -> float:
    ours, usual = BatchLoss(lm, [packed])(lm.stored_view()).item(), usual_loss(theirs, padded, last_only).item()
    if abs(ours - usual) > 1e-4:
        raise SystemExit(f"the two do not compute the same loss: {ours} and {usual}")
    return ours


def timed(step: Callable[[int, Clock], None], repeat: int) -> dict[str, float]:
    """Seconds of each phase of one step, and in total."""
    clock = Clock()
    step(repeat, clock)
    return clock.seconds | {"total": sum(clock.seconds.values())}


@torch.no_grad()
def compare(model: str, data_dir: str, batch_size: int, repeats: int, last_only: bool, sparse: bool) -> dict:
    logging.disable_progress_bar()
    lm = load(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    packed, padded = (real_batch(lm, model, data_dir, batch_size, pack) for pack in (True, False))
    loss = check_same_loss(lm, theirs, packed, padded, last_only)
    ways = {"ours": partial(our_step, lm, packed, sparse), "usual": partial(usual_step, theirs, padded, last_only)}
    times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, step in ways.items():
            times[way].append(timed(step, repeat))
    medians = {
        way: {phase: round(median(row[phase] for row in rows[1:]), 4) for phase in rows[0]}  # the first warms up
        for way, rows in times.items()
    }
    return {
        **medians,
        "ratio": round(medians["ours"]["total"] / medians["usual"]["total"], 3),
        "tokens": [list(packed.tokens.shape), list(padded.tokens.shape)], "loss": round(loss, 4), "repeats": repeats,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, data = os.environ.get("QUZO_MODELS"), os.environ.get("QUZO_DATA")
    model = f"{models}/zollama-28m" if models else None
    parser.add_argument("--model", default=model, required=not model, help="a causal model's directory")
    parser.add_argument("--data-dir", default=data, required=not data, help="holds k-shot/SST-2/16-42/train.tsv")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--last-only", action="store_true", help="spare the usual way all logits but the last ones")
    parser.add_argument("--sparse", action="store_true", help="ours with sparse directions, which are not MeZO's")
    result = compare(**vars(parser.parse_args()))
    print(f"{'median seconds a step':24}{'total':>8}  phases")
    for way in ("ours", "usual"):
        phases = ", ".join(f"{phase} {s:.3f}" for phase, s in result[way].items() if phase != "total")
        print(f"{way:24}{result[way]['total']:8.3f}  {phases}")
    print(f"ratio {result['ratio']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
