"""Fine-tune a language model with forward passes only.  `python train.py` trains the embedded model.

The command line is in config.py.  Progress goes to standard error, one JSON object to standard output, everything
else into the run folder.
Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import profiler
import tensor_train
from config import FIRST_ORDER, Config, parse, probes_at_once, recorded, spec_of, validate
from data.hub import raw_config, resolve
from data.scoring import Batch, Encoded, Encoder, Quality, collate, evaluate, losses, width
from data.tasks import Splits, get_task, load_splits
from data.tokenizer import Tokenizer
from dry_run import predict, table
from first_order import adamw_step, make_trainable, optimizer
from graphs import Replayed
from model import LanguageModel, config_of, load, read_config
from profiler import phase
from quant import Stored
from random_bits import permutation
from run_folder import Past, RunFolder, check_free, hashed, read_past
from tensor_train import trained
from zo_optim import (
    ZO,
    check_grid,
    chunks,
    epoch_of,
    land_steps,
    learning_rate,
    probe_losses,
    queries_from,
    queries_of,
    update,
)

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
    multiple: int = 1  # of which a step's batches have tokens

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
    pad, multiple = config.pad_token_id or 0, multiple_of(c, config.longest)
    return Problem(load_base(c, directory), train, dev, test, pad, batch_size, multiple), splits


def multiple_of(c: Config, longest: int) -> int:
    """On a GPU eight lengths share a graph, where the model takes so many tokens; also with --no-graphs."""
    return 8 if c.device.startswith("cuda") and c.optimizer == "zo" and longest % 8 == 0 else 1


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # outside of products


def load_weights(c: Config, directory: Path) -> LanguageModel:
    """As a run stores them."""
    lm = load(directory, c.device, DTYPES[c.compute], c.weights, c.residual, c.oracle)
    set_up(c, lm)
    return lm


def set_up(c: Config, lm: LanguageModel) -> None:
    """What a run asks of its forwards."""
    lm.round_activations(c.activations)
    if c.compute == "fp8":
        lm.multiply_codes()
    if c.compile:
        lm.compile_blocks()


def load_base(c: Config, directory: Path) -> LanguageModel:
    """To train: with adapters around it, or as floats that take a gradient."""
    if c.method not in FIRST_ORDER:
        lm = load_weights(c, directory)
        spec = spec_of(c, lm.raw_config["model_type"])
        if spec is not None:
            tensor_train.attach(lm, spec, c.seed)
            lm.store[tensor_train.TRAINED].value.requires_grad_(c.optimizer == "adamw")
        return lm
    lm = load(directory, c.device, DTYPES[c.compute], c.master or c.weights)
    set_up(c, lm)
    lm.weights = c.weights
    lm.store = make_trainable(lm.store, c.weights if c.method == "fo-ste" else None, DTYPES[c.master or c.weights])
    return lm


_order = lru_cache(maxsize=2)(permutation)  # a batch may span two epochs


@phase("data")
def batch_indices(seed: int, step: int, batch_size: int, n: int) -> list[int]:
    """Examples of step `step` (from 0): one endless stream of keyed permutations, cut every batch_size."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [int(_order(seed, p // n, n)[p % n]) for p in positions]


def rate_at(c: Config, step: int) -> float:
    """Of a run and of its replay alike."""
    return learning_rate(c.lr, c.lr_schedule, step, c.steps, c.warmup)


