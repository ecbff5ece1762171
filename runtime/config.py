"""From a command to a config: each method's defaults filled in, and the checks that need no file.

A flag that is not given takes its method's default (runtime/flags.py).  Imports data, quant, tensor_train, and of
runtime checkpoints, flags, hub and json_files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from pathlib import Path

import torch

from data.tasks import TINY, Task, get_task
from quant import FLOATS, check_format
from runtime.checkpoints import stored_format
from runtime.flags import (
    ADAPTER_DEFAULTS,
    ADAPTERS,
    CALIBRATION,
    DEFAULTS,
    FAMILY,
    FILE_DEFAULTS,
    FIRST_ORDER,
    GRAPHABLE,
    OPTIMIZERS,
    SPARSE_DEFAULTS,
    TINY_DEFAULTS,
    Config,
    command_line,
)
from runtime.hub import PRESETS, check_known
from runtime.json_files import read_object, shown
from tensor_train import Spec, check_base


def parse(argv: list[str]) -> Config:
    """Raises ValueError for unknown flags and values."""
    given = vars(command_line().parse_args(argv))
    c = Config(**given)
    check_given(c, set(given))
    if c.evaluate is not None and not names_a_run(c.evaluate):
        c = dataclasses.replace(c, model=c.evaluate)
    return c if c.resume or c.replay or c.sweep or names_a_run(c.evaluate) else resolve_defaults(c)


def check_given(c: Config, given: set[str]) -> None:
    """Raises ValueError for flags that cannot stand beside one another in a command, whatever their values."""
    for name in ("resume", "replay", "evaluate", "predict", "export", "out", "model", "task"):
        if getattr(c, name) == "":
            raise ValueError(f"--{name} needs a name, got ''")
    if c.verify is not None and not c.replay:
        raise ValueError("--verify goes with --replay")
    allowed = {"resume", *MOVED} if c.resume else {"replay", "verify", *MOVED}
    if (c.resume or c.replay) and given - allowed:
        message = f"a run has its own flags: give --resume or --replay, and beside it at most {', '.join(MOVED)}"
        raise ValueError(f"{message}; got {', '.join(sorted(given))}")


def names_a_run(path: str | None) -> bool:
    return path is not None and (Path(path) / "trajectory").is_file()


def resolve_defaults(c: Config) -> Config:
    """Fill what was not given.  Everything that the run depends on is then in the config; the rest stays None."""
    optimizer = c.optimizer or OPTIMIZERS.get(c.method, "adamw")
    table = {"optimizer": optimizer} | DEFAULTS[c.method]
    if c.method in ADAPTERS and c.method != "adazeta":
        table |= ADAPTER_DEFAULTS[f"adapters by {optimizer}"]
    on_codes = c.model != "tiny" or c.weights in ("int4", "fp8")
    if c.method == "quzo" and on_codes or c.method in ON_CODES and (c.weights or "bf16") not in FLOATS:
        table["direction_bits"] = "sparse"
    bits = c.direction_bits or table.get("direction_bits")
    if bits == "sparse":
        case = " with rounded activations" if c.activations != "none" else " on int4" if c.weights == "int4" else ""
        table |= SPARSE_DEFAULTS["sparse" + (" on the embedded model" if c.model == "tiny" else case)]
    table["estimator"] = "q-rge2" if bits not in (None, "full", "sparse") else None
    table |= TINY_DEFAULTS[c.method] if c.model == "tiny" else {}
    if c.method == "adazeta" and c.queries is not None:  # a fixed number instead of the schedule
        table = {name: value for name, value in table.items() if name not in ("alpha", "beta", "max_queries")}
    elif c.method != "adazeta" and optimizer == "zo":
        table["queries"] = 1
    table["task"] = c.task or ("tiny" if c.model == "tiny" else "sst2")
    tasks = tasks_of(dataclasses.replace(c, task=table["task"]))
    if c.k or not all("dev" in task.files for task in tasks):
        table |= FILE_DEFAULTS["k-shot files" if c.k else "full files"]
        if not c.k and len(tasks) == 1:  # of several each has its own
            table["num_dev"] = tasks[0].num_dev
    if c.asks and c.weights is None:  # of a checkpoint, which is asked as it is
        weights, residual = as_stored(TINY / "model" if c.model == "tiny" else Path(c.model))
        c = dataclasses.replace(c, weights=weights, residual=residual)
    coarse = (c.weights or table["weights"]) in ("int4", "fp8") and c.method not in FIRST_ORDER
    table["calibrate"] = CALIBRATION if coarse and c.model != "tiny" else 0
    table["device"] = best_device() if c.device == "auto" else c.device
    name = f"{'-'.join(task.name for task in tasks)}-{Path(c.model).name}-{c.method}"
    table["out"] = f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}-{os.getpid()}"  # of runs that begin at once too
    c = dataclasses.replace(c, **{n: v for n, v in table.items() if getattr(c, n) in (None, "auto")})
    zo = optimizer == "zo" and c.device.startswith("cuda") and expects_triton() and c.objective == "loss"
    return dataclasses.replace(
        c,
        compute=default_compute(c) if c.compute == "auto" else c.compute,
        compile=zo and not grows(c) if c.compile is None else c.compile,
        graphs=zo and is_graphable(c) if c.graphs is None else c.graphs,
        micro_batch_size=c.batch_size if c.micro_batch_size is None else c.micro_batch_size,
    )


def is_graphable(c: Config) -> bool:
    """Whether a method's steps launch the same each time."""
    return c.method not in FAMILY or c.method in GRAPHABLE


