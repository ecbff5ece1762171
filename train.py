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
import re
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
from data.scoring import Encoded, Encoder, Quality, collate, evaluate, losses
from data.tasks import TASKS, Splits, get_task, load_splits
from data.tokenizer import Tokenizer
from model import LanguageModel, load, read_config
from quant import ACTIVATIONS, FORMATS, RESIDUALS, check_format
from random_bits import permutation
from run_folder import RunFolder, check_free
from zo_optim import ZO, estimate, learning_rate, update

# ---------------------------------------------------------------- the command line

DIRECTION_BITS = ("full", "grid", *map(str, range(2, 9)))


def flag(default, help: str, choices: tuple = ()):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices or None})


@dataclass(frozen=True)
class Config:
    """Every flag.  None: from DEFAULTS where it has an entry for the method, else it does not apply."""

    model: str = flag("tiny", f"a checkpoint directory, or one of {', '.join(PRESETS)}")
    method: str = flag("quzo", "quzo: low-bit directions and weights; mezo: Gaussian directions", ("quzo", "mezo"))
    task: str | None = flag(None, "what to learn; tiny for the tiny model, else sst2", tuple(TASKS))
    data_dir: str | None = flag(None, "folder of the official files, SST-2/train.tsv and so on")
    k: int | None = flag(None, "examples a class, from the k-shot files, k-shot/SST-2/512-42/train.tsv and so on")
    data_seed: int | None = flag(None, "which k-shot split, or the seed of the draw from the full files")
    num_train: int | None = flag(None, "training examples drawn from the full files")
    num_dev: int | None = flag(None, "dev examples drawn from the full files")
    num_eval: int = flag(1000, "test examples at most")
    weights: str | None = flag(None, "how matrices are stored", FORMATS)
    residual: int = flag(0, "extra bits a weight that steps land on and forwards do not read; int8 and int4", RESIDUALS)
    activations: str = flag("none", "how the input of every linear layer is rounded, one scale a token", ACTIVATIONS)
    direction_bits: str | None = flag(None, "bits of a direction's codes; full: Gaussian; grid: drawn on the weights' "
                                            "own grid", DIRECTION_BITS)  # fmt: skip
    estimator: str = flag("q-rge2", "q-rge2: probe and step round the direction apart; q-rge1: once; random: a control "
                                    "that turns slopes over by coin", ("q-rge2", "q-rge1", "random"))  # fmt: skip
    probe: str = flag("float", "float: w + eps u; codes: that, landed on the weights' grid", ("float", "codes"))
    rounding: str = flag("stochastic", "how a step lands; nearest is there to show why it fails",
                         ("stochastic", "nearest"))  # fmt: skip
    oracle: bool = flag(False, "keep integer codes as fake-quantised fp32: slower, to the same bits")
    compute: str = flag("auto", "what matrices are multiplied in; auto: bf16 on cuda unless weights are fp32",
                        ("auto", "fp32", "bf16"))  # fmt: skip
    steps: int | None = flag(None, "updates")
    lr: float | None = flag(None, "learning rate")
    lr_schedule: str | None = flag(None, "constant, or linear down to 0", ("constant", "linear"))
    eps: float | None = flag(None, "size of a probe, in weight units")
    queries: int = flag(1, "directions a step, averaged")
    batch_size: int | None = flag(None, "examples a step")
    micro_batch_size: int | None = flag(None, "examples a forward, to bound memory (batch-size); the losses change by "
                                              "rounding only")  # fmt: skip
    max_length: int = flag(2048, "longest sequence in tokens; the model's own limit also holds")
    seed: int = flag(0, "of directions, roundings and data order")
    eval_every: int | None = flag(None, "steps between dev evaluations")
    device: str = flag("auto", "cpu, cuda, cuda:N, or auto")
    out: str | None = flag(None, "run folder; must be new or empty (runs/DATE-TIME-...)")


