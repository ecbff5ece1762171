"""The flags: one dataclass with all of them, each method's defaults, and the parser made of both.

Without torch, so that --help is there at once; runtime/config.py goes on from here.  Imports data.tasks and
runtime.hub.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from data.tasks import TASKS
from runtime.hub import PRESETS

# quant's, which imports torch; tests/test_structure.py holds them equal
FORMATS, FLOATS = ("fp32", "bf16", "int8", "int4", "fp8"), ("fp32", "bf16")
RESIDUALS, ACTIVATIONS = (0, 1, 2, 4, 8), ("none", "int8", "fp8")

ADAPTERS = {"loretta-adp": "adp", "adazeta": "adp", "loretta-rep": "rep", "lora": "lora"}  # method: kind
FIRST_ORDER = ("fo", "fo-ste")  # of all weights; adapters are trained by either optimizer
FAMILY = ("subzero", "lezo", "mezo-svrg", "mazo", "elasticzo", "zo2")  # of all weights, by zeroth order: family/
GRAPHABLE = ("subzero", "mazo")  # of these, those whose steps launch the same each time (ZO.graphable)
METHODS = ("quzo", "mezo", *FAMILY, *FIRST_ORDER, *ADAPTERS)
DIRECTION_BITS = ("full", "sparse", *map(str, range(2, 9)))


def flag(group: str, default, help: str, choices: tuple = ()):
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices or None})


OBJECTIVES = ("loss", "accuracy", "f1", "reward")


@dataclass(frozen=True)
class Config:
    """Every flag.  None: from DEFAULTS where it has an entry for the method, else it does not apply."""

    model: str = flag("model and data", "tiny", f"a checkpoint directory, or one of {', '.join(PRESETS)}")
    task: str | None = flag("model and data", None, f"what to learn: {', '.join(TASKS)}; a .json file "
                             "that describes your own (docs/own_data.md); or several of them, as in sst2,rte, of which "
                             "a batch has equal shares [tiny for the tiny model, else sst2]"
                             )  # fmt: skip
    data_dir: str | None = flag("model and data", None, "folder of the official files, SST-2/train.tsv and so on "
                                "[datasets, else a cache into which the archives are fetched]")  # fmt: skip
    k: int | None = flag("model and data", None, "examples a class, from the k-shot files, "
                                                 "k-shot/SST-2/512-42/train.tsv and so on")  # fmt: skip
    data_seed: int | None = flag("model and data", None, "which k-shot split, or the seed of the draw from full files")
    num_train: int | None = flag("model and data", None, "training examples drawn from the full files")
    num_dev: int | None = flag("model and data", None, "dev examples drawn from the full files")
    num_eval: int = flag("model and data", 1000, "test examples at most")
    max_length: int | None = flag("model and data", None, "longest sequence in tokens, at most the model's own limit "
                                                          "[2048, of masked models 128 or 256]")  # fmt: skip

    method: str = flag("method", "quzo", "quzo: low-bit directions and weights; mezo: Gaussian directions; fo: AdamW; "
                                         "fo-ste: AdamW through fake-quantised weights; subzero, lezo, mezo-svrg, "
                                         "mazo, elasticzo, zo2: family/; the others train adapters around frozen "
                                         "weights", METHODS)  # fmt: skip
    optimizer: str | None = flag("method", None, "zo: forward passes only; adamw: back-propagation", ("zo", "adamw"))
    weights: str | None = flag("method", None, "how matrices are stored", FORMATS)
    activations: str = flag("method", "none", "how the input of every linear layer is rounded, one scale a token",
                            ACTIVATIONS)  # fmt: skip
    residual: int = flag("method", 0, "extra bits a weight that steps land on and forwards do not read; int8 and int4",
                         RESIDUALS)  # fmt: skip
    calibrate: int | None = flag("method", None, "training prompts whose forward passes decide how weights are "
                                 "rounded to codes at the start (GPTQ); 0: each to its nearest code")  # fmt: skip
    master: str | None = flag("method", None, "the format in which fo-ste keeps weights and AdamW's moments; bf16 "
                                              "rounds steps to nearest, which loses small ones", FLOATS)  # fmt: skip

    direction_bits: str | None = flag("zeroth-order estimate", None, "bits of a direction's codes (the paper's); full: "
                                      "Gaussian; sparse: few weights, by whole spacings of their own grid (ours)",
                                      DIRECTION_BITS)  # fmt: skip
    eps: float | None = flag("zeroth-order estimate", None, "size of a probe, in weight units")
    cell: int | None = flag("zeroth-order estimate", None, "of sparse directions: of how many neighbouring weights one "
                                                           "is moved, a power of two")  # fmt: skip
    clip: float | None = flag("zeroth-order estimate", None, "hold projected gradients within this many times the root "
                                                             "mean square of all before (ours)")  # fmt: skip
    queries: int | None = flag("zeroth-order estimate", None, "directions a step, averaged; of adazeta: instead of its "
                                                              "growing number")  # fmt: skip
    alpha: float | None = flag("zeroth-order estimate", None, "adazeta asks min(max(floor(alpha * epoch^beta), 1), "
                                                              "max-queries) directions a step")  # fmt: skip
    beta: float | None = flag("zeroth-order estimate", None, "see --alpha; the released command comes to 0.622 and 15 "
                                                             "queries")  # fmt: skip
    max_queries: int | None = flag("zeroth-order estimate", None, "the most directions a step; see --alpha")
    probes_per_forward: int | None = flag("zeroth-order estimate", None, "of the two a direction, to bound memory (2; "
                                          "all of them where only adapters are trained, on a GPU)")  # fmt: skip

    subspace_rank: int | None = flag("family", None, "of subzero: the rank of a matrix's directions")
    subspace_steps: int | None = flag("family", None, "of subzero: for how many steps a matrix moves in one subspace")
    share: float | None = flag("family", None, "of lezo: the share of blocks that a step probes and moves")
    rest: bool | None = flag("family", None, "of lezo: whether what is in no block moves too (the paper's); without it "
                                             "both signs share the forward up to the first active block (ours)"
                             )  # fmt: skip
    bandit: bool | None = flag("family", None, "of lezo: a bandit chooses the blocks (AdaLeZO)")

    anchor_steps: int | None = flag("family", None, "of mezo-svrg: for how many steps an anchor stays")
    anchor_rate: float | None = flag("family", None, "of mezo-svrg: the rate of an anchor's step over --lr")
    mask_share: float | None = flag("family", None, "of mazo: the share of each row's weights that moves, the most "
                                                    "important ones of all tasks")  # fmt: skip
    tail_blocks: int | None = flag("family", None, "of elasticzo: how many of the last blocks are trained by "
                                                   "back-propagation, beside what comes after them")  # fmt: skip
    tail_rate: float | None = flag("family", None, "of elasticzo: Adam's rate, in those, over --lr")

    steps: int | None = flag("steps", None, "number of updates")
    lr: float | None = flag("steps", None, "learning rate; of zeroth order, unless given, what the first 32 projected "
                                            "gradients ask for (zo_optim.measured_rate, ours)")  # fmt: skip
    lr_schedule: str | None = flag("steps", None, "constant, or linear down to 0", ("constant", "linear"))
    warmup: int = flag("steps", 0, "first steps, in which the learning rate rises from 0")
    weight_decay: float | None = flag("steps", None, "AdamW's, on matrices")
    objective: str = flag("steps", "loss", "what is made smaller: the task's loss; or, without a gradient, 1 less "
                                           "accuracy, f1, or reward, the task's own metric", OBJECTIVES)  # fmt: skip
    batch_size: int | None = flag("steps", None, "examples a step")
    micro_batch_size: int | None = flag("steps", None, "examples a forward, to bound memory (batch-size); the losses "
                                                       "change by rounding only")  # fmt: skip
    eval_every: int | None = flag("steps", None, "steps between dev evaluations")
    seed: int = flag("steps", 0, "decides directions, roundings, the order of the data and the adapters' start")

    placement: str | None = flag("adapters", None, "where tensor-train adapters are: around gate, up, down, or after "
                                 "attention and feed-forward (mlp on llama, sublayers on roberta)",
                                 ("mlp", "sublayers"))  # fmt: skip
    bottleneck: int | None = flag("adapters", None, "width between a tensor-train adapter's two layers")
    tt_rank: int | None = flag("adapters", None, "rank of all bonds between a tensor train's cores")
    lora_rank: int | None = flag("adapters", None, "rank of LoRA's two matrices")
    lora_alpha: float | None = flag("adapters", None, "lora and loretta-rep scale their branch by this over rank or "
                                                      "bottleneck")  # fmt: skip
    norms: bool | None = flag("adapters", None, "train the model's norms beside the adapters")
    init: str | None = flag("adapters", None, "identity: training starts from the model as it is; released: as in the "
                                              "papers' code", ("identity", "released"))  # fmt: skip
    adapters: str | None = flag("adapters", None, "a folder of adapters to train on, a run's model/ or LoRA of PEFT's, "
                                                  "which the other flags must describe")  # fmt: skip

    estimator: str | None = flag("ablations", None, "q-rge2: probe and step round a direction apart, as in the paper; "
                                 "q-rge1: once; random: a control that turns projected gradients over by coin [q-rge2 "
                                 "for 2 to 8 bits]", ("q-rge2", "q-rge1", "random"))  # fmt: skip
    probe: str = flag("ablations", "float", "float: w + eps u; codes: that, rounded onto the weights' grid",
                      ("float", "codes"))  # fmt: skip
    rounding: str = flag("ablations", "stochastic", "how a step lands; nearest is there to show why it fails",
                         ("stochastic", "nearest"))  # fmt: skip
    oracle: bool = flag("ablations", False, "keep integer codes as fake-quantised fp32: slower, to the same bits")

    device: str = flag("machine", "auto", "cpu, cuda, cuda:N, or auto")
    compute: str = flag("machine", "auto", "what matrices are multiplied in; auto: fp32 on a CPU and for fp32 weights; "
                                           "on cuda fp8 or int8 for such weights, activations and sparse "
                                           "directions, else bf16", ("auto", "fp32", "bf16", "fp8", "int8")
                               )  # fmt: skip
    compile: bool | None = flag("machine", None, "compile the model's block, the same for all layers and lengths; on "
                                                 "for zo on cuda with a fixed number of queries")  # fmt: skip
    graphs: bool | None = flag("machine", None, "record a step's launches as CUDA graphs, one for each length of a "
                                                "batch, in eights; on for zo on cuda, of family/ for subzero and mazo"
                               )  # fmt: skip

    out: str | None = flag("run", None, "run folder; must be new or empty (runs/DATE-TIME-...)")
    resume: str | None = flag("run", None, "a run folder whose run was interrupted: finish it there, to the same bits "
                                           "(where nothing is compiled), with its own flags (zeroth order)"
                              )  # fmt: skip
    replay: str | None = flag("run", None, "a run folder: redo its updates from the base weights without a forward, "
                                           "and say whether all is as it recorded")  # fmt: skip
    verify: int | None = flag("run", None, "with --replay: compute the losses of so many steps again, and the metrics "
                                           "on dev and test")  # fmt: skip
    sweep: list[str] | None = flag("run", None, "NAME=VALUE,VALUE ...: a run for each combination, lr=1e-5,2e-5 "
                                   "seed=0,1,2, of on/off flags true,false; the best by dev loss, and a table"
                                   )  # fmt: skip
    jobs: int = flag("run", 1, "runs of a sweep at a time")
    log: str | None = flag("run", None, "write events for TensorBoard too, beside metrics.jsonl and metrics.csv",
                           ("tensorboard",))  # fmt: skip
    show: int | None = flag("instead of a run", None, "print the first examples as the model reads them, and stop")
    evaluate: str | None = flag("instead of a run", None, "a run folder or a checkpoint directory: its metrics on dev "
                                                          "and test, or what the next flags ask of it")  # fmt: skip
    predict: str | None = flag("instead of a run", None, "a .jsonl, .csv or .tsv file: what --evaluate's or --model's "
                                                         "weights answer to each of its rows")  # fmt: skip
    generate: str | None = flag("instead of a run", None, "a text, which they continue")
    export: str | None = flag("instead of a run", None, "a new directory: a plain checkpoint of them for transformers, "
                                                        "adapters merged where they can be")  # fmt: skip
    dry_run: bool = flag("run", False, "print what the run would hold in memory, from shapes alone, and stop")


    @property
    def asks(self) -> bool:
        """Whether a model is asked something instead of trained."""
        return any(value is not None for value in (self.show, self.evaluate, self.predict, self.generate, self.export))


# MeZO: its paper's OPT recipe.  QuZO: its released Llama-2-7B full-parameter SST-2 script, which is for int4; int8
# weights and the evaluation interval are ours.  First order: MeZO's recipe for it, 5 epochs of 1,000 examples; fo-ste
# the same with QuZO's weights.  Tiny: ours, tuned on dev.  The rates of zeroth order (1e-6 of MeZO and QuZO, 1e-4 of
# AdaZeta and MeZO-LoRA) are for large models: zo_optim.measured_rate takes their place.
DEFAULTS = {
    "mezo": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3,
                 batch_size=16, eval_every=4000),
    "quzo": dict(weights="int8", direction_bits="4", steps=6000, lr_schedule="linear", eps=1e-3,
                 batch_size=16, eval_every=1000),
    "subzero": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3,
                    batch_size=16, eval_every=4000, subspace_rank=24, subspace_steps=1000),
    "lezo": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3,
                 batch_size=16, eval_every=4000, share=0.25, rest=True, bandit=False),
    "mezo-svrg": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3, lr=1e-6,
                      batch_size=64, eval_every=4000, anchor_steps=2, anchor_rate=1000.0),
    "mazo": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3,
                 batch_size=16, eval_every=4000, mask_share=0.5),
    "elasticzo": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3,
                      batch_size=16, eval_every=4000, tail_blocks=1, tail_rate=3.0),
    "zo2": dict(weights="bf16", direction_bits="full", steps=20000, lr_schedule="constant", eps=1e-3,
                batch_size=16, eval_every=4000),
    "fo": dict(weights="fp32", steps=625, lr=1e-5, lr_schedule="linear", weight_decay=0.0, batch_size=8,
               eval_every=125),
    "fo-ste": dict(weights="int8", master="fp32", steps=625, lr=1e-5, lr_schedule="linear", weight_decay=0.0,
                   batch_size=8, eval_every=125),
    "adazeta": dict(weights="bf16", steps=10000, lr_schedule="constant", eps=1e-3, batch_size=16, eval_every=200,
                    direction_bits="full", alpha=0.85, beta=0.45, max_queries=20, bottleneck=64,
                    tt_rank=5, norms=False, init="identity"),
    "loretta-adp": dict(weights="bf16", bottleneck=64, tt_rank=5, norms=True, init="identity"),
    "loretta-rep": dict(weights="bf16", bottleneck=8, tt_rank=8, lora_alpha=16.0, norms=True, init="identity"),
    "lora": dict(weights="bf16", lora_rank=8, lora_alpha=16.0, norms=False, init="identity"),
}  # fmt: skip
OPTIMIZERS = dict.fromkeys(("quzo", "mezo", *FAMILY, "adazeta"), "zo")  # of the others AdamW, as in the papers
ADAPTER_DEFAULTS = {  # LoRETTA's large-model script, but for its evaluations; MeZO's OPT recipe for LoRA
    "adapters by adamw": dict(steps=375, lr=1e-4, lr_schedule="constant", batch_size=8, eval_every=125),
    "adapters by zo": dict(steps=20000, lr_schedule="constant", eps=1e-2, batch_size=16, eval_every=4000,
                           direction_bits="full"),
}  # fmt: skip
TINY_DEFAULTS = {
    "mezo": dict(weights="fp32", steps=500, lr=3e-4, eval_every=25, batch_size=32),
    "quzo": dict(steps=500, lr=6e-4, eps=1e-3, eval_every=25, batch_size=32),
    "subzero": dict(weights="fp32", steps=500, lr=3e-4, eval_every=25, batch_size=32, subspace_rank=8,
                    subspace_steps=50),
    "lezo": dict(weights="fp32", steps=500, lr=3e-4, eval_every=25, batch_size=32, share=0.5),
    "mezo-svrg": dict(weights="fp32", steps=100, lr=3e-4, eval_every=25, batch_size=32, anchor_rate=1.0),
    "mazo": dict(weights="fp32", steps=500, lr=6e-4, eval_every=25, batch_size=32),
    "elasticzo": dict(weights="fp32", steps=200, lr=3e-4, eval_every=25, batch_size=32),
    "zo2": dict(weights="fp32", steps=500, lr=3e-4, eval_every=25, batch_size=32),
    "fo": dict(steps=100, lr=1e-3, eval_every=25, batch_size=32),
    "fo-ste": dict(steps=100, lr=1e-3, eval_every=25, batch_size=32),
    "adazeta": dict(weights="fp32", steps=500, lr=1e-2, eval_every=50, batch_size=32),
    "loretta-adp": dict(weights="fp32", steps=150, lr=1e-2, eval_every=25, batch_size=32),
    "loretta-rep": dict(weights="fp32", steps=300, lr=1e-2, eval_every=25, batch_size=32),
    "lora": dict(weights="fp32", steps=150, lr=3e-3, eval_every=25, batch_size=32),
}
# On codes of a real model a step in every weight drowns in its rounding (docs/directions.md): ours is the default, but
# for QuZO on the embedded model's int8, whose directions are the paper's.  A step moves an int4 code by lr |g| / eps
# codes, which a small eps makes 1 or more, so that little is rounded; rounded activations would drown so small a probe.
# One weight's move before the largest activations changes the loss a hundred times what another's does: hence the clip.
SPARSE_DEFAULTS = {
    "sparse": dict(eps=1e-3, cell=1024, clip=3.0), "sparse on int4": dict(eps=2.5e-4, cell=256, clip=3.0),
    "sparse with rounded activations": dict(eps=2e-3, cell=256, clip=3.0),
    "sparse on the embedded model": dict(eps=1e-3, cell=64, clip=3.0),
}  # fmt: skip

CALIBRATION = 1024  # prompts, where a format is coarse enough to need any: int4 and fp8 of a real model

FILE_DEFAULTS = {  # of tasks that are read from files: which few-shot split, or how MeZO draws from the full ones
    "k-shot files": dict(data_seed=42),
    "full files": dict(data_seed=0, num_train=1000),
}


DESCRIPTION = """Fine-tune a language model with forward passes only, and by back-propagation to compare.  A flag that
is not given takes the default in square brackets, by method where methods differ; after "tiny" stands that of the
embedded model."""
ABLATIONS = "These take one idea away to show what it is for; the papers' methods and ours need none of them."


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def command_line() -> OneLineParser:
    """What reads a command: it raises ValueError for unknown flags and values."""
    parser = OneLineParser("train.py", "train.py [flags]", DESCRIPTION, allow_abbrev=False)
    kinds, groups = {"int": int, "float": float, "str": str}, {}
    for f in dataclasses.fields(Config):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title, ABLATIONS if title == "ablations" else None)
        options = {"help": f.metadata["help"] + default_text(f)}
        if f.type.startswith("bool"):  # type=bool would read "False" as True
            options |= {"action": argparse.BooleanOptionalAction}
        elif f.type.startswith("list"):
            options |= {"nargs": "+"}
        else:
            options |= {"type": kinds[f.type.removesuffix(" | None")], "choices": f.metadata["choices"]}
        groups[title].add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options)
    return parser


def default_text(f: dataclasses.Field) -> str:
    """A flag's default for --help: its own, or one by method or by files; in brackets the embedded model's."""
    name = f.name
    if f.default is not None:
        return f" [{f.default}]"
    tiny = {case: f", tiny {table[name]}" for case, table in TINY_DEFAULTS.items() if name in table}
    tables = DEFAULTS | ADAPTER_DEFAULTS | SPARSE_DEFAULTS | FILE_DEFAULTS
    defaults = [f"{case} {table[name]}{tiny.get(case, '')}" for case, table in tables.items() if name in table]
    return f" [{'; '.join(defaults)}]" if defaults else ""