def batches_of(problem: Problem, examples: list[Encoded], micro_batch_size: int) -> list[Batch]:
    """What goes through the model at once; of one length, where lengths are rounded up."""
    rounded = -(-max(map(width, examples)) // problem.multiple) * problem.multiple if problem.multiple > 1 else 0
    of_forward = chunks(examples, micro_batch_size)
    return [collate(chunk, problem.pad, problem.lm.device, rounded) for chunk in of_forward]


def loss_parts(lm: LanguageModel, batches: list[Batch], view) -> Iterator[Tensor]:
    """Mean loss of each probe over the examples of all batches: [P] each, to be summed."""
    n = sum(len(batch.labels) for batch in batches)
    for batch in batches:
        yield losses(lm, batch, view) * (len(batch.labels) / n)


@phase("other forward")
def loss_of(*args) -> Tensor:
    return sum(loss_parts(*args))


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
    forwards: int = 0  # of one batch by one probe; a backward pass is not counted
    best_step: int = 0
    best_forwards: int = 0
    best: Quality | None = None


def progress_of(past: Past) -> Progress:
    progress = Progress(len(past.slopes), sum(2 * len(slopes) for slopes in past.slopes))
    for row in past.rows:
        if "dev" in row and (progress.best is None or row["dev_loss"] < progress.best.loss):
            progress.best = Quality(row["dev"], row["dev_loss"])
            progress.best_step, progress.best_forwards = row["step"], row["forwards"]
    return progress


def train(c: Config, problem: Problem, folder: RunFolder, stop: Stop, progress: Progress) -> None:
    """Run the loop.  The folder's model/ holds the best weights, or the last ones where none were evaluated."""
    take_step = (first_order if c.optimizer == "adamw" else zeroth_order)(c, problem)
    bar = tqdm(range(progress.steps, c.steps), unit="step", file=sys.stderr, dynamic_ncols=True)
    with Recorder(folder) as recorder:
        for step in with_profile(c, problem.lm, folder, bar):
            if stop.number:
                break
            examples = [problem.train[i] for i in batch_indices(c.seed, step, c.batch_size, len(problem.train))]
            lr = rate_at(c, step)
            done = take_step(step, examples, lr)
            tokens = sum(map(width, examples))
            recorder.take(step + 1, done, {"lr": lr, "tokens": tokens})
            progress.steps = step + 1
            progress.forwards += 2 * len(done.slopes) or 1
            if is_due(c, progress.steps):
                recorder.write()
                judge(c, problem, folder, progress)
            bar.set_postfix(loss=f"{done.loss:.3f}", dev=f"{folder.devs[-1][1]:.1%}" if folder.devs else "-")
    if progress.best is None:
        save(problem.lm, folder.model)
        progress.best_step, progress.best_forwards = progress.steps, progress.forwards


class Recorder:
    """Writes a step down when the next one's losses are there, so that a GPU's update is not waited for."""

    def __init__(self, folder: RunFolder):
        self.folder, self.waiting, self.arrived = folder, None, None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error) -> None:
        self.write()

    def take(self, number: int, done: Step, more: dict) -> None:
        self.write()
        if done.counts is not None and done.counts.is_cuda:
            done = done._replace(counts=done.counts.to("cpu", non_blocking=True))  # into pinned memory
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        self.waiting = number, done, more

    def write(self) -> None:
        if self.waiting is None:
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        (number, done, more), self.waiting = self.waiting, None
        shares = {}
        if done.counts is not None:
            shares = dict(zip(("changed", "clipped"), [n / done.size for n in done.counts.tolist()], strict=True))
        self.folder.step(number, done.slopes, done.loss, done.metrics | shares | more)


def with_profile(c: Config, lm: LanguageModel, folder: RunFolder, steps: Iterable[int]) -> Iterable[int]:
    """The same steps, some of which --profile looks at."""

    def report(profile: dict) -> None:
        folder.profile(profile)
        tqdm.write(profiler.table(profile), sys.stderr)

    return profiler.profiled(steps, c.profile, lm.device, lm.dtype, report) if c.profile else steps


def is_due(c: Config, steps: int) -> bool:
    return steps > 0 and (steps % c.eval_every == 0 or steps == c.steps)


@phase("evaluation")
def judge(c: Config, problem: Problem, folder: RunFolder, progress: Progress) -> None:
    """Evaluate on dev, and keep the weights if they are the best.  Kept first, recorded then: a record is true."""
    dev = problem.quality(problem.dev)
    check_finite(dev.loss, progress.steps - 1, c)
    if progress.best is None or dev.loss < progress.best.loss:
        progress.best, progress.best_step, progress.best_forwards = dev, progress.steps, progress.forwards
        save(problem.lm, folder.model)
    folder.dev(progress.steps, progress.forwards, dev.accuracy, dev.loss, peak_memory(c.device))


def catch_up(c: Config, lm: LanguageModel, steps: list[list[float]]) -> None:
    """Redo the first steps of a recorded run from their slopes, without a forward pass."""
    zo, store = estimator(c), trained(lm)
    for step, slopes in enumerate(steps):
        update(store, slopes, c.seed, step, zo, rate_at(c, step))


def check_same(past: Past, name: str, value: object) -> None:
    """Raises ValueError where base weights or data are not those of the recorded run."""
    if past.config[name] != value:
        raise ValueError(f"the run's {name} is {past.config[name]}, that of the files at hand {value}")


def save(lm: LanguageModel, directory: Path) -> None:
    """What was trained: the weights as they are stored, or the adapters alone."""
    if lm.adapters is None:
        lm.save_stored(directory)
    else:
        tensor_train.save(lm, directory)


class Step(NamedTuple):
    loss: float  # mean over the step's forwards
    slopes: list[float]  # for the trajectory; none of a first-order step
    metrics: dict
    counts: Tensor | None = None  # what `update` counted, of `size` elements.  To read it is to wait for a GPU, and
    # with graphs the next step writes into it
    size: int = 1


