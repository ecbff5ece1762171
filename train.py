"""Fine-tune a language model with forward passes only.  `python train.py` trains the embedded model.

The command line is the dataclass Config; a flag that is not given takes its method's default from DEFAULTS.
Progress goes to standard error, one JSON object to standard output, everything else into the run folder.
Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import signal
import sys
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.hub import PRESETS, check_known, resolve
from data.scoring import Encoded, Encoder, collate, evaluate, losses
from data.tasks import TASKS, Splits, get_task, load_splits
from data.tokenizer import Tokenizer
from model import LanguageModel, load, read_config
from quant import FORMATS, permutation
from run_folder import RunFolder, check_free
from zo_optim import ZO, estimate, learning_rate, update

# ---------------------------------------------------------------- the command line

DIRECTION_BITS = ("full", *map(str, range(2, 9)))


def flag(default, help: str, choices: tuple[str, ...] = ()):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Every flag.  None means: from DEFAULTS, by model and method."""

    model: str = flag("tiny", f"a checkpoint directory, or one of {', '.join(PRESETS)}")
    method: str = flag("quzo", "quzo: low-bit directions and weights; mezo: Gaussian directions", ("quzo", "mezo"))
    task: str | None = flag(None, "what to learn", tuple(TASKS))
    data_dir: str = flag("data", "folder of the official files: SST-2/train.tsv, k-shot/SST-2/512-42/train.tsv, ...")
    k: int = flag(0, "examples a class, from the k-shot files; 0: num-train examples of the full files")
    data_seed: int | None = flag(None, "which k-shot split, or the seed of the draw")
    num_train: int = flag(1000, "training examples where k is 0")
    num_dev: int = flag(500, "dev examples where k is 0")
    num_eval: int = flag(1000, "test examples at most")
    weights: str | None = flag(None, "how matrices are stored", FORMATS)
    direction_bits: str | None = flag(None, "bits of a direction's codes; full: Gaussian", DIRECTION_BITS)
    compute: str = flag("auto", "what matrices are multiplied in; auto: bf16 on cuda unless weights are fp32",
                        ("auto", "fp32", "bf16"))  # fmt: skip
    steps: int | None = flag(None, "updates")
    lr: float | None = flag(None, "learning rate")
    lr_schedule: str | None = flag(None, "constant, or linear down to 0", ("constant", "linear"))
    eps: float | None = flag(None, "size of a probe, in weight units")
    queries: int = flag(1, "directions a step, averaged")
    batch_size: int | None = flag(None, "examples a step")
    micro_batch_size: int | None = flag(None, "examples a forward, to bound memory; changes losses by rounding only")
    max_length: int = flag(2048, "longest sequence in tokens; the model's own limit also holds")
    seed: int = flag(0, "of directions, roundings and data order")
    eval_every: int | None = flag(None, "steps between dev evaluations")
    device: str = flag("auto", "cpu, cuda, or auto")
    out: str | None = flag(None, "run folder; must be new or empty")


# MeZO: its paper's OPT recipe.  QuZO: its released Llama-2-7B full-parameter SST-2 script.  Tiny: tuned on dev.
DEFAULTS = {
    "mezo": dict(weights="bf16", direction_bits="full", steps=20000, lr=1e-6, lr_schedule="constant", eps=1e-3,
                 batch_size=16, eval_every=4000),
    "quzo": dict(weights="int8", direction_bits="4", steps=6000, lr=1e-6, lr_schedule="linear", eps=1e-3,
                 batch_size=16, eval_every=1000),
}  # fmt: skip
TINY_DEFAULTS = {
    "mezo": dict(weights="fp32", steps=400, lr=1e-4, eval_every=25, batch_size=32),
    "quzo": dict(steps=400, lr=1e-4, eval_every=25, batch_size=32),
}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse(argv: list[str]) -> Config:
    parser = OneLineParser(prog="train.py", description=__doc__, allow_abbrev=False)
    kinds = {"int": int, "float": float, "str": str}
    for f in dataclasses.fields(Config):
        kind = kinds[f.type.removesuffix(" | None")]
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, **f.metadata)
    return resolve_defaults(Config(**vars(parser.parse_args(argv))))