ON_CODES = ("lezo", "elasticzo", "zo2")  # methods that are MeZO on floats and QuZO on codes


def as_stored(directory: Path) -> tuple[str, int]:
    try:
        return stored_format(read_object(directory / "config.json"))
    except (OSError, ValueError):
        return stored_format({})  # what is wrong is said when it is read


DRAWN = ("k", "data_seed", "num_train", "num_dev")  # how examples are drawn, where a task's files are not read whole


def each_task(c: Config) -> list[Config]:
    """The flags with each of --task's names alone, without those that mean nothing beside it."""
    alone = []
    for name, task in zip(c.task.split(","), tasks_of(c), strict=True):
        without = (DRAWN if "dev" in task.files else ()) + (("data_dir",) if task.folder else ())
        alone.append(dataclasses.replace(c, task=name, **dict.fromkeys(without)))
    return alone


def tasks_of(c: Config) -> list[Task]:
    return [get_task(name) for name in c.task.split(",")]


def max_length(c: Config, masked: bool, task: Task) -> int:
    """Tokens of the longest sequence; MeZO's, and LM-BFF's of masked models."""
    return c.max_length or (task.cloze_tokens if masked else 2048)


def expects_triton() -> bool:
    """Whether a run on cuda has Triton.  Where no GPU is here, the run is for another machine, which is taken to."""
    return not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def grows(c: Config) -> bool:
    """Whether a step's number of probes does, each of which would be compiled anew."""
    return c.method == "adazeta" and c.queries is None


def default_compute(c: Config) -> str:
    """The dtype of products where --compute does not say."""
    if not c.device.startswith("cuda") or c.weights == "fp32":
        return "fp32"
    new_enough = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
    return c.weights if suits_codes(c) and (new_enough or c.weights == "int8") else "bf16"


def suits_codes(c: Config) -> bool:
    """Whether blocks can multiply codes by codes.  A probe's weights are then codes, which a step of eps in every
    weight does not survive."""
    whole = c.method in ADAPTERS or c.direction_bits == "sparse" or c.probe == "codes"
    codes = c.weights in ("fp8", "int8") and c.activations == c.weights and not c.oracle
    return whole and codes and c.optimizer == "zo" and c.method != "elasticzo"  # whose tail is floats


MOVED = ("model", "task", "adapters", "data_dir", "device")  # what may be elsewhere when a run is taken up again


def recorded(c: Config, flags: dict) -> Config:
    """The flags of the run that --resume or --replay names, from its config.json.

    Raises ValueError for flags that are not ours, and for a replay of AdamW.
    """
    run, given = c.resume or c.replay, flags_given(c)
    check_flags(run, flags)
    if c.replay and flags["optimizer"] != "zo":
        raise ValueError(f"{run} cannot be replayed: only zeroth order's steps can be redone without a gradient")
    moved = {name: value for name, value in given.items() if name in MOVED}
    if flags["device"].startswith("cuda") and c.device == "cpu":  # updates are the same bits, losses within rounding
        moved |= {"graphs": False, "compile": False, "compute": "fp32"}
    return Config(**flags | moved | {"out": run, "verify": c.verify})


