"""Predicts the memory of a run from shapes alone: nothing is loaded.

A zeroth-order step holds the stored weights, one block's weights as both perturbed copies have them, and one forward's
activations; graphs of it hold the last two once more, in reserve.  A first-order step holds weights and two moments,
and every block's activations, which the backward pass trades for gradients block by block: the larger of the two
counts.  The counts below follow the code line by line, and leave out what is small beside them; benchmarks/memory.py
measures them.

Shape key: B sequences in a forward, T tokens, D hidden, F feed-forward width, V vocabulary.  Imports data,
family.elasticzo, model, quant, tensor_train, zo_optim, and of runtime config, model_configs and problem.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from data.archives import local_folder
from data.tasks import get_task
from family.elasticzo import TAIL_BYTES, tail_names
from model import MODELS, expected_shapes, llama_parts, roberta_parts
from quant import tensor_specs
from runtime.config import Config, each_task, expects_triton, probes_per_forward, spec_of
from runtime.model_configs import LlamaConfig, config_of
from runtime.problem import encoder_of, splits_of
from tensor_train import Spec, install, is_norm, targets_of
from zo_optim import adazeta_queries, epoch_of

BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "int8": 2}  # of activations too: around products of codes they are bf16


def predict(c: Config, raw: dict, tokens: int) -> dict:
    """Parameters, and bytes by part, of a run on a model with this config.json and sequences of this many tokens.

    Raises ValueError for a config that model.py does not support.
    """
    config = config_of(raw)
    shapes = expected_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    spec = spec_of(c, raw["model_type"])
    trainable, fixed = ({"weights": total}, 0) if spec is None else adapters(config, raw["model_type"], spec, shapes)
    N = min(c.micro_batch_size, c.batch_size // len(each_task(c))) * tokens
    parts = offloaded(shapes, config, c) if c.method == "zo2" else stored(shapes, c)
    parts |= {} if spec is None else {"adapters": 4 * (trainable["adapters"] + fixed)}
    if c.optimizer == "adamw":
        trained = masters(shapes, c) if spec is None else 4 * sum(trainable.values())
        a_token = saved_for_backward(config, c, raw["model_type"], spec)
        activations = N * config.num_hidden_layers * a_token + copies(shapes, c)
        parts |= {"moments": 2 * trained, "gradients": trained, "activations": activations}
        at_once = sum(parts.values()) - min(parts["gradients"], parts["activations"])
    else:
        probes = 2 * most_queries(c)
        P = min(probes_per_forward(c) or probes, probes)
        block = perturbed_block(config, c)
        scratch = block * P // 2 if spec is None else block // 2 + P * 4 * sum(trainable.values())
        in_place = c.method in ("quzo", "zo2") and c.direction_bits == "sparse" and P == 2
        if in_place and c.device.startswith("cuda") and expects_triton():
            scratch = one_matrix(config, c)
        if c.method == "mezo-svrg" and c.anchor_steps > 1:
            parts |= {"anchor": sum(parts.values())}  # a copy of what is stored
        if c.method == "elasticzo":
            names = tail_names(shapes, MODELS[type(config)], config.num_hidden_layers, c.tail_blocks)
            in_tail = sum(math.prod(shapes[name]) for name in names)
            kept = N * P * c.tail_blocks * saved_for_backward(config, c, raw["model_type"], None)
            products = in_tail * BYTES[c.compute] if c.compute != "fp32" else 0  # the copies that are multiplied
            parts |= {"tail": TAIL_BYTES * in_tail, "tail's activations": kept + products}
        if c.method == "mazo":
            parts |= {"masks": masked(shapes, config.tie_word_embeddings)}  # a byte a weight
        parts |= {"scratch": scratch, "activations": N * P * widest_activations(config, c)}
        at_once = sum(parts.values())
    recorded = parts["scratch"] + parts["activations"] if c.graphs else 0
    return {
        "model": c.model, "method": c.method, "weights": c.weights, "device": c.device,
        "total_parameters": total + trainable.get("adapters", 0), "trainable_parameters": sum(trainable.values()),
        "trainable": trainable, "batch_size": c.batch_size, "sequences_a_forward": N // tokens,
        "tokens_a_sequence": tokens, "bytes": parts, "expected_peak_bytes": at_once,
        "expected_reserved_bytes": at_once + recorded,
    }  # fmt: skip


def most_queries(c: Config) -> int:
    """The most queries of any step.  AdaZeta asks most in the last epoch; its cap counts where the flags do not say how
    many examples there are."""
    if c.queries or c.num_train is None:
        return c.queries or c.max_queries
    examples = c.num_train * len(each_task(c))
    return adazeta_queries(epoch_of(c.steps - 1, examples, c.batch_size), c.alpha, c.beta, c.max_queries)


def adapters(config, model_type: str, spec: Spec, shapes: dict[str, torch.Size]) -> tuple[dict[str, int], int]:
    """Numbers of trained parameters, of the adapters of all blocks and of the model's own norms, and how many
    parameters of adapters are not trained."""
    modules = install(block_of(config), targets_of(model_type, spec), spec)
    named = [(name, p) for module in modules.values() for name, p in module.named_parameters()]
    a_block = sum(p.numel() for name, p in named if not name.startswith("first_"))
    fixed = sum(p.numel() for name, p in named if name.startswith("first_"))
    norms = sum(math.prod(shape) for name, shape in shapes.items() if spec.norms and is_norm(name))
    layers = config.num_hidden_layers
    return {"adapters": layers * a_block, "norms": norms}, layers * fixed


def stored(shapes: dict[str, torch.Size], c: Config) -> dict[str, int]:
    """Bytes of the stored weights while training; fo-ste has float masters, and their scales beside them."""
    names = {"": "weights", ".scale": "scales", ".residual": "residuals"}
    parts = dict.fromkeys(names.values(), 0)
    for shape in shapes.values():
        for suffix, (dtype, size) in tensor_specs(shape, c.weights, c.residual).items():
            parts[names[suffix]] += math.prod(size) * dtype.itemsize
    if c.oracle:  # each weight and its scale, in fp32
        floats = sum(math.prod(shape) * (8 if len(shape) == 2 else 4) for shape in shapes.values())
        return parts | {"weights": floats, "residuals": 0}
    return parts | {"weights": masters(shapes, c)} if c.method == "fo-ste" else parts


def offloaded(shapes: dict[str, torch.Size], config, c: Config) -> dict[str, int]:
    """Bytes of the stored weights where three blocks are on the device.  (All of them are in host memory: stored's.)"""
    in_blocks = {name: shape for name, shape in shapes.items() if name.startswith(MODELS[type(config)].layers)}
    rest = stored({name: shape for name, shape in shapes.items() if name not in in_blocks}, c)
    three = {part: 3 * size // config.num_hidden_layers for part, size in stored(in_blocks, c).items()}
    return {part: rest[part] + three[part] for part in rest}


def masters(shapes: dict[str, torch.Size], c: Config) -> int:
    """Bytes of everything that a first-order method trains; vectors are fp32."""
    return sum(math.prod(s) * (BYTES[c.master or c.weights] if len(s) == 2 else 4) for s in shapes.values())


def masked(shapes: dict[str, torch.Size], tied: bool) -> int:
    """How many weights MaZO's masks are of: of matrices but tables that are only looked up."""
    words = ("embed_tokens", "word_embeddings") if tied else ()
    return sum(math.prod(shape) for name, shape in shapes.items()
               if len(shape) == 2 and ("embed" not in name or name.split(".")[-2] in words))  # fmt: skip


def block_of(config) -> torch.nn.Module:
    """One block, on no device."""
    return llama_parts(config)[0] if isinstance(config, LlamaConfig) else roberta_parts(config)[1]


def perturbed_block(config, c: Config) -> int:
    """Bytes of one block's weights as both perturbed copies have them."""
    size = 1 if c.compute in ("fp8", "int8") else BYTES[c.compute]
    return 2 * sum(p.numel() * (size if p.ndim == 2 else 4) for p in block_of(config).parameters())


def one_matrix(config, c: Config) -> int:
    """Bytes of the largest matrix that is dequantised for both signs, or of the list of what is moved where matrices
    are multiplied as they are stored (gpu/in_place.py)."""
    largest = max(p.numel() for p in block_of(config).parameters() if p.ndim == 2)
    stored = c.compute in ("fp8", "int8", c.weights)
    return largest // c.cell * (8 + 2 * BYTES[c.compute]) if stored else largest * BYTES[c.compute]


def copies(shapes: dict[str, torch.Size], c: Config) -> int:
    """Bytes of the matrices that back-propagation keeps because they are not the parameters themselves."""
    if c.method != "fo-ste" and c.weights == c.compute:
        return 0
    blocks = [s for name, s in shapes.items() if len(s) == 2 and ".layer" in name]
    return sum(math.prod(s) for s in blocks) * BYTES[c.compute]


def widest_activations(config, c: Config) -> int:
    """Bytes a token and a probe, of a forward that keeps nothing, at its widest: a block's inputs, the float32 stream
    and LLaMA's sum to come, beside its norm in float32, attention's q, k and v with heads repeated, or the
    feed-forward's wide tensors."""
    b, D, F = BYTES[c.compute], config.hidden_size, config.intermediate_size
    given = (4 + b if isinstance(config, LlamaConfig) else 4) * D
    wide = (3 if isinstance(config, LlamaConfig) else 2) * b * F
    if c.activations != "none":
        wide = max(wide, (b + 12) * F)  # rounding the last layer's input, in float32
    return given + max(b * D + 8 * D, 7 * b * D, b * D + wide)


def saved_for_backward(config, c: Config, model_type: str, spec: Spec | None) -> int:
    """Bytes a token and a layer that a forward keeps for its backward: each norm's float32 input and, where norms are
    trained, normalised input, attention's q, k, v and output, the activation function's two sides; and every linear
    layer's input, or where those are frozen what their adapters keep."""
    b, D, F = BYTES[c.compute], config.hidden_size, config.intermediate_size
    norms = 16 if spec is None or spec.norms else 8
    if spec is not None:
        inputs = saved_by_adapters(D, b, model_type, spec)
    else:  # rounded, each layer has an input of its own
        inputs = b * (4 * D + 2 * F if c.activations != "none" else 3 * D + F)
    return norms * D + b * (4 * D + (3 if isinstance(config, LlamaConfig) else 1) * F) + inputs


def saved_by_adapters(D: int, b: int, model_type: str, spec: Spec) -> int:
    """Each one's float32 input, which in an fp32 model is one for all that read the same, and its narrow middle."""
    places = list(targets_of(model_type, spec).values())
    after = places.count("output")
    inputs = after + min(1, len(places) - after) if b == 4 else len(places)
    return 4 * (inputs * D + len(places) * (2 * spec.rank + spec.bottleneck))


def table(predicted: dict) -> str:
    """For people: parameters, and bytes by part."""
    rows = [(part, size) for part, size in predicted["bytes"].items() if size]
    rows.append(("expected peak", predicted["expected_peak_bytes"]))
    if predicted["expected_reserved_bytes"] > predicted["expected_peak_bytes"]:
        rows.append(("and with graphs", predicted["expected_reserved_bytes"]))
    of_which = ", ".join(f"{name} {n:,}" for name, n in predicted["trainable"].items() if n)
    head = f"{predicted['trainable_parameters']:,} trainable ({of_which}) of {predicted['total_parameters']:,}"
    head += " parameters; "
    head += f"{predicted['sequences_a_forward']} x {predicted['tokens_a_sequence']} tokens a forward"
    head += "" if predicted["device"].startswith("cuda") else "; bytes without those of the process itself"
    return "\n".join([head, *(f"{name:16}{size / 2**20:12,.1f} MiB" for name, size in rows)])


def longest_sequence(c: Config) -> int | None:
    """Tokens of the tasks' longest sequence, where their files and the tokenizer are at hand."""
    if "," in c.task:
        lengths = list(map(longest_sequence, each_task(c)))
        return None if None in lengths else max(lengths)
    task = get_task(c.task)
    here = Path(c.model).is_dir() or c.model == "tiny"
    if not here or not (task.folder or (Path(c.data_dir).is_dir() if c.data_dir else local_folder(task))):
        return None
    splits, encode = splits_of(c), encoder_of(c)
    others = [*splits.dev, *(row for rows in splits.tests.values() for row in rows)]
    return max(encoded.width for encoded in (*encode.all(splits.train, right_alone=True), *encode.all(others)))
