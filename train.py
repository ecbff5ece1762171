"""Fine-tune a language model with forward passes only.  `python train.py` trains the embedded model.

The command line is in runtime/flags.py.  Progress goes to standard error, one JSON object to standard output,
everything else into the run folder.  Bad input ends with one line and exit code 2.
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (before anything is imported that older ones cannot read)
    sys.exit(f"train.py: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
if __name__ == "__main__":
    # A thread that waits for the others of a parallel region sleeps, instead of keeping a core from them where the
    # machine has other work: 40 steps of the embedded model by two threads then take 2 to 3 s instead of 57 (NOTES.md)
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        os.getcwd()  # without one torch's own libraries do not load
    except OSError as error:
        sys.exit(f"train.py: the working directory: {error}")
    if {"-h", "--help"} & set(sys.argv[1:]):
        from runtime.flags import command_line

        command_line().parse_args(["--help"])  # before torch is imported, which takes longer than a second

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

import gpu
import tensor_train
from family.elasticzo import Tail, tail_of, watching
from family.lezo import adalezo, lezo
from family.mazo import mazo, unpacked
from family.mezo_svrg import SVRG, svrg
from family.subzero import SubZero
from family.zo2 import Deferred
from model import LanguageModel
from quant import INTEGERS, Store
from random_bits import Key, permutation
from runtime.ask import ask
from runtime.checkpoints import companion_files, save_stored, weights_sha256
from runtime.config import Config, max_length, parse, probes_per_forward, recorded, tasks_of, validate
from runtime.dry_run import longest_sequence, masked, predict, table
from runtime.first_order import adamw_step, optimizer
from runtime.flags import ADAPTERS
from runtime.hub import raw_config, resolve
from runtime.json_files import one_line
from runtime.model_configs import config_of
from runtime.problem import (
    MASKS,
    MultiTask,
    Problem,
    Quality,
    load_base,
    mask_file,
    prepare,
    read_masks,
    restore_best,
    sizes,
)
from runtime.ranks import Ranks, is_first, joined
from runtime.record import RecordedRun, check_result, check_same, read_result, read_run, recorded_loss
from runtime.run_folder import (
    DevRow,
    NoFolder,
    RunFolder,
    StepRecorder,
    begin,
    check_drawings,
    check_free,
    code_sha256,
    hashed,
    locked,
    run_config,
    state_path,
)
from runtime.sweep import sweep
from runtime.sweep import table as table_of_sweep
from tensor_train import trained
from zo_optim import (
    MEASURED,
    ZO,
    LossFn,
    SparseZO,
    adazeta_queries,
    epoch_of,
    learning_rate,
    measured_rate,
    probe_losses,
    update,
    zo_step,
)

# ---------------------------------------------------------------- the loop


def train(
    c: Config, problem: Problem | MultiTask, zo: ZO | None, folder: RunFolder | NoFolder, stop: Stop,
    progress: Progress, ranks: Ranks,
) -> None:  # fmt: skip
    """Run the loop, to its last step or until the run has diverged.  The folder's model/ holds the best weights."""
    lm, n, weights = problem.lm, len(problem.train), trained(problem.lm)
    task_sizes = [len(part.train) for part in problem.parts]
    zo, loss_of = installed(zo, c, lm, c.graphs), losses_of(c, problem, zo, ranks)
    ahead, ready = 0 if c.queries is None or isinstance(zo, SVRG) else c.steps - 1, {}  # losses by step
    adamw = optimizer(weights, c.lr, c.weight_decay or 0.0) if c.optimizer == "adamw" else None
    if adamw is not None and progress.steps:  # a run is taken up again
        folder.load_state(progress.steps, adamw, weights)
    bar = progress_bar(progress.steps, c.steps)
    with StepRecorder(folder, size=parameters(weights)) as recorder:
        for step in range(progress.steps, c.steps):
            if (ranks.stopping if ranks.world > 1 else stop.signal) or progress.diverged:
                break
            # the batch
            size = n if isinstance(zo, SVRG) and zo.is_anchor(step) else c.batch_size
            examples = [problem.train[i] for i in batch_indices(c.seed, step, size, *task_sizes)]
            lr = learning_rate(step, progress.rate, c.lr_schedule, c.steps, c.warmup)
            if zo is not None and c.queries is None:  # AdaZeta's number grows with the epochs
                epoch = epoch_of(step, n, c.batch_size)
                zo = replace(zo, queries=adazeta_queries(epoch, c.alpha, c.beta, c.max_queries))
            loss_fn = ready.pop(step, None) or loss_of(examples, 1 if zo is None else zo.queries)
            if step < ahead:  # the next one, while a GPU computes
                loss_fn.meanwhile = lambda at=step + 1, size=size: ready.update({at: loss_of(
                    [problem.train[i] for i in batch_indices(c.seed, at, size, *task_sizes)], c.queries)})  # fmt: skip

            # two forward passes a query and an update; or, of the baselines, one forward and one backward pass
            if zo is not None:
                clip = math.inf  # or some root mean squares of all projected gradients so far
                if c.clip and progress.queries >= 16:
                    clip = c.clip * math.sqrt(progress.squares / progress.queries)
                done = zo_step(weights, loss_fn, Key(c.seed, step), zo, lr, clip)
                losses = torch.stack((done.plus, done.minus), 1)
                loss, forwards = sum(losses.sum(1).tolist()) / losses.numel(), losses.numel()
                if isinstance(zo, SVRG):
                    forwards = zo.forwards(step, -(-n // c.batch_size))
            else:
                loss, forwards, done = adamw_step(adamw, loss_fn.parts(lm.stored_view()), lr), 1, None

            # record
            more = {"lr": lr, "tokens": sum(e.width for e in examples)}
            more |= {"forwards": forwards} if isinstance(zo, SVRG) else {}
            recorder.write((step + 1, loss, done, more))
            projected_grads = torch.zeros(0, dtype=torch.float64) if done is None else done.projected_grads
            progress.count_step(projected_grads, forwards, loss)

            # evaluate
            if progress.steps % c.eval_every == 0 or progress.steps == c.steps:
                recorder.write()
                evaluate_and_keep_best(c, problem, folder, progress, ranks, adamw)
            with suppress(OSError):  # of a standard error that was closed meanwhile
                bar.set_postfix(loss=f"{loss:.3f}", dev=f"{folder.devs[-1].loss:.3f}", lr=f"{lr:.1e}", refresh=False)
                bar.update()
    with suppress(OSError):
        bar.close()


def losses_of(c: Config, problem: Problem | MultiTask, zo: ZO | None, ranks: Ranks) -> Callable[..., LossFn]:
    """From a step's examples and its number of queries to its loss."""
    loss_of = ranks.loss_of(problem.loss_fn(c.micro_batch_size), problem.terms)
    return watching(loss_of, zo.moves) if zo is not None and isinstance(zo.moves, Tail) else loss_of


_order = lru_cache(maxsize=32)(permutation)  # of a few tasks: a batch may span two epochs of each


def batch_indices(seed: int, step: int, batch_size: int, n: int, *others: int) -> list[int]:
    """Examples of step `step` (from 0): one endless stream of keyed permutations, cut every batch_size.

    others: how many examples further tasks have.  Each task then has a stream of its own and an equal share of the
    batch, and its indices go on where those of the task before end.
    """
    indices, first, share = [], 0, batch_size // (1 + len(others))
    for task, size in enumerate((n, *others)):
        positions = range(step * share, (step + 1) * share)
        indices += [first + int(_order(seed, p // size, size, task)[p % size]) for p in positions]
        first += size
    return indices


def estimator(c: Config, lm: LanguageModel, masks: dict[str, Tensor] | None = None) -> ZO:
    """The estimator that the flags name; AdaZeta's number of queries changes from epoch to epoch.

    masks: MaZO's.  Without them it is what they are measured by.
    """
    common = dict(eps=c.eps, queries=c.queries or 1, estimator=c.estimator or "q-rge2", dtype=lm.dtype,
                  probes_per_forward=probes_per_forward(c))  # fmt: skip
    if c.method == "subzero":
        return SubZero(**common, rank=c.subspace_rank, every=c.subspace_steps, nearest=c.rounding == "nearest")
    if c.direction_bits == "sparse":
        zo = SparseZO(**common, cell=c.cell)
    else:
        bits = int(c.direction_bits) if c.direction_bits.isdigit() else None
        zo = ZO(**common, bits=bits, probe=c.probe, nearest=c.rounding == "nearest")
    if c.method == "lezo":
        return (adalezo if c.bandit else lezo)(zo, lm, c.share, c.rest)
    if c.method == "elasticzo":
        return replace(zo, moves=tail_of(lm, c.tail_blocks, c.tail_rate))
    if masks is not None:
        return mazo(zo, masks)
    return svrg(zo, c.anchor_steps, c.anchor_rate) if c.method == "mezo-svrg" else zo


def installed(zo: ZO | None, c: Config, lm: LanguageModel, graphs: bool = False) -> ZO | None:
    """The estimator, if there is one, by kernels where there are any, and for the blocks where they are."""
    zo = zo and gpu.estimator(zo, c.device, graphs)
    return zo if lm.offloaded is None else Deferred(zo, lm.offloaded)


ENOUGH = 16  # steps in a row that go wrong in the same way: a run has then diverged
FEW = 4  # the same of losses that are not finite, from which nothing comes back


@dataclass
class Progress:
    """How far a run is, whether it has diverged, and the weights to keep: those of the lowest dev loss, MeZO's rule.
    Loss is a finer measure than accuracy, which moves in steps of one example."""

    guess: float  # the loss of a model that scores all options alike; inf where losses move in steps, as metrics do
    rate: float = 0.0  # the learning rate before its schedule: the one that was given, or 0 until it has been measured
    measured: int = 0  # by so many queries, the first ones; 0 where it was given
    rate_by: Callable[[list[float]], float] | None = None  # from their projected gradients
    first_grads: list[float] = field(default_factory=list)  # those
    steps: int = 0
    forwards: int = 0  # of one batch through one copy of the weights; a backward pass is not counted
    queries: int = 0
    squares: float = 0.0  # sum of their projected gradients' squares
    first_loss: float = math.inf  # that of the first step
    still: int = 0  # steps in a row, up to the last, of which no probe changed the loss
    astray: int = 0  # steps in a row, up to the last, whose loss was far above the first one's
    skipped: int = 0  # steps in a row, up to the last, one of whose losses was not finite
    diverged: str | None = None  # what went wrong, and what to try
    best_step: int = 0
    best_forwards: int = 0
    best: Quality | None = None

    def count_step(self, projected_grads: Tensor, forwards: int, loss: float) -> None:
        """Training and --resume count by the same record, so that a run that is taken up again ends as it would have.

        projected_grads: [Q] float64, none of a first-order step.
        """
        self.first_loss = self.first_loss if self.steps else loss
        self.steps, self.forwards = self.steps + 1, self.forwards + forwards
        measuring = self.queries < self.measured
        self.queries += len(projected_grads)
        self.squares += float(projected_grads.square().sum())
        if measuring:
            self.first_grads += projected_grads.tolist()
            self.rate = self.rate_by(self.first_grads) if self.queries >= self.measured else 0.0
        limit, remedy = 2 * self.first_loss + 1, "a smaller --lr"
        learnt = loss <= 1e-6  # no probe changes a loss of 0 either: nothing is left to learn
        still = len(projected_grads) > 0 and not projected_grads.any() and not learnt
        smooth = math.isfinite(self.guess)
        self.still = self.still + 1 if smooth and still else 0
        self.astray = self.astray + 1 if smooth and loss > limit else 0
        self.skipped = self.skipped + 1 if not math.isfinite(loss) else 0
        if self.skipped == FEW:
            self.diverged = f"the loss was not finite in {FEW} steps: start another run with {remedy}"
        elif self.still == ENOUGH:
            if self.still == self.steps:
                remedy = "a larger --eps, or a smaller one if it is far above the default"
            self.diverged = f"no probe changed the loss in {ENOUGH} steps: start another run with {remedy}"
        elif self.astray == ENOUGH:
            self.diverged = f"the loss was above {limit:.3g} in {ENOUGH} steps: start another run with {remedy}"

    def note_if_best(self, dev: Quality) -> bool:
        """Whether the weights just evaluated are those to keep; if so, they are the ones to beat from now on.

        Those of a dead model are not, though its loss, that of guessing, is lower than many a model's at the start.
        Probes that change nothing give it away, or that very loss: no probe follows the step that killed it yet.
        """
        if not math.isfinite(dev.loss):
            self.diverged = f"the dev loss was not finite at step {self.steps}: start another run with a smaller --lr"
            return False
        dead = self.still > 0 or abs(dev.loss - self.guess) < 1e-5  # a float32 mean of equal losses is off by 1e-6
        if self.best is not None and (dead or dev.loss >= self.best.loss):
            return False
        self.best, self.best_step, self.best_forwards = dev, self.steps, self.forwards
        return True


def evaluate_and_keep_best(
    c: Config, problem: Problem | MultiTask, folder: RunFolder | NoFolder, progress: Progress, ranks: Ranks,
    adamw: torch.optim.AdamW | None = None,
) -> None:  # fmt: skip
    """Save before logging, so that the log never names weights that are not on disk."""
    dev = ranks.first(problem.dev_quality())
    if not progress.steps and not math.isfinite(dev.loss):
        raise ValueError("the loss is not finite at step 0: the model gives none before any step; try other --weights")
    if progress.note_if_best(dev) and folder.model is not None:
        save(problem.lm, folder.model)
    goes_on = adamw is not None and 0 < progress.steps < c.steps
    state = folder.save_state(progress.steps, adamw, trained(problem.lm)) if goes_on else {}
    row = DevRow(progress.steps, progress.forwards, dev.metric, dev.loss)
    folder.dev(row, progress.best_step, peak_memory(c.device), state)


def save(lm: LanguageModel, directory: Path) -> None:
    """The weights as they are stored, or the adapters alone."""
    if lm.offloaded is not None:
        lm.offloaded.settle()
    if lm.adapters is None:
        save_stored(directory, lm.raw_config, lm.format, lm.residual, lm.weights, lm.other_files)
    else:
        tensor_train.save(lm, directory)


# ---------------------------------------------------------------- runs, resumed and replayed


ALONE = ("mezo-svrg", "mazo", "elasticzo", "zo2")  # methods whose steps processes do not share
SMALL = 2**22  # parameters: regions so short gain nothing from a second thread, and lose much where a core is busy


class Stop:
    """Ctrl-C and SIGTERM end the loop after the step at hand, whose record is then whole; twice, at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


def start(c: Config, held: ExitStack) -> tuple[Config, Problem | MultiTask, RecordedRun, Ranks]:
    """A new run or one that is taken up: its flags, its problem, and what its folder holds, which is `held` from now
    on, as the ranks are.

    Raises ValueError, before anything is written, where either cannot be.
    """
    past = None
    if c.resume:
        if is_first():
            tell(held.enter_context(locked(Path(c.resume))))
        past = read_run(Path(c.resume))
        c = recorded(c, past.config["flags"])
    validate(c)
    if past is not None:
        check_unfinished(c)
    elif is_first():
        check_free(Path(c.out))
    if c.device.startswith("cuda:"):
        torch.cuda.set_device(c.device)  # kernels and memory figures go by the current device
    ranks = held.enter_context(joined(c.device))
    if ranks.world > 1 and (c.optimizer != "zo" or c.method in ALONE or "," in c.task):
        raise ValueError("several processes share zeroth order's steps; those of AdamW, several tasks and "
                         f"{', '.join(ALONE)} are not shared: start one process")  # fmt: skip
    problem, files = prepare(c)
    limit_threads(problem.lm)
    zo = estimator(c, problem.lm) if c.optimizer == "zo" else None  # refuses what this model has not, before a folder
    masks = mask_file(c, problem, zo) if c.method == "mazo" and past is None else b""
    begun = run_config(dataclasses.asdict(c), weights_sha256(problem.lm.weights), files, files_of_base(c), masks)
    decided = {name: begun[name] for name in ("code_sha256", "base_weights_sha256", "data_sha256", "other_sha256")}
    ranks.check_same("what they begin with", json.dumps(decided))
    if past is not None:
        check_same(Path(c.out), past.config, decided)
        tell(other_versions(past.config, begun))
    elif is_first():
        past = begin(Path(c.out), begun, {MASKS: masks} if masks else {})
        tell(held.enter_context(locked(Path(c.out))))
    else:
        past = RecordedRun(begun, [], [])
    return c, problem, past if c.optimizer == "zo" else past.up_to(last_state(Path(c.out), past)), ranks


def limit_threads(lm: LanguageModel) -> None:
    """One for a small model; in a replay too, as sums over parts of other sizes would be others in the last bits."""
    if parameters(lm.weights) < SMALL:
        torch.set_num_threads(1)


def run(c: Config) -> dict:
    """One training run from flags to result, or the rest of one; of ranks but the first, nothing."""
    with ExitStack() as held:
        c, problem, past, ranks = start(c, held)
        title, metric, out = title_of(past.config["flags"]), problem.metric, Path(c.out)
        events = c.log == "tensorboard"
        folder = RunFolder(out, title, past, metric, events) if is_first() else NoFolder(past)
        stop = Stop()
        ranks.asked_to_stop = lambda: bool(stop.signal)
        tell(f"{title}, {c.device}; {sizes(problem)}; run folder {c.out}")
        if is_first():
            folder.zero_shot = problem.score(problem.measured(problem.answered("test")))
            tell(f"zero-shot test {metric} {100 * folder.zero_shot:.1f} %")
        progress = progress_of(past, c, problem.lm, guess_of(c, problem))
        masks = read_masks(c, problem.lm, past.config)
        zo = estimator(c, problem.lm, masks) if c.optimizer == "zo" else None
        if zo is not None:
            lost = progress.best is not None and folder.model is not None  # model/ may be
            save_best = [partial(save, problem.lm, folder.model)] if lost else []
            catch_up(c, problem.lm, zo, past, len(past.trajectory), {progress.best_step: save_best}, problem)
        due = progress.steps % c.eval_every == 0 or progress.steps == c.steps
        if due and progress.steps not in [dev.step for dev in folder.devs]:  # a run begins, or was killed before that
            evaluate_and_keep_best(c, problem, folder, progress, ranks)
        started = time.perf_counter()
        train(c, problem, zo, folder, stop, progress, ranks)
        seconds = time.perf_counter() - started
        if ranks.world > 1:
            ranks.check_same("their weights", weights_sha256(trained(problem.lm)))
        for line in ending(c, progress):
            tell(line)
        return folder.result(result_of(c, problem, folder, progress, seconds)) if is_first() else {}


def result_of(c: Config, problem: Problem | MultiTask, folder: RunFolder, progress: Progress, seconds: float) -> dict:
    """What a run came to, tested with the weights of its lowest dev loss."""
    interrupted = progress.steps < c.steps and not progress.diverged
    if not interrupted:
        folder.remove_states()
    lm = problem.lm = restore_best(c, problem.lm, folder.model)
    found = {} if interrupted else problem.answered()
    folder.predictions(found)
    measured = problem.measured(found)
    return {
        **named(folder.flags), "steps": progress.steps, "forwards": progress.forwards,
        "trainable_parameters": parameters(trained(lm)),
        "zero_shot": folder.zero_shot, "dev": progress.best.metric, "dev_loss": progress.best.loss,
        "best_step": progress.best_step, "best_forwards": progress.best_forwards,
        "lr": progress.rate, "metric": folder.metric, "test": problem.score(measured) if measured else None,
        "tests": measured,
        "interrupted": interrupted, "diverged": progress.diverged, "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(c.device), "reserved_memory_bytes": reserved_memory(c.device),
        "weights_sha256": weights_sha256(lm.weights), "out": c.out,
    }  # fmt: skip


def tell(line: str | None) -> None:
    if line is not None and is_first():
        with suppress(OSError):  # a run does not end for a standard error that is closed or full
            tqdm.write(line, sys.stderr)


def progress_bar(done: int, steps: int) -> tqdm:
    try:
        off = not is_first()
        return tqdm(total=steps, initial=done, unit="step", file=sys.stderr, dynamic_ncols=True, disable=off)
    except OSError:
        return tqdm(disable=True)


def other_versions(recorded: dict, found: dict) -> str | None:
    """What to tell of libraries that are not those that a run began with."""
    was, now = recorded["versions"], found["versions"]
    differ = [f"{name} {was.get(name)} then, {now[name]} now" for name in now if was.get(name) != now[name]]
    return f"not to the same bits, perhaps: {'; '.join(differ)}" if differ else None


def files_of_base(c: Config) -> list[Path]:
    """What decides the tokens and the model, beside its tensors."""
    directory = resolve(c.model)
    return [directory / "config.json", *companion_files(directory)]


def last_state(out: Path, past: RecordedRun) -> int:
    """The step that a run of AdamW can go on from: that of its last state on disk, else 0, to do everything again."""
    kept = [row["step"] for row in past.rows if "state_sha256" in row and state_path(out, row["step"]).is_file()]
    return kept[-1] if kept and (out / "model").is_dir() else 0


def guess_of(c: Config, problem: Problem | MultiTask) -> float:
    """The loss of a model that scores all options alike; inf where losses move in steps."""
    of_guessing = [len(part.dev[0].answers) if part.task.loss == "options" else problem.lm.config.vocab_size
                   for part in problem.parts]  # fmt: skip
    return fmean(map(math.log, of_guessing)) if c.objective == "loss" else math.inf


def named(flags: dict) -> dict:
    """What a result says of its flags."""
    return {"model": flags["model"], "task": flags["task"], "method": flags["method"], "weights": flags["weights"],
            "directions": flags["direction_bits"]}  # fmt: skip


def title_of(flags: dict) -> str:
    return f"{flags['model']}, {flags['task']}: {method_text(Config(**flags))}"


def method_text(c: Config) -> str:
    """The method, and whether its directions are the paper's or ours."""
    gaussian = "Gaussian directions" if c.method != "subzero" else "directions in random subspaces"
    directions = {None: "", "full": f", {gaussian}", "sparse": ", sparse directions (ours)"}
    rounded = f", {c.direction_bits}-bit directions (the paper's)"
    which = "" if c.mask_share is None else f", {100 * c.mask_share:g} % of each row"
    which += ", blocks by a bandit" if c.bandit else ""
    return f"{c.method} on {c.weights} weights{directions.get(c.direction_bits, rounded)}{which}"


def ending(c: Config, progress: Progress) -> list[str]:
    """What the user should know of a run that came to a bad end or to nothing."""
    lines = []
    if progress.steps < c.steps and not progress.diverged:
        return lines
    if progress.diverged:
        lines.append(f"the run diverged at step {progress.steps}: {progress.diverged}")
    if progress.best_step == 0:
        advice = "" if progress.diverged else "; try another --lr"
        lines.append(f"no evaluation had a lower dev loss than the start: model/ is what the run began with{advice}")
    return lines


def progress_of(past: RecordedRun | None, c: Config, lm: LanguageModel, guess: float = math.inf) -> Progress:
    """The progress of a recorded run, or of one that begins.

    Without --lr the first queries, at most an eighth of the steps', only measure the rate, by which replay and resume
    measure it again.
    """
    progress = Progress(guess, c.lr or 0.0)
    if c.lr is None:
        kind = ADAPTERS.get(c.method, "weights")
        dense = kind == "weights" and c.weights in INTEGERS and not c.residual and c.direction_bits != "sparse"
        progress.measured = min(MEASURED, -(-c.steps // 8))
        progress.rate_by = partial(measured_rate, d=elements_moved(c, lm), kind=kind, dense_on_codes=dense)
    if past is not None:
        grads = iter(past.projected_grads)
        for row in past.rows:  # in the order in which train counted
            if "dev" in row:
                progress.note_if_best(Quality(row["dev"], math.inf if row["dev_loss"] is None else row["dev_loss"]))
            else:
                of_step = torch.tensor(next(grads), dtype=torch.float64)
                forwards = row.get("forwards", 2 * len(of_step) or 1)
                progress.count_step(of_step, forwards, recorded_loss(row["loss"]))
    return progress


def elements_moved(c: Config, lm: LanguageModel) -> float:
    """How many elements a step's directions move: not ElasticZO's tail, nor what MaZO's masks leave out."""
    tail = tail_of(lm, c.tail_blocks, c.tail_rate).names if c.method == "elasticzo" else ()
    weights = {name: stored for name, stored in trained(lm).items() if name not in tail}
    blocks = parameters({name: weights[name] for name in weights if name.startswith(lm.layers)})
    rest = 0 if c.rest is False else parameters(weights) - blocks
    masks = masked({name: stored.shape for name, stored in weights.items()}, lm.decoder == lm.embedding)
    return blocks * (c.share or 1) + rest - masks * (1 - (c.mask_share or 1))


def catch_up(
    c: Config, lm: LanguageModel, zo: ZO, past: RecordedRun, steps: int, at: dict[int, list[Callable[[], None]]],
    problem: Problem | None = None,
) -> None:  # fmt: skip
    """Redo the first steps of a recorded run from their projected gradients, without a forward pass.

    at: what to do with the weights as they were after so many steps.  problem: for a tail, whose gradient is in no
    record: its forwards are made again.
    """
    zo, weights, progress = installed(zo, c, lm), trained(lm), progress_of(None, c, lm)
    grads, rows = past.projected_grads, [row for row in past.rows if "projected_grad" in row]
    for step in range(steps + 1):
        for do in at.get(step, ()):
            if lm.offloaded is not None:
                lm.offloaded.settle()
            do()
        if step < steps:
            of_step = torch.tensor(grads[step], dtype=torch.float64)
            if isinstance(zo, SVRG):  # of whose anchor later losses are, but no update
                losses = [recorded_loss(rows[step][name][1]) for name in ("plus", "minus")]
                zo.remember(weights, Key(c.seed, step), torch.tensor(losses, dtype=torch.float64))
            if isinstance(zo.moves, Tail):
                probe_losses(weights, loss_at(c, problem, zo, step), Key(c.seed, step), zo)
            lr = learning_rate(step, progress.rate, c.lr_schedule, c.steps, c.warmup)
            update(weights, of_step, Key(c.seed, step), zo, lr)
            progress.count_step(of_step, 2 * len(of_step), math.inf)


def check_unfinished(c: Config) -> None:
    """Raises ValueError where no step of the recorded run is left to be done."""
    result = read_result(Path(c.out))  # a killed run has none
    if result and result["diverged"]:
        raise ValueError(f"{c.out} diverged at step {result['steps']}: {result['diverged']}")
    if result and not result["interrupted"]:
        raise ValueError(f"{c.out} is complete: all {c.steps} steps were done")


def parameters(weights: dict[str, Store]) -> int:
    return sum(math.prod(stored.shape) for stored in weights.values())


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator on cuda, of the whole process on a CPU; 0 on Windows, which does not say."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reserved_memory(device: str) -> int | None:
    """Bytes that the GPU's allocator has held at most, graphs' own among them; a CPU has no such reserve."""
    return torch.cuda.max_memory_reserved() if device.startswith("cuda") else None


def replay(c: Config) -> dict:
    """Redo a finished run's updates up to its best step, and compare all of the folder with its record.

    With --verify, N steps' losses and the metrics on dev and test are computed again.  Raises ValueError, by name, for
    what does not follow from the record.
    """
    past, result, verify = read_run(Path(c.replay)), read_result(Path(c.replay)), c.verify
    c = recorded(c, past.config["flags"])
    if result is None:
        raise ValueError(f"{c.out} has no result.json: that run was not finished; --resume finishes it")
    validate(c)
    out, best_step = Path(c.out), result["best_step"]
    check_result(out, past, result, derived(past, best_step))
    check_drawings(out, past, title_of(past.config["flags"]), result)
    check_same(out, past.config, {"code_sha256": code_sha256(), "other_sha256": hashed(files_of_base(c))})
    asks_data = c.calibrate or verify or c.method == "elasticzo"
    problem, files = prepare(c) if asks_data else (None, None)
    lm = problem.lm if problem else load_base(c, resolve(c.model), [])
    limit_threads(lm)
    check_same(out, past.config, {"base_weights_sha256": weights_sha256(lm.weights)})
    masks = read_masks(c, lm, past.config)
    zo, steps, found = estimator(c, lm, masks), len(past.trajectory), {}
    at = {best_step: [lambda: found.update(weights_sha256=weights_sha256(lm.weights))]}
    if problem:
        check_same(out, past.config, {"data_sha256": hashed(files)})
    if verify:
        found |= {} if masks is None else {"masks_difference": verify_masks(c, problem, masks)}
        rows = [row for row in past.rows if "projected_grad" in row]
        for step in permutation(int(result["digest"], 16), 0, steps)[:verify].tolist():
            at.setdefault(step, []).append(partial(verify_step, c, problem, zo, rows[step], step, found))
        at[best_step].append(partial(verify_metrics, problem, result, found))
    catch_up(c, lm, zo, past, steps if verify else best_step, at, problem)
    sha256 = found.pop("weights_sha256")
    if (out / "model").is_dir():  # a folder can be published without it
        lm = restore_best(c, lm, out / "model")
        if weights_sha256(lm.weights) != result["weights_sha256"]:
            raise ValueError(f"{out / 'model'} does not hold the weights of result.json")
    said = {"run": c.out, "steps": best_step, "weights_sha256": sha256, "recorded_sha256": result["weights_sha256"]}
    said |= {name: sorted(value) if isinstance(value, list) else value for name, value in found.items()}
    bound = allowed(past.config["flags"])
    differences = ("largest_difference", "loss_difference", "masks_difference")
    near = max(found.get(name, 0) for name in differences) <= bound
    return said | ({"allowed": bound} if verify else {}) | {"equal": near and sha256 == result["weights_sha256"]}


def derived(past: RecordedRun, best_step: int) -> dict:
    """What a result must say, by the record."""
    rows = past.rows
    dev = next((row for row in rows if "dev" in row and row["step"] == best_step), None)
    if dev is None:
        raise ValueError(f"result.json: best_step is {best_step!r}, of which there is no evaluation in metrics.jsonl")
    forwards = (row.get("forwards", 2 * len(row["projected_grad"])) for row in rows if "projected_grad" in row)
    values = {"steps": len(past.trajectory), "forwards": sum(forwards)}
    values |= {"dev": dev["dev"], "dev_loss": dev["dev_loss"], "best_forwards": dev["forwards"]}
    return named(past.config["flags"]) | values


def loss_at(c: Config, problem: Problem | MultiTask, zo: ZO, step: int) -> LossFn:
    """The loss of a recorded step, as train had it."""
    n = len(problem.train)
    size = n if isinstance(zo, SVRG) and zo.is_anchor(step) else c.batch_size
    task_sizes = [len(part.train) for part in problem.parts]
    examples = [problem.train[i] for i in batch_indices(c.seed, step, size, *task_sizes)]
    return losses_of(c, problem, zo, Ranks())(examples, zo.queries)


def verify_step(c: Config, problem: Problem | MultiTask, zo: ZO, row: dict, step: int, found: dict) -> None:
    """Compute a step's losses again, with the weights as they were before it.  row: what was recorded of it.

    Raises ValueError where its projected gradients are not those of its own recorded losses.
    """
    zo = zo if zo.queries == row["queries"] else replace(zo, queries=row["queries"])
    loss_fn = loss_at(c, problem, zo, step)
    plus, minus = probe_losses(trained(problem.lm), loss_fn, Key(c.seed, step), installed(zo, c, problem.lm))
    then = torch.tensor([list(map(recorded_loss, row[name])) for name in ("plus", "minus")], dtype=torch.float64)
    difference = torch.stack((plus - then[0], minus - then[1])).abs()
    both = ~torch.stack((plus, minus)).isfinite() & ~then.isfinite()  # what is not finite is so again
    difference = difference.where(~both, 0.0).nan_to_num(nan=math.inf)
    found.setdefault("verified_steps", []).append(step + 1)
    found["largest_difference"] = max(found.get("largest_difference", 0.0), float(difference.max()))
    slopes = ((then[0] - then[1]).double() / (2 * c.eps)).nan_to_num(0.0, 0.0, 0.0)
    grads = torch.tensor(row["projected_grad"], dtype=torch.float64)
    cut = grads.abs() < slopes.abs() if c.clip else torch.zeros(len(grads), dtype=torch.bool)  # by --clip
    same = (slopes.abs() - grads.abs()).abs() <= 1e-3 + 1e-3 * slopes.abs()  # a coin may turn random's over
    if not (same | cut).all():
        raise ValueError(f"{c.out}: step {step + 1} has other projected gradients than its losses give")


def verify_masks(c: Config, problem: Problem | MultiTask, masks: dict[str, Tensor]) -> float:
    """Measure MaZO's masks again at the base weights -> the share of weights that are in one and not in the other."""
    again = unpacked(mask_file(c, problem, estimator(c, problem.lm)), problem.lm.weights)
    differ = sum(int((again[name] != mask).sum()) for name, mask in masks.items())
    return differ / sum(mask.numel() for mask in masks.values())


def verify_metrics(problem: Problem | MultiTask, result: dict, found: dict) -> None:
    """Measure dev and test again, with the weights of the lowest dev loss."""
    dev = problem.dev_quality()
    found["loss_difference"] = abs(dev.loss - result["dev_loss"])
    tests = problem.measured(problem.answered())
    found |= {"dev": dev.metric, "recorded_dev": result["dev"], "tests": tests, "recorded_tests": result["tests"]}


def allowed(flags: dict) -> float:
    """How far a loss that is computed again may be off, on another device or with other libraries: by the rounding of
    sums in fp32, or by that of activations."""
    return 1e-4 if flags["compute"] == "fp32" and flags["activations"] == "none" else 2e-2


def dry_run(c: Config) -> dict:
    """Print what a run would hold in memory, from shapes alone."""
    validate(c)
    raw = raw_config(c.model)
    longest = longest_sequence(c)
    masked = config_of(raw).masked
    predicted = predict(c, raw, longest or max(max_length(c, masked, task) for task in tasks_of(c)))
    if longest is None:
        print("no data or no tokenizer is here: sequences are taken to be as long as --max-length and the model allow")
    print(table(predicted))
    return predicted


def swept(c: Config) -> dict:
    """Run a sweep and print its table."""
    result = sweep(c, tell)
    print(table_of_sweep(result))
    return result


def action(c: Config) -> Callable[[Config], dict]:
    """What the flags ask for."""
    if c.resume or c.replay:  # a run has its own flags: given another one, it says so
        return replay if c.replay else run
    return swept if c.sweep else dry_run if c.dry_run else run


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for bad input, 130 for an interrupt (128 + SIGINT), and 1 for a run that diverged, a replay that
    came to other weights, a sweep of which a run failed, or a machine that gave out."""
    code, message = 0, ""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (Python has none where it was closed)
    try:
        c = parse(argv)
        if c.asks and not c.sweep:
            for line in ask(c):
                print(json.dumps(line, ensure_ascii=False))
            return 0
        result = action(c)(c)
        if result:
            print(json.dumps(result))
        failed = result.get("diverged") or result.get("failed") or not result.get("equal", True)
        code = 130 if result.get("interrupted") else 1 if failed else 0
    except ValueError as error:
        code, message = 2, str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        code, message = 1, f"out of memory; try a smaller --micro-batch-size, fewer bits or --no-graphs: {error}"
    except (OSError, SafetensorError) as error:  # of a full disk too
        code, message = 1, str(error) or repr(error)
    except RuntimeError as error:
        code, message = 1, of_the_machine(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted: stopped at once"
    if message:
        with suppress(OSError):
            print(f"train.py: {one_line(message)}", file=sys.stderr)
    return code


def of_the_machine(error: RuntimeError) -> str:
    """What to say of an error that is no bug, which only its text or its module tells; raises any other."""
    if "can't allocate memory" in str(error):
        return f"out of memory; try a smaller --micro-batch-size or fewer bits: {error}"
    if "gloo" in str(error):
        return f"another process of this run has ended: {error}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"the model cannot be compiled here, for want of a C++ compiler perhaps; try --no-compile: {error}"
    raise error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