def of_the_run(c: Config, flags: dict) -> Config:
    """The flags of the run that --evaluate names, with those that were given beside it."""
    check_flags(c.evaluate, flags)
    given = flags_given(c)
    other = given.keys() - {*MOVED, "evaluate", "predict", "generate", "export", "show", "num_eval", "micro_batch_size"}
    its_own = (None, flags["task"], *flags["task"].split(","))
    if other or c.task not in its_own and not c.task.endswith(".json"):
        raise ValueError(f"a run has its own flags: give beside --evaluate at most {', '.join(MOVED)}, num_eval, "
                         f"micro_batch_size and one question; got {', '.join(sorted(other or {'task'}))}")  # fmt: skip
    given["device"] = best_device() if c.device == "auto" else c.device
    given |= {"compile": False, "graphs": False}
    # codes are saved as they were rounded, but those around which adapters were trained are not saved
    given["calibrate"] = flags["calibrate"] if flags["method"] in ADAPTERS else 0
    c = Config(**flags | given)
    return each_task(c)[0] if "," in flags["task"] and "," not in c.task else c  # one of the run's several


def flags_given(c: Config) -> dict[str, object]:
    """What a command says, where it names a run and so has no defaults filled in."""
    return {f.name: getattr(c, f.name) for f in dataclasses.fields(Config) if getattr(c, f.name) != f.default}


def spelled(c: Config) -> list[str]:
    """The command line that says the same, of flags without defaults filled in."""
    words = []
    for name, value in flags_given(c).items():
        name = name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


TYPES = {"int": int, "float": int | float, "str": str, "bool": bool, "list[str]": list}


