"""Tensor-train layers, and the adapters that LoRETTA, AdaZeta and LoRA put around a frozen model.

A matrix W [I, O] is read as a d-way tensor k_1 x ... x k_d with k_1 ... k_d = I O and kept as a chain of small cores
(LoRETTA, NAACL 2024, section 3; Oseledets, 2011):

    W[i_1 ... i_d] = G_1[:, i_1, :] G_2[:, i_2, :] ... G_d[:, i_d, :],    G_j [r_{j-1}, k_j, r_j],    r_0 = r_d = 1

Every module here takes weights with a leading axis of perturbed copies, as those of model.py do, so that the 2Q small
adapters of a step run beside one large batch of the frozen model.  Adapters compute in float32 whatever the model
computes in.

Shape key: P perturbed copies, N tokens, I in, O out, k factors, r ranks, d cores.  Imports quant, random_bits, model,
and of runtime checkpoints and json_files.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from model import LanguageModel, View
from quant import Float, Store
from random_bits import tensor_id
from runtime.checkpoints import check_names, find_tensors, read_tensors, weights_sha256, write_directory
from runtime.json_files import read_object

# ---------------------------------------------------------------- factorisations

MAX_FACTOR = 16  # where the number has factors so small
TABLE = {  # (I, O): the factors that the papers' code uses, where their product is I O; (O, I) is the reverse
    (768, 64): (8, 8, 12, 8, 8), (1024, 64): (4, 8, 8, 8, 8, 4), (4096, 64): (16, 16, 16, 4, 4, 4),
    (5120, 64): (5, 8, 8, 16, 8, 8), (8192, 64): (4, 16, 16, 16, 8, 4),
    (768, 8): (8, 8, 12, 8), (1024, 8): (4, 8, 8, 8, 4), (4096, 8): (16, 16, 8, 4, 4), (5120, 8): (8, 8, 10, 8, 8),
    (8192, 8): (4, 16, 16, 16, 4), (768, 16): (8, 8, 12, 4, 4), (4096, 16): (16, 16, 16, 4, 4),
}  # fmt: skip


def factors_of(inputs: int, outputs: int) -> tuple[int, ...]:
    """k_1 ... k_d for a matrix [I, O]: the papers' where they have one, else balanced ones of I, then of O."""
    if (inputs, outputs) in TABLE:
        return TABLE[inputs, outputs]
    if (outputs, inputs) in TABLE:
        return TABLE[outputs, inputs][::-1]
    return balanced(inputs) + balanced(outputs)[::-1]


def balanced(n: int) -> tuple[int, ...]:
    """Ascending factors of n: as few as keep each at most 16, then as equal as can be.  A larger prime stays whole.

    512 -> 8 8 8, 768 -> 8 8 12, 3584 -> 14 16 16, 50 -> 5 10.
    """
    primes = _primes(n)
    small = math.prod(p for p in primes if p <= MAX_FACTOR)
    for count in range(1, len(primes) + 1):
        found = [f for f in _splits(small, count, 2) if f[-1] <= MAX_FACTOR]
        if found:
            return tuple(sorted([*min(found, key=lambda f: (f[-1] - f[0], f)), *(p for p in primes if p > MAX_FACTOR)]))
    return tuple(sorted(p for p in primes if p > MAX_FACTOR)) or (1,)


def _primes(n: int) -> list[int]:
    found, p = [], 2
    while p * p <= n:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found + [n] * (n > 1)