StepFn = Callable[[int, list[Encoded], float], Step]  # step from 0, its examples, its learning rate


def estimator(c: Config) -> ZO:
    """As the flags have it; AdaZeta's number of queries changes from epoch to epoch."""
    bits = int(c.direction_bits) if c.direction_bits.isdigit() else None
    grid, nearest = c.direction_bits == "grid", c.rounding == "nearest"
    return ZO(c.eps, c.queries or 1, bits, grid, c.estimator or "q-rge2", c.probe, nearest, c.stride or 1)


FIELDS = len(dataclasses.fields(Batch))


def zeroth_order(c: Config, problem: Problem) -> StepFn:
    """Estimate and update: two forwards a query."""
    lm, n, fixed = problem.lm, len(problem.train), estimator(c)
    store, frozen = trained(lm), None if lm.adapters is None else lm.stored_view()
    size = parameters(store)
    if fixed.grid:
        check_grid(lm.store, fixed.grain)

    def probe(at: int | Tensor, inputs: list[Tensor | None], n_queries: int) -> Tensor:
        loss_fn = partial(loss_of, lm, [Batch(*of_batch) for of_batch in chunks(inputs, FIELDS)])
        zo, at_once = replace(fixed, queries=n_queries), probes_at_once(c, n_queries)
        return probe_losses(store, loss_fn, c.seed, at, zo, lm.dtype, frozen, at_once)

    def land(at: int | Tensor, inputs: list[Tensor]) -> Tensor:
        return land_steps(store, *inputs, c.seed, at, fixed)

    if c.graphs:
        probe, land = Replayed(probe, lm.device), Replayed(land, lm.device)

    def step(at: int, examples: list[Encoded], lr: float) -> Step:
        n_queries = c.queries or queries_of(epoch_of(at, n, c.batch_size), c.alpha, c.beta, c.max_queries)
        inputs = [x for batch in batches_of(problem, examples, c.micro_batch_size) for x in batch.tensors()]
        queries = queries_from(probe(at, inputs, n_queries).tolist(), c.seed, at, fixed)
        slopes = [query.slope for query in queries]
        check_finite(sum(slopes), at, c)
        counts = update(store, slopes, c.seed, at, fixed, lr, lambda at, factors: land(at, [factors]))
        return Step(sum(query.plus + query.minus for query in queries) / (2 * len(queries)), slopes, {
            "plus": [query.plus for query in queries], "minus": [query.minus for query in queries],
            "queries": len(queries),
        }, counts, size)  # fmt: skip

    return step


def first_order(c: Config, problem: Problem) -> StepFn:
    """One forward, one backward, AdamW."""
    lm = problem.lm
    adamw = optimizer(trained(lm), c.lr, c.weight_decay or 0.0)

    def step(at: int, examples: list[Encoded], lr: float) -> Step:
        view = lm.stored_view()
        parts = (part[0] for part in loss_parts(lm, batches_of(problem, examples, c.micro_batch_size), view))
        loss = adamw_step(adamw, parts, lr)
        check_finite(loss, at, c)
        return Step(loss, [], {})

    return step


def check_finite(loss: float, step: int, c: Config) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is not finite at step {step + 1}: try a smaller --lr than {c.lr}")


def parameters(store: dict[str, Stored]) -> int:
    return sum(math.prod(stored.shape) for stored in store.values())


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on cuda, of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reserved_memory(device: str) -> int | None:
    """Bytes that the GPU's allocator has held at most, graphs' own among them; a CPU has no such reserve."""
    return torch.cuda.max_memory_reserved() if device.startswith("cuda") else None


