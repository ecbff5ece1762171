"""Pre-train a small checkpoint from scratch on public text, in the shape of another one, by back-propagation.

    python -m benchmarks.pretrain --like DIR --text FILE --out NEW

Only config.json, the tokenizer's files and the defaults in pretraining.json are taken from DIR, not its weights.  FILE
holds UTF-8 documents separated by NUL, as it is or as .xz.  LLaMA learns the next token; RoBERTa learns masked tokens
(15 %: 80 % of them <mask>, 10 % a random token, 10 % unchanged; Devlin et al. 2019, section 3.1).  Documents are laid
end to end, `<s> text` for LLaMA and `<s> text </s>` for RoBERTa, and cut into rows; whole documents are held out first.

Progress goes to standard error, one JSON object to standard output; the record is in NEW/pretraining.json.
Everything is keyed by --seed: on a CPU the same command gives the same weights to the bit.

Shape key: B rows, T tokens, M targets, D hidden.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.scoring import MASK
from data.tokenizer import Tokenizer
from model import LanguageModel, create, load
from quant import encode
from runtime.checkpoints import companion_files, weights_sha256
from runtime.config import best_device
from runtime.first_order import make_trainable, optimizer
from runtime.flags import OneLineParser
from runtime.model_configs import read_config
from runtime.run_folder import check_free, git_commit, versions
from train import batch_indices, parameters, peak_memory

# ---------------------------------------------------------------- documents


def read_documents(path: Path) -> tuple[list[str], str]:
    """The documents of a file, without empty ones, and the sha256 of the text (uncompressed)."""
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            raw = file.read()
        documents = [document.decode() for document in raw.split(b"\0")]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {path}: {error}") from None
    return [document for document in documents if document.strip()], hashlib.sha256(raw).hexdigest()


def hold_out(documents: list[str], amount: float, seed: int) -> tuple[list[str], list[str]]:
    """(to train on, held out): amount is a share below 1, or a number of documents.

    A keyed hash of the text decides, so that a document which is there twice is on one side only.
    """
    ranks = [hashlib.blake2b(f"{seed} {document}".encode(), digest_size=8).digest() for document in documents]
    distinct = sorted(set(ranks))
    count = round(amount * len(distinct)) if amount < 1 else int(amount)
    if not 0 < count < len(distinct) or (amount >= 1 and count != amount):
        message = f"a share below 1 or a whole number that leaves some of the {len(distinct)} documents on either side"
        raise ValueError(f"--held-out must be {message}, got {amount:g}")
    sides = [], []
    for document, rank in zip(documents, ranks, strict=True):
        sides[rank < distinct[count]].append(document)
    return sides


# ---------------------------------------------------------------- tokens

DOCUMENTS_A_JOB = 1000
MAX_PROCESSES = 16  # each imports torch: 0.3 GB, and some seconds


class Ends(NamedTuple):
    """Tokens that are put around every document."""

    begin: tuple[int, ...]
    end: tuple[int, ...]


_tokenizer = lru_cache(maxsize=1)(Tokenizer)  # a process reads the file once


def encode_documents(directory: Path, ends: Ends, vocabulary: int, documents: list[str]) -> np.ndarray:
    """Tokens of the documents end to end, [n] uint16, or int32 where the vocabulary needs it."""
    ids = [token for text in documents for token in (*ends.begin, *_tokenizer(directory).encode(text), *ends.end)]
    if max(ids) >= vocabulary:
        raise ValueError(f"the tokenizer in {directory} gave {max(ids)}; config.json has a vocabulary of {vocabulary}")
    return np.array(ids, np.uint16 if vocabulary <= 2**16 else np.int32)


def encode_sides(
    directory: Path, ends: Ends, vocabulary: int, sides: tuple[list[str], ...], processes: int
) -> list[np.ndarray]:
    """The tokens of several lists of documents, in parallel processes where there is more than one job."""
    starts = [range(0, len(side), DOCUMENTS_A_JOB) for side in sides]
    jobs = [[side[i : i + DOCUMENTS_A_JOB] for i in at] for side, at in zip(sides, starts, strict=True)]
    work, processes = partial(encode_documents, directory, ends, vocabulary), min(processes, max(map(len, jobs)))
    if processes == 1:
        return [np.concatenate([work(job) for job in side]) for side in jobs]
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, spawn) as pool:
        return [np.concatenate(list(pool.map(work, side))) for side in jobs]


class Stream:
    """Tokens end to end, cut into rows of `length`: row i is inputs [i T, i T + T), the last one padded on the right.

    next_token: a row's last target is the next row's first token, so every token but the very first is a target.
    """

    def __init__(self, tokens: np.ndarray, length: int, next_token: bool):
        self.tokens, self.length, self.next_token = tokens, length, next_token

    def __len__(self) -> int:
        return -(-(len(self.tokens) - self.next_token) // self.length)

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """index [B] -> tokens [B, T + 1] int64 and which of them are real, both with one token beyond the row."""
        at = index[:, None] * self.length + np.arange(self.length + 1)
        real = at < len(self.tokens)
        return self.tokens[np.where(real, at, 0)].astype(np.int64), real


# ---------------------------------------------------------------- the objective


class Batch(NamedTuple):
    """One step's rows and targets, on the model's device."""

    tokens: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] 1 = real
    at: Tensor  # [M] positions in the flattened batch that are read
    targets: Tensor  # [M]


@dataclass(frozen=True)
class Masking:
    mask: int
    vocabulary: int
    special: tuple[int, ...]  # never chosen

    def __call__(self, tokens: np.ndarray, real: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """tokens, real [B, T] -> what the model sees, and which tokens are to be predicted."""
        draw = rng.random(tokens.shape)
        chosen = (draw < 0.15) & real & ~np.isin(tokens, self.special)
        seen = np.where(chosen & (draw < 0.12), self.mask, tokens)  # 80 % of 15 %
        random = rng.integers(self.vocabulary, size=tokens.shape)
        return np.where(chosen & (draw >= 0.12) & (draw < 0.135), random, seen), chosen  # 10 %; the rest unchanged


def masking_of(config, tokenizer: Tokenizer) -> Masking | None:
    """None for a model that reads left to right."""
    if not config.masked:
        return None
    mask = tokenizer.id_of(MASK)
    special = (config.bos_token_id, config.eos_token_id, config.pad_token_id, mask)
    return Masking(mask, config.vocab_size, special)


def keyed(*key: object) -> np.random.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def make_batch(stream: Stream, index: np.ndarray, masking: Masking | None, key: tuple, device: str) -> Batch:
    """Rows of a stream and their targets; key names the masking's draws."""
    ids, real = stream.rows(index)
    tokens, mask = ids[:, :-1], real[:, :-1]
    if masking is None:
        read, targets = real[:, 1:], ids[:, 1:]
    else:
        targets = tokens
        tokens, read = masking(tokens, mask, keyed(*key))
    parts = tokens, mask.astype(np.int64), np.flatnonzero(read), targets[read]
    return Batch(*(torch.from_numpy(part).to(device) for part in parts))