def _splits(n: int, count: int, least: int) -> Iterable[tuple[int, ...]]:
    """All ascending factorisations of n into `count` factors of at least `least`."""
    if count == 1:
        if n >= least:
            yield (n,)
        return
    for first in range(least, min(MAX_FACTOR, round(n ** (1 / count))) + 1):
        if n % first == 0:
            yield from ((first, *rest) for rest in _splits(n // first, count - 1, first))


# ---------------------------------------------------------------- the algebra of cores


def chain(cores: list[Tensor]) -> Tensor:
    """Neighbouring cores [P, r, k, s] multiplied together: -> [P, r_first, k ... k, s_last]."""
    P, first = cores[0].shape[:2]
    whole = cores[0]
    for core in cores[1:]:
        _, r, k, s = core.shape
        whole = torch.bmm(whole.reshape(P, -1, r), core.reshape(P, r, k * s)).view(P, first, -1, s)
    return whole


def to_dense(cores: list[Tensor], inputs: int) -> Tensor:
    """All cores [P, r, k, s] -> W [P, I, O]."""
    return chain(cores).reshape(len(cores[0]), inputs, -1)


def from_dense(
    matrix: Tensor, factors: tuple[int, ...], rank: int | None = None, tolerance: float = 0.0
) -> list[Tensor]:
    """TT-SVD (Oseledets 2011, algorithm 1): W [I, O] -> cores [r, k, s] float64, by one SVD a bond.

    As a TensorTrain holds them; to_dense([core[None] for core in cores], I) is W [1, I, O] again.

    Each bond keeps at most `rank` directions, and drops what is below tolerance / sqrt(d - 1) of the norm, so that
    without a rank |W - result| <= tolerance |W| (Frobenius).  With neither it is exact to rounding.
    Raises ValueError where the factors do not multiply to I O, and for a rank, a tolerance or numbers that are none.
    """
    if (rank is not None and rank < 1) or not 0 <= tolerance < math.inf:
        raise ValueError(f"rank must be at least 1 and tolerance a number of at least 0, got {rank} and {tolerance}")
    if not matrix.isfinite().all():
        raise ValueError("a matrix with NaN or infinity has no tensor train")
    if math.prod(factors) != matrix.numel():
        raise ValueError(f"factors {factors} multiply to {math.prod(factors)}, not to {tuple(matrix.shape)}")
    rest, cores, r = matrix.double(), [], 1
    allowed = tolerance * rest.norm() / math.sqrt(max(1, len(factors) - 1))
    for k in factors[:-1]:
        U, S, V = torch.linalg.svd(rest.reshape(r * k, -1), full_matrices=False)
        dropped = S.flip(0).square().cumsum(0).sqrt().flip(0)  # the norm of S[i:]
        keep = max(1, int((dropped > allowed).sum()) if tolerance else len(S))
        keep = min(keep, rank or keep)
        cores.append(U[:, :keep].reshape(r, k, keep))
        rest, r = S[:keep, None] * V[:keep], keep
    return [*cores, rest.reshape(r, factors[-1], 1)]


def sides(cores: list[Tensor], split: int) -> tuple[Tensor, Tensor]:
    """All cores -> Left [P, I, r] of those before the split and Right [P, r, O] of the others: W = Left Right."""
    return chain(cores[:split])[:, 0], chain(cores[split:])[..., 0]


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [P, N, I] times each probe's matrix [P, I, O], or one that all probes share, [1, I, O]: -> [P, N, O]."""
    return x @ matrix[0] if len(matrix) == 1 else torch.bmm(x, matrix)


class TensorTrain(nn.Module):
    """y = x W + b with W in cores.  Parameters cores.0 ... cores.{d-1} [r, k, s], and bias [O] if there is one.

    AdaZeta's fast forward: where some factors multiply to I, the cores up to there make Left [I, r], the others
    Right [r, O], and y = (x Left) Right: r (I + O) products a token instead of I O.  Where none do, W is built.
    """

    def __init__(self, inputs: int, outputs: int, rank: int | list[int], bias: bool, factors: tuple[int, ...] = ()):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.factors = factors or factors_of(inputs, outputs)
        if math.prod(self.factors) != inputs * outputs:
            raise ValueError(f"factors {self.factors} do not multiply to {inputs} x {outputs}")
        d = len(self.factors)
        ranks = [1, *([rank] * (d - 1) if isinstance(rank, int) else rank), 1]
        if len(ranks) != d + 1 or min(ranks) < 1:
            raise ValueError(f"{d} factors need {d - 1} ranks of at least 1, got {rank}")
        self.cores = nn.ParameterList(
            torch.empty(r, k, s) for r, k, s in zip(ranks, self.factors, ranks[1:], strict=False)
        )
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        products = list(accumulate(self.factors, int.__mul__))
        self.split = products.index(inputs) + 1 if inputs in products[:-1] else None
        self.rank = ranks[self.split] if self.split else None  # r, of Left and Right

    def forward(self, x: Tensor) -> Tensor:
        """x [P, N, I] -> [P, N, O]."""
        if self.split is None:
            y = product(x, to_dense(list(self.cores), self.inputs))
        else:
            left, right = sides(list(self.cores), self.split)
            y = product(product(x, left), right)
        return y if self.bias is None else y + self.bias[:, None]


# ---------------------------------------------------------------- adapters


@dataclass(frozen=True)
class Spec:
    """The kind, the places and the sizes of a model's adapters.

    kind adp: LoRETTA_adp, AdaZeta: h <- h + up(relu(down(h))) with tensor-train down and up, biases too.
    kind rep: LoRETTA_rep: W0 x + alpha / bottleneck * (up(down(x)) - what that was at the start).
    kind lora: W0 x + alpha / rank * B A x, which is a tensor train of two cores.
    """

    kind: str
    placement: str  # mlp, sublayers; qv; of lora also any of a block's LINEARS, between spaces
    bottleneck: int  # not of lora
    rank: int
    alpha: float = 16.0  # not of adp
    norms: bool = False  # train the model's own norms too
    identity: bool = True  # start as the model without adapters; else as the released code does

    def __post_init__(self):
        """Raises ValueError for what is no Spec: one may come from a file."""
        least = {"bottleneck": self.kind != "lora", "rank": 1}
        fits = self.kind in ("adp", "rep", "lora") and type(self.placement) is str
        for name, low in least.items():
            fits &= type(getattr(self, name)) is int and low <= getattr(self, name) <= 2**16
        fits &= type(self.alpha) is float and 0 < self.alpha <= 1e6
        if not fits or type(self.norms) is not bool or type(self.identity) is not bool:
            raise ValueError(f"no usable adapters: {self}")


TARGETS = {  # model type, placement: which linear layers of a block, and what the adapter changes there
    ("llama", "mlp"): {"mlp.gate_proj": "input", "mlp.up_proj": "input", "mlp.down_proj": "output"},
    ("llama", "sublayers"): {"self_attn.o_proj": "output", "mlp.down_proj": "output"},
    ("llama", "qv"): {"self_attn.q_proj": "beside", "self_attn.v_proj": "beside"},
    ("roberta", "mlp"): {"intermediate.dense": "input", "output.dense": "output"},
    ("roberta", "sublayers"): {"attention.output.dense": "output", "output.dense": "output"},
    ("roberta", "qv"): {"attention.self.query": "beside", "attention.self.value": "beside"},
}
LINEARS = {  # every linear layer of a block
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"),
    "roberta": ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                "intermediate.dense", "output.dense"),
}  # fmt: skip


class Bottleneck(nn.Module):
    """LoRETTA_adp: h + up(relu(down(h))), h [P, ..., D]."""

    def __init__(self, width: int, spec: Spec):
        super().__init__()
        self.down = TensorTrain(width, spec.bottleneck, spec.rank, bias=True)
        self.up = TensorTrain(spec.bottleneck, width, spec.rank, bias=True)

    def forward(self, h: Tensor) -> Tensor:
        flat = h.flatten(1, -2).float()
        y = flat + self.up(F.relu(self.down(flat)))
        return y.to(h.dtype).view(len(y), *h.shape[1:])


class Branch(nn.Module):
    """LoRETTA_rep and LoRA: what is added to a linear layer's output, [P, ..., I] -> [P, ..., O]."""

    def __init__(self, inputs: int, outputs: int, spec: Spec):
        super().__init__()
        self.kind = spec.kind
        if spec.kind == "lora":
            self.scale = spec.alpha / spec.rank
            self.low = TensorTrain(inputs, outputs, spec.rank, bias=False, factors=(inputs, outputs))
            return
        self.scale = spec.alpha / spec.bottleneck
        parts = {"down": (inputs, spec.bottleneck), "up": (spec.bottleneck, outputs)}
        for name, (i, o) in parts.items():
            setattr(self, name, TensorTrain(i, o, spec.rank, bias=False))
        if spec.identity:  # the paper takes the start away from W0, which codes cannot; a frozen copy does the same
            for name, (i, o) in parts.items():
                setattr(self, f"first_{name}", TensorTrain(i, o, spec.rank, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1, -2).float()
        if self.kind == "lora":
            y = self.low(flat)
        else:
            y = self.up(self.down(flat))
            if hasattr(self, "first_up"):
                y = y - self.first_up(self.first_down(flat))
        return (self.scale * y).to(x.dtype).view(len(y), *x.shape[1:-1], -1)


# ---------------------------------------------------------------- around a model

TRAINED_VECTOR, INITIAL_VECTOR = "adapters", "adapters.first"  # two of the model's weights, which hold all adapters


class Place(NamedTuple):
    vector: str  # TRAINED_VECTOR or INITIAL_VECTOR
    start: int
    shape: torch.Size


@dataclass
class Adapters:
    """Where each adapter tensor is in the model's two vectors of adapter weights.

    All that is trained is one vector: one draw a query instead of thousands, one update, and one tensor for AdamW.
    """

    spec: Spec
    places: dict[str, Place]
    base: str | None = field(default=None, compare=False)  # the frozen model's directory or name, to be saved along
    base_sha256: str | None = field(default=None, compare=False)  # base_sha256's result

    def named(self, weights: dict[str, Store]) -> dict[str, Tensor]:
        """Each tensor by its name, sharing the vectors' memory."""
        return {name: _cut_out(weights[p.vector].value.detach()[None], p)[0] for name, p in self.places.items()}


def _cut_out(vector: Tensor, place: Place) -> Tensor:
    """[P, n] -> [P, *shape]."""
    return vector[:, place.start : place.start + math.prod(place.shape)].view(len(vector), *place.shape)


class AdaptedView:
    """A view of the frozen model as it is stored, and of its adapters as `view` reads them (perturbed, or stored too).

    Their vectors are read once, when the first part is asked for.
    """

    def __init__(self, view: View, frozen: View, places: dict[str, Place]):
        self.view, self.frozen, self.places, self.vectors = view, frozen, places, {}
        self.probes = view.probes

    def read(self, name: str, rows: Tensor | None = None, as_codes: bool = False) -> Tensor:
        place = self.places.get(name)
        if place is None:
            return self.frozen.read(name, rows, as_codes)
        if place.vector not in self.vectors:
            of_vector = self.view if place.vector == TRAINED_VECTOR else self.frozen
            self.vectors[place.vector] = of_vector.read(place.vector)
        return _cut_out(self.vectors[place.vector], place)


def attach(lm: LanguageModel, spec: Spec, seed: int) -> None:
    """Put adapters on the targets of every block, and their weights among the model's; all else is then frozen.

    Raises ValueError for a placement that the model or the kind has not, and for a model that has adapters.
    """
    if lm.adapters is not None:
        raise ValueError(f"the model already has adapters: {lm.adapters.spec}")
    if lm.is_compiled:
        torch.compiler.reset()  # or what is compiled would go on without adapters
    targets = targets_of(lm.raw_config["model_type"], spec)
    lm.adapters = Adapters(spec, places := {})
    outer = lm.wrap_view  # of products of codes
    lm.wrap_view = lambda view: outer(AdaptedView(view, lm.stored_view(), places))
    parts = {TRAINED_VECTOR: [], INITIAL_VECTOR: []}

    def add(name: str, value: Tensor, vector: str) -> None:
        places[name] = Place(vector, sum(map(torch.numel, parts[vector])), value.shape)
        parts[vector].append(value.flatten())

    modules = install(lm.block, targets, spec)
    for i in range(lm.config.num_hidden_layers):
        for path, module in modules.items():
            prefix = f"{lm.layers}{i}.{path}.adapter."
            values = initial(module, spec, lambda name, prefix=prefix: tensor_id(f"{seed} {prefix}{name}"))
            for name, value in values.items():
                add(prefix + name, value, INITIAL_VECTOR if name.startswith("first_") else TRAINED_VECTOR)
    for name in [name for name in lm.weights if spec.norms and is_norm(name)]:
        add(name, lm.weights.pop(name).value.cpu(), TRAINED_VECTOR)
    for vector, values in parts.items():
        if values:
            lm.weights[vector] = Float(torch.cat(values).to(lm.device))
    lm.fuse_adapters(lm)


def is_norm(name: str) -> bool:
    """LoRETTA trains the norms of the model's body, and leaves its head alone."""
    return "norm" in name.lower() and not name.startswith("lm_head.")


def targets_of(model_type: str, spec: Spec) -> dict[str, str]:
    """Which linear layers of a block get an adapter, and where it is.  Raises ValueError for an unknown placement."""
    family, paths = family_of(model_type), spec.placement.split()
    fitting = [p for t, p in TARGETS if t == family and (p == "qv") == (spec.kind != "adp")]
    if spec.placement in fitting:
        return TARGETS[family, spec.placement]
    if spec.kind == "lora" and paths and set(paths) <= set(LINEARS[family]):
        return dict.fromkeys(paths, "beside")
    raise ValueError(f"placement must be one of {', '.join(fitting)} for {spec.kind}, got {spec.placement!r}")


def family_of(model_type: str) -> str:
    """Whose blocks a model has: all but RoBERTa have LLaMA's."""
    return "roberta" if model_type == "roberta" else "llama"


def install(block: nn.Module, targets: dict[str, str], spec: Spec) -> dict[str, nn.Module]:
    """Give each target layer of a block its adapter, as a submodule that a hook runs: -> the adapters by path.

    Hooks, so that the model's own code knows of no adapters.
    """
    modules = {}
    with torch.device("meta"):
        for path, where in targets.items():
            linear = block.get_submodule(path)
            O, I = linear.weight.shape  # noqa: E741
            linear.adapter = Branch(I, O, spec) if where == "beside" else Bottleneck(I if where == "input" else O, spec)
            if where == "input":
                linear.register_forward_pre_hook(lambda layer, args: (layer.adapter(args[0]),))
            elif where == "output":
                linear.register_forward_hook(lambda layer, args, y: layer.adapter(y))
            else:
                linear.register_forward_hook(lambda layer, args, y: y + layer.adapter(args[0]))
            modules[path] = linear.adapter
    return modules


def initial(module: nn.Module, spec: Spec, key: Callable[[str], int]) -> dict[str, Tensor]:
    """Starting values by name.

    Cores as in the papers' code: normal, such that W has the variance 1 / (I + O); biases uniform in +-1 / sqrt(O).
    LoRA's A: uniform in +-1 / sqrt(I), its B 0.  To start as the identity, adp's last core and bias are 0, and rep's
    start is taken away from it (`first_`); the papers' code does neither.
    """
    values = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, TensorTrain):
            continue
        d, path = len(layer.factors), f"{path}."
        deviation = (1 / (layer.inputs + layer.outputs)) ** (1 / (2 * d))
        for i, core in enumerate(layer.cores):
            value = torch.empty(core.shape, device="cpu")
            generator = torch.Generator("cpu").manual_seed(key(f"{path.removeprefix('first_')}cores.{i}"))
            if spec.kind == "lora":
                value.uniform_(-(layer.inputs**-0.5), layer.inputs**-0.5, generator=generator)
            else:
                value.normal_(0.0, deviation / math.sqrt(core.shape[2]), generator=generator)
            silent = spec.kind == "lora" or (spec.kind == "adp" and spec.identity and path == "up.")
            values[f"{path}cores.{i}"] = value.zero_() if silent and i == d - 1 else value
        if layer.bias is not None:
            bound, generator = layer.outputs**-0.5, torch.Generator("cpu").manual_seed(key(f"{path}bias"))
            value = torch.empty(layer.outputs, device="cpu").uniform_(-bound, bound, generator=generator)
            values[f"{path}bias"] = value.zero_() if spec.identity and path == "up." else value
    return values


# ---------------------------------------------------------------- adapters alone on disk, and merged


def trained(lm: LanguageModel) -> dict[str, Store]:
    """The stores that are trained: the adapters' vector where there are adapters, else everything."""
    return lm.weights if lm.adapters is None else {TRAINED_VECTOR: lm.weights[TRAINED_VECTOR]}


STEM = "adapters"
PEFT_CONFIG, PEFT_STEM, PEFT_BASE = "adapter_config.json", "adapter_model", "base.json"  # the last is ours alone
PEFT_FILES = re.compile(r"adapter_config\.json|base\.json|adapter_model(\.safetensors|-\d+\.tmp)")


def save(lm: LanguageModel, directory: str | Path) -> None:
    """Write the adapters alone, and which base they were trained around: its directory, its format and its hash.

    LoRA becomes a folder that PEFT loads (and transformers itself, without norms): adapter_config.json,
    adapter_model.safetensors, and base.json with the base's format and hash.  Others become adapters.safetensors, each
    tensor by its name, and config.json with their Spec and the base.  What was in the directory stays until all is
    written, and is then exchanged.  Raises ValueError for a model without adapters, and for a directory that holds
    anything else.
    """
    if lm.adapters is None:
        raise ValueError("the model has no adapters to save: attach them first")
    directory, spec, tensors = Path(directory), lm.adapters.spec, lm.adapters.named(lm.weights)
    base = {"base_weights": lm.format, "base_sha256": base_sha256(lm, spec)}
    if spec.kind != "lora":
        config = {"model_type": lm.raw_config["model_type"], "adapters": asdict(spec), "base": lm.adapters.base}
        write_directory(directory, {"config.json": config | base}, [], tensors.items(), STEM)
        return
    # without a config.json, which would make transformers take the folder for a whole model
    configs = {PEFT_CONFIG: _peft_config(lm), PEFT_BASE: base}
    write_directory(directory, configs, [], _peft_views(tensors).items(), PEFT_STEM, PEFT_FILES)


def load(lm: LanguageModel, directory: str | Path, any_base: bool = False) -> None:
    """Put saved adapters, ours or a LoRA of PEFT's, around a model that has none, or in place of those that it has.

    Raises ValueError for anything missing, unexpected, wrongly shaped, not finite, made for another kind of model, or
    trained around another base than this one as it is stored, which any_base allows; the model is then as it was.
    PEFT's own folders do not say what their base was: of them shapes alone are checked.
    """
    directory = Path(directory)
    is_peft = (directory / PEFT_CONFIG).is_file()
    spec, base = _read_peft(directory, lm) if is_peft else _read_config(directory / "config.json", lm)
    if lm.adapters is not None and lm.adapters.spec != spec:
        raise ValueError(f"{directory} holds {spec}, the model has {lm.adapters.spec}")
    files, wanted = find_tensors(directory, PEFT_STEM if is_peft else STEM), _blank(lm, spec)
    wanted = _peft_views(wanted) if is_peft else wanted
    check_names(directory, set(files), set(wanted), lambda name: False)
    tensors = dict(read_tensors(files, {name: tensor.shape for name, tensor in wanted.items()}))
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if is_peft else (torch.float32,)
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes or not tensor.isfinite().all():
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{files[name]}: {name} must hold finite {kinds} numbers")
    sha256 = base_sha256(lm, spec) if base.get("base_sha256") and not any_base else None
    if sha256 is not None and sha256 != base["base_sha256"]:
        raise ValueError(
            f"{directory} was trained around {base.get('base_weights')} weights {base['base_sha256']}, the model has "
            f"{lm.format} weights {sha256}: load that base, or give any_base=True"
        )
    if lm.adapters is None:
        attach(lm, spec, seed=0)
        lm.adapters.base_sha256 = sha256
    held = lm.adapters.named(lm.weights)
    for name, tensor in (_peft_views(held) if is_peft else held).items():
        tensor.copy_(tensors[name])


def base_sha256(lm: LanguageModel, spec: Spec) -> str:
    """Hash of the stores that such adapters leave as they are: all, but for norms that are trained beside them.

    It is made once: of billions of weights it takes seconds, and they are frozen.
    """
    if lm.adapters is not None and lm.adapters.base_sha256 is not None:
        return lm.adapters.base_sha256
    replaced = {name for name in lm.weights if spec.norms and is_norm(name)} | {TRAINED_VECTOR, INITIAL_VECTOR}
    sha256 = weights_sha256({name: stored for name, stored in lm.weights.items() if name not in replaced})
    if lm.adapters is not None:
        lm.adapters.base_sha256 = sha256
    return sha256


def check_base(directory: Path) -> None:
    """Raises ValueError for a directory of adapters, ours or PEFT's, that is given as a model but holds none."""
    found = [name for name in (PEFT_CONFIG, f"{STEM}.safetensors") if (directory / name).is_file()]
    if not found or any(any(directory.glob(f"{stem}*.safetensors*")) for stem in ("model", "codes")):
        return
    try:
        raw = read_object(directory / (PEFT_CONFIG if PEFT_CONFIG in found else "config.json"))
        base = raw.get("base_model_name_or_path") or raw.get("base")
    except (OSError, ValueError):
        base = None  # load says what is wrong with it
    raise ValueError(
        f"{directory} holds adapters and no model: give {base or 'the model that they were trained around'} as --model "
        f"and {directory} as --adapters"
    )


def _read_config(path: Path, lm: LanguageModel) -> tuple[Spec, dict]:
    """Our config.json -> the Spec, and what it says of the base (older ones: nothing)."""
    try:
        raw, model_type = read_object(path), lm.raw_config["model_type"]
        if raw["model_type"] != model_type:
            raise ValueError(f"the adapters are of a {raw['model_type']}, the model is a {model_type}")
        return Spec(**raw["adapters"]), raw
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not describe adapters for this model: {error}") from None


def _blank(lm: LanguageModel, spec: Spec) -> dict[str, Tensor]:
    """A tensor without storage for every tensor of such adapters, by name."""
    if lm.adapters is not None:
        return {name: torch.empty(place.shape, device="meta") for name, place in lm.adapters.places.items()}
    modules = install(copy.deepcopy(lm.block), targets_of(lm.raw_config["model_type"], spec), spec)
    blank = {
        f"{lm.layers}{i}.{path}.adapter.{name}": p.detach()
        for i in range(lm.config.num_hidden_layers) for path, module in modules.items()
        for name, p in module.named_parameters()
    }  # fmt: skip
    norms = {name: stored.shape for name, stored in lm.weights.items() if spec.norms and is_norm(name)}
    return blank | {name: torch.empty(shape, device="meta") for name, shape in norms.items()}


# PEFT's LoRA: https://huggingface.co/docs/peft, package_reference/lora and developer_guides/checkpoint

PEFT_READ = (  # adapter_config.json's fields that are read, or that say nothing of the forward pass
    "peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "modules_to_save", "init_lora_weights",
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
)  # fmt: skip


def _peft_views(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """LoRA's tensors as PEFT names and shapes them, A [r, I] and B [O, r], sharing the memory of the cores [1, I, r]
    and [r, O, 1]; norms [D] beside them keep their shape."""
    views = {}
    for name, tensor in tensors.items():
        path, _, core = name.partition(".adapter.low.cores.")
        if core == "0":
            views[f"base_model.model.{path}.lora_A.weight"] = tensor[0].T
        elif core == "1":
            views[f"base_model.model.{path}.lora_B.weight"] = tensor[..., 0].T
        else:
            views[f"base_model.model.{name}"] = tensor
    return views


def _peft_config(lm: LanguageModel) -> dict:
    """adapter_config.json's contents."""
    spec, model_type = lm.adapters.spec, lm.raw_config["model_type"]
    targets, layers = list(targets_of(model_type, spec)), range(lm.config.num_hidden_layers)
    others = set(LINEARS[family_of(model_type)]) - set(targets)
    if any(other.endswith(f".{target}") for other in others for target in targets):
        targets = [f"{lm.layers}{i}.{target}" for i in layers for target in targets]  # PEFT goes by the names' ends
    norms = sorted({name.split(".")[-2] for name in lm.adapters.places if ".adapter." not in name})
    return {
        "peft_type": "LORA", "task_type": None if lm.config.masked else "CAUSAL_LM",
        "base_model_name_or_path": lm.adapters.base, "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha, "use_rslora": False,
        "target_modules": targets, "modules_to_save": norms or None, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip


def _read_peft(directory: Path, lm: LanguageModel) -> tuple[Spec, dict]:
    """A PEFT folder -> a Spec of kind lora, and what base.json says of the base (PEFT's own have none).

    Raises ValueError with the name of anything that is not supported, and for pickles.
    """
    family, layers = family_of(lm.raw_config["model_type"]), range(lm.config.num_hidden_layers)

    def is_target(layer: str) -> bool:
        if isinstance(targets, str):
            return re.fullmatch(targets, layer) is not None
        return any(layer == target or layer.endswith(f".{target}") for target in targets)

    try:
        raw, record = read_object(directory / PEFT_CONFIG), directory / PEFT_BASE
        base = read_object(record) if record.is_file() else {}
        targets, norms = raw["target_modules"], raw.get("modules_to_save") or []
        supported = {
            "peft_type": raw["peft_type"] == "LORA",
            "target_modules": isinstance(targets, (str, list)),
            "modules_to_save": all("norm" in str(name).lower() for name in norms),
            "init_lora_weights": raw.get("init_lora_weights", True) in (True, False, "gaussian"),  # others change W0
        }
        off = {name: value in (None, False, "none", [], {}) for name, value in raw.items() if name not in PEFT_READ}
        wrong = [f"{name} {raw[name]!r}" for name, fits in (supported | off).items() if not fits]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} is not supported")
        paths = [path for path in LINEARS[family] if any(is_target(f"{lm.layers}{i}.{path}") for i in layers)]
        if not paths:
            raise ValueError(f"target_modules {targets!r} names none of {', '.join(LINEARS[family])}")
        placement = "qv" if set(paths) == set(TARGETS[family, "qv"]) else " ".join(paths)
        alpha = raw["lora_alpha"] * (raw["r"] ** 0.5 if raw.get("use_rslora") else 1.0)  # rsLoRA: alpha / sqrt(r)
        spec = Spec("lora", placement, 0, raw["r"], alpha, norms=bool(norms))
    except (OSError, TypeError, KeyError, ValueError, ArithmeticError, AttributeError, RecursionError, re.error) as e:
        raise ValueError(f"{directory / PEFT_CONFIG} does not describe adapters for this model: {e}") from None
    if lm.adapters is not None:  # what says nothing of a trained LoRA is taken to be alike
        own, model_type = lm.adapters.spec, lm.raw_config["model_type"]
        same = targets_of(model_type, own) == targets_of(model_type, spec)
        placement = own.placement if same else spec.placement
        spec = replace(spec, placement=placement, bottleneck=own.bottleneck, identity=own.identity)
    if (directory / f"{PEFT_STEM}.bin").is_file() and not any(directory.glob(f"{PEFT_STEM}*.safetensors*")):
        raise ValueError(
            f"{directory} has only {PEFT_STEM}.bin: pickles can run code and are never loaded; convert it once, "
            "somewhere you trust it, with peft: PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW)"
        )
    return spec, base


@torch.no_grad()
def merge(lm: LanguageModel) -> LanguageModel:
    """A plain fp32 model with the adapters' products added to the weights, for rep and LoRA; `save` writes it.

    Raises ValueError for adp: a relu between two products is no matrix.
    """
    if lm.adapters is None or lm.adapters.spec.kind == "adp":
        raise ValueError("only rep and lora adapters can be merged into a matrix")
    tensors = lm.adapters.named(lm.weights)
    frozen = [(name, stored) for name, stored in lm.weights.items() if name not in (TRAINED_VECTOR, INITIAL_VECTOR)]
    merged = {name: Float(stored.dequantise().float().clone().view(stored.shape)) for name, stored in frozen}
    merged |= {name: Float(tensor.clone()) for name, tensor in tensors.items() if is_norm(name)}
    for i in range(lm.config.num_hidden_layers):
        for path in targets_of(lm.raw_config["model_type"], lm.adapters.spec):
            prefix = f"{lm.layers}{i}.{path}."
            branch = lm.block.get_submodule(path).adapter
            weights = {name: tensors[f"{prefix}adapter.{name}"][None] for name, _ in branch.named_parameters()}
            weight = merged[f"{prefix}weight"].value
            every = torch.eye(weight.shape[1], device=weight.device)[None]  # [1, I, I]
            weight += functional_call(branch, weights, (every,))[0].T
    plain = type(lm)(lm.config, lm.raw_config, merged, lm.dtype, "fp32")
    plain.other_files = lm.other_files
    return plain