# MeZO: its paper's OPT recipe.  QuZO: its released Llama-2-7B full-parameter SST-2 script, which is for int4; int8
# weights and the evaluation interval are ours.  Tiny: ours, tuned on dev.
DEFAULTS = {
    "mezo": dict(weights="bf16", direction_bits="full", steps=20000, lr=1e-6, lr_schedule="constant", eps=1e-3,
                 batch_size=16, eval_every=4000),
    "quzo": dict(weights="int8", direction_bits="4", steps=6000, lr=1e-6, lr_schedule="linear", eps=1e-3,
                 batch_size=16, eval_every=1000),
}  # fmt: skip
TINY_DEFAULTS = {
    "mezo": dict(weights="fp32", steps=500, lr=3e-4, eval_every=25, batch_size=32),
    "quzo": dict(steps=500, lr=6e-4, eval_every=25, batch_size=32),
}

FILE_DEFAULTS = {  # of tasks that are read from files: which few-shot split, or how MeZO draws from the full ones
    "k-shot files": dict(data_dir="datasets", data_seed=42),
    "full files": dict(data_dir="datasets", data_seed=0, num_train=1000, num_dev=500),
}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse(argv: list[str]) -> Config:
    parser = OneLineParser(prog="train.py", description=__doc__, allow_abbrev=False)
    kinds = {"int": int, "float": float, "str": str}
    for f in dataclasses.fields(Config):
        told = f.metadata["help"] + told_defaults(f)
        if f.type == "bool":  # type=bool would read "False" as True
            options = {"action": argparse.BooleanOptionalAction, "help": told}
        else:
            options = dict(f.metadata) | {"type": kinds[f.type.removesuffix(" | None")], "help": told}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **options)
    return resolve_defaults(Config(**vars(parser.parse_args(argv))))


def told_defaults(f: dataclasses.Field) -> str:
    """A flag's default for --help: its own, or one by method or by files; in brackets the embedded model's."""
    name = f.name
    if f.default is not None:
        return f" [{f.default}]"
    tiny = {case: f" ({table[name]})" for case, table in TINY_DEFAULTS.items() if name in table}
    tables = DEFAULTS | FILE_DEFAULTS
    told = [f"{case} {table[name]}{tiny.get(case, '')}" for case, table in tables.items() if name in table]
    return f" [{', '.join(told)}]" if told else ""


def resolve_defaults(c: Config) -> Config:
    """Fill what was not given.  Everything that the run depends on is then in the config; the rest stays None."""
    table = DEFAULTS[c.method] | (TINY_DEFAULTS[c.method] if c.model == "tiny" else {})
    table["task"] = c.task or ("tiny" if c.model == "tiny" else "sst2")
    if not get_task(table["task"]).embedded:
        table |= FILE_DEFAULTS["k-shot files" if c.k else "full files"]
    table["device"] = ("cuda" if torch.cuda.is_available() else "cpu") if c.device == "auto" else c.device
    table["out"] = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{table['task']}-{Path(c.model).name}-{c.method}"
    c = dataclasses.replace(c, **{n: v for n, v in table.items() if getattr(c, n) in (None, "auto")})
    bf16 = c.device.startswith("cuda") and c.weights != "fp32"
    return dataclasses.replace(
        c,
        compute=("bf16" if bf16 else "fp32") if c.compute == "auto" else c.compute,
        micro_batch_size=c.batch_size if c.micro_batch_size is None else c.micro_batch_size,
    )


COUNT = (1, 2**31 - 1)
RANGES = {
    "steps": COUNT, "batch_size": COUNT, "micro_batch_size": COUNT, "eval_every": COUNT, "num_train": COUNT,
    "num_dev": COUNT, "num_eval": COUNT, "k": COUNT, "max_length": COUNT, "queries": (1, 2**28 - 1),
    "lr": (0, 1e6), "eps": (1e-8, 1e3), "seed": (0, 2**64 - 1), "data_seed": (0, 2**32 - 1),
}  # fmt: skip