def resolve_defaults(c: Config) -> Config:
    """Fill what was not given; everything that the run depends on is then in the config."""
    table = DEFAULTS[c.method] | (TINY_DEFAULTS[c.method] if c.model == "tiny" else {})
    k_shot = 42 if c.k else 0  # the published splits' seeds are 13, 21, 42, 87 and 100
    table = table | dict(task="tiny" if c.model == "tiny" else "sst2", data_seed=k_shot)
    table["device"] = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    c = dataclasses.replace(c, **{n: v for n, v in table.items() if getattr(c, n) in (None, "auto")})
    bf16 = c.device.startswith("cuda") and c.weights != "fp32"
    stamp = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{c.task}-{Path(c.model).name}-{c.method}"
    return dataclasses.replace(
        c,
        compute=("bf16" if bf16 else "fp32") if c.compute == "auto" else c.compute,
        micro_batch_size=c.micro_batch_size or c.batch_size,
        out=c.out or stamp,
    )


def validate(c: Config) -> None:
    """Ranges and combinations; what files hold is checked where it is read."""
    check_known(c.model)
    counts = ("steps", "queries", "batch_size", "micro_batch_size", "eval_every", "num_train", "num_dev", "num_eval")
    ranges = {name: (1, math.inf) for name in counts} | {
        "lr": (0, sys.float_info.max),
        "eps": (sys.float_info.min, sys.float_info.max),
        "k": (0, math.inf),
        "seed": (0, 2**64 - 1),
        "data_seed": (0, 2**32 - 1),
        "max_length": (16, math.inf),
    }
    for name, (low, high) in ranges.items():
        if not low <= getattr(c, name) <= high:  # NaN fails too
            raise ValueError(f"--{name.replace('_', '-')} must be in [{low}, {high}], got {getattr(c, name)}")
    if c.method == "mezo" and (c.direction_bits != "full" or c.weights not in ("fp32", "bf16")):
        raise ValueError(
            "--method mezo means Gaussian directions on fp32 or bf16 weights; use quzo for others, got "
            f"--direction-bits {c.direction_bits} --weights {c.weights}"
        )
    if c.device != "cpu" and not c.device.startswith("cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {c.device!r}")
    if c.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {c.device}: this machine or this build of torch has no CUDA")


# ---------------------------------------------------------------- the loop


@dataclass
class Problem:
    """A model and a task, encoded: all that the loop needs."""

    lm: LanguageModel
    train: list[Encoded]
    dev: list[Encoded]
    test: list[Encoded]
    pad: int


def prepare(c: Config) -> tuple[Problem, Splits]:
    """Read everything.  The weights come last: what is wrong elsewhere is then found before gigabytes are read."""
    task = get_task(c.task)
    splits = load_splits(task, c.data_dir, c.k, c.data_seed, c.num_train, c.num_dev, c.num_eval)
    directory = resolve(c.model)
    config, _ = read_config(directory)
    encode = Encoder(Tokenizer(directory), task, config, c.max_length)
    train, dev, test = ([encode(example) for example in split] for split in splits[:3])
    return Problem(load_weights(c, directory), train, dev, test, config.pad_token_id or 0), splits


def load_weights(c: Config, directory: Path) -> LanguageModel:
    return load(directory, c.device, torch.bfloat16 if c.compute == "bf16" else torch.float32, c.weights)