def run(c: Config) -> dict:
    """One training run from flags to result."""
    past = None
    if c.resume:
        past = read_past(Path(c.resume))
        c = recorded(c, past.config["flags"])
    validate(c)
    if past is None:
        check_free(Path(c.out))
    elif len(past.slopes) >= c.steps:
        raise ValueError(f"{c.out} is complete: all {c.steps} steps were done")
    if c.device.startswith("cuda:"):
        torch.cuda.set_device(c.device)  # kernels and memory figures go by the current device
    problem, splits = prepare(c)
    if past is not None:
        check_same(past, "base_weights_sha256", problem.lm.sha256())
        check_same(past, "data_sha256", hashed(splits.files))
    folder = RunFolder(Path(c.out), past)
    if past is None:
        folder.write_config(dataclasses.asdict(c), problem.lm.sha256(), splits.files, problem.lm.other_files)
    stop = Stop()
    tqdm.write(f"{c.model}, {c.task}, {c.method} on {c.weights} weights, {c.device}; run folder {c.out}", sys.stderr)
    zero_shot = problem.quality(problem.test).accuracy
    tqdm.write(f"zero-shot test accuracy {zero_shot:.1%}", sys.stderr)
    started = time.perf_counter()
    progress = Progress()
    if past is not None:
        catch_up(c, problem.lm, past.slopes)
        progress = progress_of(past)
        if is_due(c, progress.steps) and progress.steps not in dict(folder.devs):  # killed before it was recorded
            judge(c, problem, folder, progress)
    train(c, problem, folder, stop, progress)
    seconds, interrupted = time.perf_counter() - started, progress.steps < c.steps
    lm = restore_best(c, problem, folder.model)
    test = None if interrupted else problem.quality(problem.test).accuracy
    result = {
        "model": c.model, "task": c.task, "method": c.method, "weights": c.weights,
        "steps": progress.steps, "forwards": progress.forwards, "trainable_parameters": parameters(trained(lm)),
        "zero_shot": zero_shot, "dev": progress.best.accuracy if progress.best else None,
        "dev_loss": progress.best.loss if progress.best else None, "best_step": progress.best_step,
        "best_forwards": progress.best_forwards, "test": test, "interrupted": interrupted, "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(c.device), "reserved_memory_bytes": reserved_memory(c.device),
        "weights_sha256": lm.sha256(), "out": c.out,
    }  # fmt: skip
    folder.result(result)
    return result


def restore_best(c: Config, problem: Problem, directory: Path) -> LanguageModel:
    """The weights of the lowest dev loss, in place of the last ones."""
    if problem.lm.adapters is None:
        del problem.lm  # before the best weights are read into its place
        problem.lm = load_weights(c, directory)
    else:
        tensor_train.load(problem.lm, directory)
    return problem.lm


def replay(c: Config) -> dict:
    """Redo a finished run's updates up to its best step, and compare the weights' hashes."""
    past, path = read_past(Path(c.replay)), Path(c.replay) / "result.json"
    c = recorded(c, past.config["flags"])
    if not path.is_file():
        raise ValueError(f"{c.out} has no result.json: that run was not finished; --resume finishes it")
    validate(c)
    result, lm = json.loads(path.read_text()), load_base(c, resolve(c.model))
    check_same(past, "base_weights_sha256", lm.sha256())
    catch_up(c, lm, past.slopes[: result["best_step"]])
    sha256 = lm.sha256()
    return {"run": c.out, "steps": result["best_step"], "weights_sha256": sha256,
            "recorded_sha256": result["weights_sha256"], "equal": sha256 == result["weights_sha256"]}  # fmt: skip


def dry_run(c: Config) -> dict:
    """Print what a run would hold in memory, from shapes alone."""
    validate(c)
    raw = raw_config(c.model)
    longest = longest_sequence(c)
    predicted = predict(c, raw, longest or min(c.max_length, config_of(raw).longest))
    if longest is None:
        print("no data or no tokenizer is here: sequences are taken to be as long as --max-length and the model allow")
    print(table(predicted))
    return predicted


def longest_sequence(c: Config) -> int | None:
    """Tokens of the task's longest sequence, where its files and the tokenizer are at hand."""
    task = get_task(c.task)
    here = Path(c.model).is_dir() or c.model == "tiny"
    if not here or not (task.embedded or Path(c.data_dir).is_dir()):
        return None
    directory = resolve(c.model)
    splits = load_splits(task, c.data_dir, c.k, c.data_seed, c.num_train, c.num_dev, c.num_eval)
    encode = Encoder(Tokenizer(directory), task, read_config(directory)[0], c.max_length)
    return max(width(encode(example)) for split in splits[:3] for example in split)


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for bad input, 1 for a machine that gave out, 130 for an interrupt (128 + SIGINT)."""
    code, told = 0, ""
    try:
        c = parse(argv)
        of_a_run = c.resume or c.replay  # which has its own flags: given another one, it says so
        result = (replay if c.replay else dry_run if c.dry_run and not of_a_run else run)(c)
        print(json.dumps(result))
        code = 130 if result.get("interrupted") else 0 if result.get("equal", True) else 1
    except ValueError as error:
        code, told = 2, str(error)
    except torch.OutOfMemoryError as error:
        code, told = 1, f"out of GPU memory; try a smaller --micro-batch-size, fewer bits or --no-graphs: {error}"
    except OSError as error:
        code, told = 1, str(error)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # all that tells the CPU's allocator from a bug
            raise
        code, told = 1, f"out of memory; try a smaller --micro-batch-size or fewer bits: {error}"
    except KeyboardInterrupt:
        code, told = 130, "interrupted twice: stopped at once"
    if told:
        print(f"train.py: {' '.join(told.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