def validate(c: Config) -> None:
    """Ranges and combinations; what files hold is checked where it is read."""
    check_known(c.model)
    for name, (low, high) in RANGES.items():
        value = getattr(c, name)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise ValueError(f"--{name.replace('_', '-')} must be in [{low}, {high}], got {value}")
    embedded = get_task(c.task).embedded
    drawn = ("num_train", "num_dev")
    for name in ("data_dir", "k", "data_seed", *drawn) if embedded else drawn if c.k else ():
        if getattr(c, name) is not None:
            beside = f"task {c.task}, which has its own files" if embedded else "--k, whose files are read whole"
            raise ValueError(f"--{name.replace('_', '-')} means nothing beside {beside}")
    if c.method == "mezo" and (c.direction_bits != "full" or c.weights not in ("fp32", "bf16")):
        raise ValueError(
            "--method mezo means Gaussian directions on fp32 or bf16 weights; use quzo for others, got "
            f"--direction-bits {c.direction_bits} --weights {c.weights}"
        )
    check_format(c.weights, c.residual, c.oracle)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", c.device):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {c.device!r}")
    if c.device != "cpu" and int(c.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {c.device}: torch sees {torch.cuda.device_count()} CUDA devices here")


# ---------------------------------------------------------------- the loop


@dataclass
class Problem:
    """A model and a task, encoded: all that the loop needs."""

    lm: LanguageModel
    train: list[Encoded]
    dev: list[Encoded]
    test: list[Encoded]
    pad: int
    batch_size: int  # of evaluations

    def quality(self, split: list[Encoded]) -> Quality:
        return evaluate(self.lm, split, self.pad, self.batch_size)


def prepare(c: Config) -> tuple[Problem, Splits]:
    """Read everything.  The weights come last: what is wrong elsewhere is then found before gigabytes are read."""
    task = get_task(c.task)
    splits = load_splits(task, c.data_dir, c.k, c.data_seed, c.num_train, c.num_dev, c.num_eval)
    directory = resolve(c.model)
    config, _ = read_config(directory)
    encode = Encoder(Tokenizer(directory), task, config, c.max_length)
    train, dev, test = ([encode(example) for example in split] for split in splits[:3])
    batch_size = 2 * c.micro_batch_size  # there is one view of the weights then, where a step has a pair
    return Problem(load_weights(c, directory), train, dev, test, config.pad_token_id or 0, batch_size), splits


def load_weights(c: Config, directory: Path) -> LanguageModel:
    dtype = torch.bfloat16 if c.compute == "bf16" else torch.float32
    lm = load(directory, c.device, dtype, c.weights, c.residual, c.oracle)
    lm.round_activations(c.activations)
    return lm


def zo_of(c: Config) -> ZO:
    bits = int(c.direction_bits) if c.direction_bits.isdigit() else None
    return ZO(c.eps, c.queries, bits, c.direction_bits == "grid", c.estimator, c.probe, c.rounding == "nearest")


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
        self.number = 0  # of the signal
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


@dataclass
class Progress:
    """How far a run is, and the weights to keep: those of the lowest dev loss, MeZO's rule.  Loss is a finer measure
    than accuracy, which moves in steps of one example."""

    steps: int = 0
    best_step: int = 0
    best: Quality | None = None


def train(c: Config, problem: Problem, folder: RunFolder, stop: Stop) -> Progress:
    """Run the loop.  The folder's model/ holds the best weights, or the last ones where none were evaluated."""
    lm, zo = problem.lm, zo_of(c)
    progress = Progress()
    bar = tqdm(range(c.steps), unit="step", file=sys.stderr, dynamic_ncols=True)
    for step in bar:
        if stop.number:
            break
        loss = one_step(c, problem, folder, zo, step)
        progress.steps = step + 1
        if progress.steps % c.eval_every == 0 or progress.steps == c.steps:
            dev = problem.quality(problem.dev)
            check_finite(dev.loss, step, c)
            folder.dev(progress.steps, dev.accuracy, dev.loss, peak_memory(c.device))
            if progress.best is None or dev.loss < progress.best.loss:
                progress.best, progress.best_step = dev, progress.steps
                lm.save_stored(folder.model)
        bar.set_postfix(loss=f"{loss:.3f}", dev=f"{folder.devs[-1][1]:.1%}" if folder.devs else "-")
    if progress.best is None:
        lm.save_stored(folder.model)
        progress.best_step = progress.steps
    return progress


def one_step(c: Config, problem: Problem, folder: RunFolder, zo: ZO, step: int) -> float:
    """Estimate, update, record -> the mean of the probes' losses."""
    lm = problem.lm
    examples = [problem.train[i] for i in batch_indices(c.seed, step, c.batch_size, len(problem.train))]
    queries = estimate(lm.store, partial(loss_of, problem, examples, c.micro_batch_size), c.seed, step, zo, lm.dtype)
    slopes = [query.slope for query in queries]
    check_finite(sum(slopes), step, c)
    lr = learning_rate(c.lr, c.lr_schedule, step, c.steps)
    changed, clipped = update(lm.store, slopes, c.seed, step, zo, lr).tolist()
    loss = sum(query.plus + query.minus for query in queries) / (2 * len(queries))
    elements = parameters(lm)
    folder.step(step + 1, slopes, loss, {
        "plus": [query.plus for query in queries], "minus": [query.minus for query in queries], "lr": lr,
        "queries": len(queries), "tokens": sum(len(s) for e in examples for s in e.sequences),
        "changed": changed / elements, "clipped": clipped / elements,
    })  # fmt: skip
    return loss


def check_finite(loss: float, step: int, c: Config) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite at step {step + 1}: try a smaller --lr than {c.lr}")


def parameters(lm: LanguageModel) -> int:
    return sum(math.prod(stored.shape) for stored in lm.store.values())


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on cuda, of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(c: Config) -> dict:
    """One training run from flags to result."""
    validate(c)
    check_free(Path(c.out))
    if c.device.startswith("cuda:"):
        torch.cuda.set_device(c.device)  # kernels and memory figures go by the current device
    problem, splits = prepare(c)
    folder = RunFolder(Path(c.out))
    folder.write_config(dataclasses.asdict(c), problem.lm.sha256(), splits.files, problem.lm.other_files)
    stop = Stop()
    tqdm.write(f"{c.model}, {c.task}, {c.method} on {c.weights} weights, {c.device}; run folder {c.out}", sys.stderr)
    zero_shot = problem.quality(problem.test).accuracy
    tqdm.write(f"zero-shot test accuracy {zero_shot:.1%}", sys.stderr)
    started = time.perf_counter()
    progress = train(c, problem, folder, stop)
    seconds, interrupted = time.perf_counter() - started, progress.steps < c.steps
    del problem.lm  # before the best weights are read into its place
    lm = problem.lm = load_weights(c, folder.model)
    test = None if interrupted else problem.quality(problem.test).accuracy
    result = {
        "model": c.model, "task": c.task, "method": c.method, "weights": c.weights,
        "steps": progress.steps, "forwards": 2 * c.queries * progress.steps, "trainable_parameters": parameters(lm),
        "zero_shot": zero_shot, "dev": progress.best.accuracy if progress.best else None,
        "dev_loss": progress.best.loss if progress.best else None, "best_step": progress.best_step, "test": test,
        "interrupted": interrupted, "seconds": round(seconds, 1), "peak_memory_bytes": peak_memory(c.device),
        "weights_sha256": lm.sha256(), "out": c.out,
    }  # fmt: skip
    folder.result(result)
    return result


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for bad input, 1 for a machine that gave out, 130 for an interrupt (128 + SIGINT)."""
    code, told = 0, ""
    try:
        result = run(parse(argv))
        print(json.dumps(result))
        code = 130 if result["interrupted"] else 0
    except ValueError as error:
        code, told = 2, str(error)
    except torch.OutOfMemoryError as error:
        code, told = 1, f"out of GPU memory; try a smaller --micro-batch-size or fewer bits: {error}"
    except OSError as error:
        code, told = 1, str(error)
    except KeyboardInterrupt:
        code, told = 130, "interrupted twice: stopped at once"
    if told:
        print(f"train.py: {' '.join(told.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