def nats(lm: LanguageModel, hidden: Tensor, at: Tensor, targets: Tensor) -> Tensor:
    """Hidden states [1, B, T, D] -> the sum of -log p over the M targets, one number."""
    read = hidden.flatten(1, 2).index_select(1, at)
    return F.cross_entropy(lm.score(read, lm.stored_view())[0], targets, reduction="sum")


EVAL_ROWS = 32


@torch.no_grad()
def held_out_loss(lm: LanguageModel, stream: Stream, masking: Masking | None, seed: int) -> float:
    """Mean nats a target over all rows.  A row's masking is the same at every evaluation."""
    total, count = 0.0, 0
    for start in range(0, len(stream), EVAL_ROWS):
        index = np.arange(start, min(start + EVAL_ROWS, len(stream)))
        batch = make_batch(stream, index, masking, (seed, "held out", start), str(lm.device))
        hidden = lm.hidden(batch.tokens, batch.mask, lm.stored_view())
        total += nats(lm, hidden, batch.at, batch.targets).item()
        count += len(batch.targets)
    if not count:
        raise ValueError("no token of the held-out text was chosen as a target: hold out more")
    return total / count


# ---------------------------------------------------------------- training

BETAS = (0.9, 0.95)  # as LLaMA was trained; 0.999 would remember gradients for a quarter of a run this short
CLIP = 1.0
LOG_EVERY = 100


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear up to the peak, then linear down to 0.  As zo_optim's, which rounds otherwise in the last bit: the weights
    that the README gives a hash of were made with this one."""
    return peak * min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


def fit(args: argparse.Namespace, lm: LanguageModel, stream: Stream, masking: Masking | None) -> float:
    """Train in place -> the mean loss of the last steps, LOG_EVERY of them."""
    lm.weights = make_trainable(lm.weights, None, torch.float32)
    weights = [stored.value for stored in lm.weights.values()]
    adamw = optimizer(lm.weights, args.lr, args.weight_decay)
    for group in adamw.param_groups:
        group["betas"] = BETAS
    loss_of = nats
    if args.compile:
        lm.block.compile()  # one graph serves all layers: the weights are inputs
        loss_of = torch.compile(nats)
    started, recent = time.perf_counter(), []
    for step in range(args.steps):
        index = np.array(batch_indices(args.seed, step, args.batch_size, len(stream)))
        batch = make_batch(stream, index, masking, (args.seed, "training", step), args.device)
        with autocast(args):
            hidden = lm.hidden(batch.tokens, batch.mask, lm.stored_view())
            loss = loss_of(lm, hidden, batch.at, batch.targets) / max(1, len(batch.targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, args.lr, args.warmup, args.steps)
        adamw.step()
        adamw.zero_grad()
        recent = [*recent, loss.detach()][-LOG_EVERY:]
        if (step + 1) % LOG_EVERY == 0 or step in (0, args.steps - 1):
            mean = torch.stack(recent).mean().item()
            if not math.isfinite(mean):
                raise ValueError(f"the loss is not finite at step {step + 1}: try a smaller --lr than {args.lr}")
            seconds = (time.perf_counter() - started) / (step + 1)
            log(f"step {step + 1}/{args.steps} loss {mean:.4f}, {seconds:.3f} s each")
    return mean


def autocast(args: argparse.Namespace):
    """bf16 matrix products, everything else and all sums of gradients in fp32.

    StoredWeights in bf16 would also sum a frequent word's thousands of embedding gradients in bf16, which loses most.
    """
    return torch.autocast(args.device, torch.bfloat16, enabled=args.compute == "bf16")


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the command line

RECORDED = {"batch_size": ("batch", int), "length": ("seq", int), "lr": ("lr", float), "steps": ("steps", int)}
LEAST = {
    "batch_size": 1, "length": 2, "steps": 1, "epochs": 1e-6, "lr": 0, "warmup": 0, "weight_decay": 0, "seed": 0,
    "held_out": 0,
}  # fmt: skip
WARMUP = 20  # one step in 20 is warm-up: 5 %, as in RoBERTa's paper (24,000 of 500,000)


def parse(argv: list[str]) -> argparse.Namespace:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("pretrain.py", description=__doc__, formatter_class=as_it_is, allow_abbrev=False)
    recorded = "[as recorded in DIR/pretraining.json]"
    parser.add_argument("--like", required=True, type=Path, help="a checkpoint directory: config.json and tokenizer")
    parser.add_argument("--text", required=True, type=Path, help="NUL-separated UTF-8 documents, or the same as .xz")
    parser.add_argument("--out", required=True, type=Path, help="model directory; must be new or empty")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, help=f"rows a step {recorded}")
    parser.add_argument("--length", type=int, help=f"tokens a row {recorded}")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--steps", type=int, help=recorded)
    amount.add_argument("--epochs", type=float, help="passes over the text, instead of --steps")
    parser.add_argument("--lr", type=float, help=f"the peak {recorded}")
    parser.add_argument("--warmup", type=int, help=f"steps up to the peak [steps / {WARMUP}]")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices [0.1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the documents, or their number [0.01]")
    parser.add_argument("--compute", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 on cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    parser.add_argument("--save", default="fp32", choices=("fp32", "bf16"), help="what weights are written in [fp32]")
    return parser.parse_args(argv)


def read_record(directory: Path) -> dict:
    path = directory / "pretraining.json"
    try:
        record = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold an object, got {type(record).__name__}")
    return record


def resolve(args: argparse.Namespace) -> None:
    """Fill what was not given and check ranges; --steps and --warmup may wait for the number of rows."""
    record = read_record(args.like)
    for name, (key, kind) in RECORDED.items():
        if getattr(args, name) is None and not (name == "steps" and args.epochs):
            if type(record.get(key)) is not kind:
                where = args.like / "pretraining.json"
                raise ValueError(f"{where} has no {key!r} of type {kind.__name__}: give --{name.replace('_', '-')}")
            setattr(args, name, record[key])
    if args.device == "auto":
        args.device = best_device()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    if args.compute == "auto":
        args.compute = "bf16" if args.device == "cuda" else "fp32"
    for name, low in LEAST.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2**31:  # NaN fails too
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low} and below 2^31, got {value}")


def schedule(args: argparse.Namespace, rows: int) -> None:
    """Fill --steps and --warmup, which depend on the amount of text."""
    if args.steps is None:
        args.steps = math.ceil(args.epochs * rows / args.batch_size)
    if args.warmup is None:
        args.warmup = args.steps // WARMUP
    if args.warmup >= args.steps:
        raise ValueError(f"--warmup {args.warmup} must end before the last of {args.steps} steps")


def streams(args: argparse.Namespace, config, sides: tuple[list[str], ...]) -> list[Stream]:
    ends = Ends((config.bos_token_id,), (config.eos_token_id,) if config.masked else ())
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    tokens = encode_sides(args.like, ends, config.vocab_size, sides, processes)
    return [Stream(side, args.length, next_token=not config.masked) for side in tokens]


def save(args: argparse.Namespace, lm: LanguageModel) -> LanguageModel:
    """Write the directory -> the model read back from it, in fp32: its hash and loss are those of the files."""
    lm.weights = {name: encode(stored.value.detach(), args.save) for name, stored in lm.weights.items()}
    lm.format, lm.other_files = args.save, companion_files(args.like)
    lm.save(args.out)
    return load(args.out, args.device)


def pretrain(args: argparse.Namespace) -> dict:
    """From flags to a saved model -> the printed record."""
    started = time.perf_counter()
    resolve(args)
    check_free(args.out)
    config, raw = read_config(args.like)
    if args.length > config.longest:
        raise ValueError(f"--length {args.length} is over the model's {config.longest} positions")
    masking = masking_of(config, Tokenizer(args.like))
    documents, text_sha256 = read_documents(args.text)
    sides = hold_out(documents, args.held_out, args.seed)
    train, held_out = streams(args, config, sides)
    schedule(args, len(train))
    lm = create(raw, args.seed, args.device)
    training = time.perf_counter()
    log(
        f"{parameters(lm.weights):,} parameters; {len(train.tokens):,} tokens of {len(sides[0]):,} documents to learn, "
        f"{len(held_out.tokens):,} of {len(sides[1]):,} held out; read in {training - started:.1f} s"
    )
    train_loss = fit(args, lm, train, masking)
    training_seconds = time.perf_counter() - training
    lm = save(args, lm)
    loss = held_out_loss(lm, held_out, masking, args.seed)
    record = {
        "kind": raw["model_type"], "steps": args.steps, "tokens": args.steps * args.batch_size * args.length,
        "held_out_loss": loss, "train_loss": train_loss, "lr": args.lr, "batch": args.batch_size, "seq": args.length,
        "text": args.text.name, "text_sha256": text_sha256, "weights_sha256": weights_sha256(lm.weights),
        "parameters": parameters(lm.weights), "train_documents": len(sides[0]), "train_tokens": len(train.tokens),
        "held_out_documents": len(sides[1]), "held_out_tokens": len(held_out.tokens),
        "peak_memory_bytes": peak_memory(args.device), "training_seconds": round(training_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    whole = record | {"flags": flags, "versions": versions(), "git_commit": git_commit()}
    (args.out / "pretraining.json").write_text(json.dumps(whole, indent=1) + "\n")
    return record | {"out": str(args.out)}


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for bad input, 1 for a machine that gave out."""
    try:
        print(json.dumps(pretrain(parse(argv))))
    except ValueError as error:
        log(f"pretrain.py: {' '.join(str(error).split())}")
        return 2
    except torch.OutOfMemoryError as error:
        log(f"pretrain.py: out of GPU memory; try a smaller --batch-size: {' '.join(str(error).split())}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