_order = lru_cache(maxsize=2)(permutation)  # a batch may span two epochs


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """Examples of step `step` (from 0): one endless stream of keyed permutations, cut every batch_size."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(seed, p // n, n)[p % n]) for p in positions]


def loss_of(problem: Problem, examples: list[Encoded], micro_batch_size: int, view) -> Tensor:
    """Mean loss of each probe over the examples, in forwards of at most micro_batch_size: -> [P]."""
    chunks = [examples[i : i + micro_batch_size] for i in range(0, len(examples), micro_batch_size)]
    batches = [collate(chunk, problem.pad, problem.lm.device) for chunk in chunks]
    return sum(losses(problem.lm, batch, view) * (len(batch.labels) / len(examples)) for batch in batches)


class Stop:
    """Ctrl-C and SIGTERM end the loop after the step at hand, whose record is then whole; twice, at once."""

    def __init__(self):
        self.wanted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


def train(c: Config, problem: Problem, folder: RunFolder, stop: Stop) -> dict:
    """Run the loop.  Returns what it can say: steps done, and dev quality and step of the best weights.

    Best means lowest dev loss, as in MeZO: a finer measure than accuracy, which moves in steps of one example.
    """
    lm, zo = problem.lm, ZO(c.eps, c.queries, None if c.direction_bits == "full" else int(c.direction_bits))
    elements = sum(math.prod(stored.shape) for stored in lm.store.values())
    best = {"dev": None, "dev_loss": math.inf, "best_step": 0, "steps": 0}
    bar = tqdm(range(c.steps), unit="step", file=sys.stderr, dynamic_ncols=True)
    for step in bar:
        examples = [problem.train[i] for i in batch_indices(c.seed, step, c.batch_size, len(problem.train))]
        loss_fn = partial(loss_of, problem, examples, c.micro_batch_size)
        queries = estimate(lm.store, loss_fn, c.seed, step, zo, lm.dtype)
        slopes = [query.slope for query in queries]
        if not all(map(math.isfinite, slopes)):
            raise ValueError(f"the loss is not finite at step {step + 1}: try a smaller --lr than {c.lr}")
        lr = learning_rate(c.lr, c.lr_schedule, step, c.steps)
        changed, clipped = update(lm.store, slopes, c.seed, step, zo, lr).tolist()
        loss = sum(query.plus + query.minus for query in queries) / (2 * len(queries))
        folder.step(step + 1, slopes, loss, {
            "plus": [query.plus for query in queries], "minus": [query.minus for query in queries], "lr": lr,
            "queries": len(queries), "tokens": sum(len(s) for e in examples for s in e.sequences),
            "changed": changed / elements / len(queries), "clipped": clipped / elements / len(queries),
        })  # fmt: skip
        best["steps"] = step + 1
        if (step + 1) % c.eval_every == 0 or step + 1 == c.steps:
            dev = evaluate(lm, problem.dev, problem.pad)
            folder.dev(step + 1, dev.accuracy, dev.loss, peak_memory(c.device))
            if dev.loss < best["dev_loss"]:
                best |= {"dev": dev.accuracy, "dev_loss": dev.loss, "best_step": step + 1}
                lm.save_stored(folder.model)
        bar.set_postfix(loss=f"{loss:.3f}", dev="-" if best["dev"] is None else f"{folder.devs[-1][1]:.1%}")
        if stop.wanted:
            break
    if best["dev"] is None:
        lm.save_stored(folder.model)
        best["best_step"] = best["steps"]
    return best


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on cuda, of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(c: Config) -> dict:
    """One training run from flags to result."""
    validate(c)
    check_free(Path(c.out))
    problem, splits = prepare(c)
    folder = RunFolder(Path(c.out))
    folder.write_config(dataclasses.asdict(c), problem.lm.sha256(), splits.files)
    stop = Stop()
    tqdm.write(f"{c.model}, {c.task}, {c.method} on {c.weights} weights, {c.device}; run folder {c.out}", sys.stderr)
    zero_shot = evaluate(problem.lm, problem.test, problem.pad).accuracy
    tqdm.write(f"zero-shot test accuracy {zero_shot:.1%}", sys.stderr)
    started = time.perf_counter()
    best = train(c, problem, folder, stop)
    seconds = time.perf_counter() - started
    problem.lm = None  # the best weights take its place
    lm = load_weights(c, folder.model)
    result = {
        "model": c.model, "task": c.task, "method": c.method, "weights": c.weights,
        "steps": best["steps"], "forwards": 2 * c.queries * best["steps"],
        "trainable_parameters": sum(math.prod(stored.shape) for stored in lm.store.values()),
        "zero_shot": zero_shot, "dev": best["dev"], "dev_loss": best["dev_loss"] if best["dev"] is not None else None,
        "best_step": best["best_step"],
        "test": None if stop.wanted else evaluate(lm, problem.test, problem.pad).accuracy,
        "interrupted": stop.wanted,
        "seconds": round(seconds, 1), "peak_memory_bytes": peak_memory(c.device), "weights_sha256": lm.sha256(),
        "out": c.out,
    }  # fmt: skip
    folder.result(result)
    return result


def main(argv: list[str]) -> int:
    try:
        result = run(parse(argv))
    except ValueError as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 130 if result["interrupted"] else 0  # 128 + SIGINT, as shells count it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