def check_flags(run: str, flags: dict) -> None:
    """Raises ValueError for flags of a recorded run that are not ours, or of another type."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    differ = set(flags) ^ set(fields)
    if differ:
        raise ValueError(f"{run} was made by another version: flags differ in {', '.join(map(shown, sorted(differ)))}")
    for name, value in flags.items():
        if value is None and fields[name].type.endswith("| None"):
            continue
        kind, choices = fields[name].type.removesuffix(" | None"), fields[name].metadata["choices"]
        typed = isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "bool")
        if not typed or choices and value not in choices:
            raise ValueError(f"{run}: its flag {name} cannot be {shown(value)}")


COUNT = (1, 2**31 - 1)
RANGES = {
    "steps": COUNT, "batch_size": (1, 2**20), "micro_batch_size": (1, 2**20), "eval_every": COUNT, "num_train": COUNT,
    "num_dev": COUNT, "num_eval": COUNT, "k": COUNT, "max_length": COUNT, "queries": (1, 2**20),
    "probes_per_forward": COUNT, "max_queries": (1, 2**20), "alpha": (0, 1e6), "beta": (0, 10),
    "show": COUNT, "calibrate": (0, 2**20), "bottleneck": (1, 2**16), "tt_rank": (1, 2**12), "lora_rank": (1, 2**16),
    "lora_alpha": (1e-6, 1e6), "lr": (0, 1e6), "eps": (1e-8, 1e3), "cell": (8, 2**30), "clip": (0.1, 1e6),
    "weight_decay": (0, 1e3), "seed": (0, 2**64 - 1), "data_seed": (0, 2**32 - 1), "warmup": (0, COUNT[1]),
    "jobs": (1, 1024), "verify": COUNT, "subspace_rank": (1, 256), "subspace_steps": COUNT, "share": (1e-3, 1),
    "anchor_steps": COUNT, "anchor_rate": (1e-6, 1e6), "mask_share": (1e-3, 1), "tail_blocks": (0, 2**16),
    "tail_rate": (0, 1e6),
}  # fmt: skip


def validate(c: Config) -> None:
    """Raises ValueError for bad ranges and combinations; what files hold is checked where it is read."""
    check_known(c.model)
    if c.model not in PRESETS:
        check_base(Path(c.model))
    for name, (low, high) in RANGES.items():
        value = getattr(c, name)
        if value is not None and not low <= value <= high:  # NaN fails too
            raise ValueError(f"--{name.replace('_', '-')} must be in [{low}, {high}], got {value}")
    check_tasks(c)
    check_format(c.weights, c.residual, c.oracle)
    check_method(c)
    check_products(c)
    if c.warmup >= c.steps:
        raise ValueError(f"--warmup {c.warmup} leaves none of --steps {c.steps} at the full rate")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", c.device):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {c.device!r}")
    if c.device != "cpu" and not c.dry_run and int(c.device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {c.device}: torch sees {torch.cuda.device_count()} CUDA devices here")


def check_tasks(c: Config) -> None:
    """Raises ValueError for flags that mean nothing beside the tasks, and for tasks that cannot share a batch."""
    tasks = tasks_of(c)
    own, whole = all(task.folder for task in tasks), all("dev" in task.files for task in tasks)
    for names, beside in (
        (("data_dir",) if own else (), f"task {c.task}, which has its own files"),
        (("num_train", "num_dev") if c.k else (), "--k, which says how many examples there are"),
        (DRAWN if whole else (), f"task {c.task}, whose files are read whole"),
    ):
        for name in names:
            if getattr(c, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} means nothing beside {beside}")
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"--task {c.task} names a task twice (a .json file's task has its name)")
    if c.batch_size % len(tasks):
        raise ValueError(f"--batch-size {c.batch_size} cannot be shared equally by {len(tasks)} tasks: take "
                         f"{-(-c.batch_size // len(tasks)) * len(tasks)}")  # fmt: skip
    if len(tasks) > 1 and (c.method == "mezo-svrg" or c.predict is not None):
        what = "--predict" if c.predict is not None else "--method mezo-svrg"
        raise ValueError(f"{what} is for one task: give one of --task {c.task}")


def probes_per_forward(c: Config) -> int | None:
    """How many of a step's 2 Q perturbed copies share a forward: of adapters all (None), but not on a CPU, whose cache
    they would overflow (benchmarks/probes.py)."""
    if c.objective != "loss" and any(task.generates for task in tasks_of(c)):
        return 1  # what one copy writes is not what another does
    return c.probes_per_forward or (None if c.method in ADAPTERS and c.device != "cpu" else 2)


def spec_of(c: Config, model_type: str) -> Spec | None:
    """The adapters of a run on this type of model, if it trains any."""
    if c.method not in ADAPTERS:
        return None
    placement = c.placement or ("mlp" if model_type == "llama" else "sublayers")  # as the papers' code has them
    placement = placement if ADAPTERS[c.method] == "adp" else "qv"
    return Spec(
        ADAPTERS[c.method], placement, c.bottleneck or 0, c.tt_rank or c.lora_rank, c.lora_alpha or 1.0,
        norms=c.norms, identity=c.init == "identity",
    )  # fmt: skip


def meaningless_flags(c: Config) -> list[str]:
    """Flags that mean nothing beside the method."""
    zo, kind = c.optimizer == "zo", ADAPTERS.get(c.method)
    groups = {
        ("direction_bits", "eps", "cell", "clip", "queries", "estimator", "probes_per_forward"): zo,
        ("residual", "oracle", "probe", "rounding"): zo and not kind,  # adapters are floats
        ("weight_decay",): c.method in FIRST_ORDER,
        ("master",): c.method == "fo-ste",
        ("subspace_rank", "subspace_steps"): c.method == "subzero",
        ("share", "rest", "bandit"): c.method == "lezo",
        ("anchor_steps", "anchor_rate"): c.method == "mezo-svrg",
        ("tail_blocks", "tail_rate"): c.method == "elasticzo",
        ("mask_share",): c.method == "mazo",
        ("alpha", "beta", "max_queries"): c.method == "adazeta" and c.queries is None,
        ("placement",): kind == "adp",
        ("bottleneck", "tt_rank"): kind in ("adp", "rep"),
        ("lora_rank",): kind == "lora",
        ("lora_alpha",): kind in ("rep", "lora"),
        ("init", "norms", "adapters"): kind,
    }
    return [name for names, meant in groups.items() if not meant for name in names]


def check_method(c: Config) -> None:
    """Raises ValueError for flags that contradict the method or one another."""
    fixed = OPTIMIZERS.get(c.method) or ("adamw" if c.method in FIRST_ORDER else c.optimizer)
    if c.optimizer != fixed:
        raise ValueError(f"--method {c.method} means --optimizer {fixed}, got {c.optimizer}")
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for name in meaningless_flags(c):
        if getattr(c, name) != defaults[name]:
            beside = f"--method {c.method}" + (f" --optimizer {c.optimizer}" if c.method in ADAPTERS else "")
            raise ValueError(f"--{name.replace('_', '-')} means nothing beside {beside}")
    if c.method in ADAPTERS and c.direction_bits == "sparse":
        raise ValueError("--direction-bits sparse is for codes; adapters are floats: use full or 2 to 8")
    if c.method in ("mezo", "fo") and c.weights not in FLOATS:
        instead = "quzo" if c.method == "mezo" else "fo-ste"
        raise ValueError(f"--method {c.method} keeps weights in fp32 or bf16; use {instead} for {c.weights}")
    if c.calibrate and (c.weights in FLOATS or c.method in FIRST_ORDER):
        raise ValueError(f"--calibrate is about codes that stay; --method {c.method} --weights {c.weights} has none")
    if c.method == "fo-ste" and c.weights in FLOATS:
        raise ValueError(f"--method fo-ste fake-quantises its weights; use fo for {c.weights}")
    if c.method == "mezo" and c.direction_bits != "full":
        raise ValueError(f"--method mezo means Gaussian directions; use quzo for --direction-bits {c.direction_bits}")
    if c.optimizer == "zo":
        check_estimator(c)


def check_products(c: Config) -> None:
    """Raises ValueError for ways of computing, and of asking, that the rest does not suit."""
    asked = [name for name in ("show", "predict", "generate", "export") if getattr(c, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"one question at a time, got --{' and --'.join(asked)}")
    if c.log == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--log tensorboard needs its package: pip install tensorboard")
    if c.objective != "loss" and c.optimizer != "zo":
        raise ValueError(f"--objective {c.objective} has no gradient: it is for --optimizer zo")
    if c.compute in ("fp8", "int8") and not (suits_codes(c) and c.weights == c.compute):
        raise ValueError(f"--compute {c.compute} multiplies codes by codes: --weights {c.compute} --activations "
                         f"{c.compute}, trained by zo, all weights with --direction-bits sparse or --probe codes"
                         )  # fmt: skip
    if (c.graphs or c.compile) and c.device.startswith("cuda") and not expects_triton():
        raise ValueError("--graphs and --compile need Triton on cuda, and it is not installed")
    if c.graphs and (c.optimizer != "zo" or not c.device.startswith("cuda") or not is_graphable(c)):
        steps = " and ".join(GRAPHABLE)
        raise ValueError(f"--graphs are for zo on cuda, and of the methods of family/ for {steps} alone")
    if c.compile and grows(c):
        raise ValueError("--compile makes code for each number of probes, which grows here: give --queries")


def check_estimator(c: Config) -> None:
    """Raises ValueError for flags of the estimate that contradict one another."""
    check_family(c)
    if c.estimator in ("q-rge1", "q-rge2") and c.direction_bits in ("full", "sparse"):
        raise ValueError(f"--estimator {c.estimator} is about rounding directions, which --direction-bits "
                         f"{c.direction_bits} does not: use 2 to 8")  # fmt: skip
    if (c.cell is not None) != (c.direction_bits == "sparse"):
        raise ValueError(f"--cell needs --direction-bits sparse, got {c.direction_bits}")
    if c.cell and c.cell & c.cell - 1:
        raise ValueError(f"--cell must be a power of two, got {c.cell}")
    if c.objective != "loss" and c.graphs:
        raise ValueError(f"--objective {c.objective} is no fixed list of launches: use --no-graphs")
    if c.direction_bits == "sparse" and (c.probe == "codes" or c.rounding == "nearest"):
        raise ValueError("--probe codes and --rounding nearest are not for --direction-bits sparse: use 2 to 8 bits")
    if c.weights == "fp32" and (c.rounding == "nearest" or c.probe == "codes"):
        raise ValueError("--rounding nearest and --probe codes mean nothing beside --weights fp32: nothing is rounded")


def check_family(c: Config) -> None:
    """Raises ValueError for flags that a method of family/ has its own of."""
    if c.method in ("subzero", "mazo", "elasticzo") and c.compute in ("fp8", "int8"):
        raise ValueError(f"--method {c.method} multiplies floats, not codes: leave out --compute {c.compute}")
    if c.method == "subzero" and (c.direction_bits != "full" or c.probe == "codes"):
        given = "--probe codes" if c.direction_bits == "full" else f"--direction-bits {c.direction_bits}"
        raise ValueError(f"--method subzero has directions of its own: leave out {given}")
    if c.method == "elasticzo" and c.rounding == "nearest":
        raise ValueError("--method elasticzo lands its tail by stochastic rounding: leave out --rounding nearest")
    if c.method == "elasticzo" and c.objective != "loss":
        raise ValueError(f"--method elasticzo takes a gradient, and --objective {c.objective} has none: leave it out")
    if c.method == "mazo" and (c.direction_bits == "sparse" or c.probe == "codes"):
        given = "--probe codes" if c.probe == "codes" else "--direction-bits sparse"
        raise ValueError(f"--method mazo masks dense directions of floats: leave out {given}")
    if c.method == "mezo-svrg":
        for wrong, given in ((c.direction_bits == "sparse", "--direction-bits sparse"), (c.clip is not None, "--clip"),
                             (c.queries != 1, f"--queries {c.queries}")):  # fmt: skip
            if wrong:
                raise ValueError(f"--method mezo-svrg has one query and dense directions, unclipped: leave out {given}")
