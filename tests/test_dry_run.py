"""What --dry-run says, against stores that are really made, and against configurations' known sizes."""

import json
from itertools import product

import pytest
import torch
from helpers import tiny_llama, tiny_roberta

import train
from data.scoring import BatchLoss, Encoded
from model import create
from quant import FORMATS
from runtime.config import parse, spec_of
from runtime.dry_run import predict
from runtime.first_order import make_trainable
from runtime.hub import SHAPES
from runtime.problem import DTYPES
from tensor_train import TRAINED_VECTOR, attach, trained

RAW = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 160, "intermediate_size": 300, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def at_7b(flags: str) -> dict:
    return predict(parse(f"--model llama2-7b {flags}".split()), SHAPES["llama2-7b"], 64)["bytes"]


def bytes_of(lm) -> int:
    return sum(part.nbytes for stored in lm.weights.values() for part in stored.tensors().values())


@pytest.mark.parametrize("weights, residual", [*((w, 0) for w in FORMATS), ("int8", 2), ("int4", 4), ("int4", 8)])
def test_stored_bytes_are_those_of_the_store(weights, residual):
    """160 and 300 columns: int4 groups are cut short, and rows of codes end in mid byte where columns are odd."""
    lm = create(RAW, weights=weights, residual=residual)
    predicted = predict(parse(["--weights", weights, "--residual", str(residual)]), RAW, 16)
    assert sum(predicted["bytes"][part] for part in ("weights", "scales", "residuals")) == bytes_of(lm)
    assert predicted["total_parameters"] == sum(s.shape.numel() for s in lm.weights.values())


@pytest.mark.parametrize("method", ["loretta-adp", "loretta-rep", "lora"])
def test_stored_bytes_with_adapters_are_those_of_the_store(method):
    """rep's frozen start counts, and norms that are trained count once."""
    lm, c = create(RAW), parse(["--method", method, "--weights", "fp32"])
    attach(lm, spec_of(c, "llama"), 0)
    predicted = predict(c, RAW, 16)
    assert predicted["bytes"]["weights"] + predicted["bytes"]["adapters"] == bytes_of(lm)
    assert predicted["trainable_parameters"] == trained(lm)[TRAINED_VECTOR].shape.numel()


@pytest.mark.parametrize("model, parameters", [
    ("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320), ("llama3-8b", 8_030_261_248),
    ("tinyllama-1.1b", 1_100_048_384), ("roberta-base", 124_697_433), ("roberta-large", 355_412_057),
])  # fmt: skip
def test_presets_have_their_published_sizes(model, parameters):
    """As their model cards and `transformers` count them; the masked-LM heads of RoBERTa included, its pooler not."""
    assert predict(parse(["--model", model]), SHAPES[model], 64)["total_parameters"] == parameters


def test_first_order_holds_the_larger_of_gradients_and_activations():
    for batch_size, larger in (1, "gradients"), (256, "activations"):
        c = parse(f"--model llama2-7b --compute bf16 --method fo --weights bf16 --batch-size {batch_size}".split())
        predicted = predict(c, SHAPES["llama2-7b"], 64)
        parts = predicted["bytes"]
        assert max(("gradients", "activations"), key=parts.get) == larger
        assert predicted["expected_peak_bytes"] == parts["weights"] + parts["moments"] + parts[larger]
    fp32, bf16 = (at_7b(f"--compute bf16 --method fo-ste --master {master}")["moments"] for master in ("fp32", "bf16"))
    assert fp32 > 1.99 * bf16


WIDE = dict(hidden_size=128, intermediate_size=352, num_attention_heads=4)
BODIES = {
    "llama": tiny_llama(**WIDE, num_key_value_heads=4), "roberta": tiny_roberta(**WIDE, max_position_embeddings=66)
}  # fmt: skip


def kept_by_backward(raw: dict, c) -> int:
    """Bytes that autograd holds between a forward and its backward, weights not counted."""
    lm, spec = create(raw, dtype=DTYPES[c.compute], weights=c.weights), spec_of(c, raw["model_type"])
    if spec is None:
        lm.weights = make_trainable(lm.weights, None, DTYPES[c.weights])
    else:
        attach(lm, spec, 0)
        lm.weights[TRAINED_VECTOR].value.requires_grad_(True)
    weights = {part.untyped_storage().data_ptr() for s in lm.weights.values() for part in s.tensors().values()}
    rows = torch.randint(0, raw["vocab_size"], (c.batch_size, 64), generator=torch.Generator().manual_seed(0))
    examples = [Encoded([row], [[5], [6]], 63, i % 2) for i, row in enumerate(rows.tolist())]
    held = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        BatchLoss.of(lm, examples, 0, c.batch_size)(lm.stored_view())
    return sum(storage.nbytes() for at, storage in held.items() if at not in weights)


FLAGS = ("fo", "lora", "lora --norms", "lora --activations int8", "loretta-rep", "loretta-adp --placement mlp",
         "loretta-adp --placement sublayers --no-norms")  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("flags, body, compute", [*product(FLAGS, BODIES, ("fp32", "bf16"))])
def test_what_a_backward_needs_of_a_layer_is_what_autograd_keeps(body, compute, flags):
    """Three layers more, so that the ends cancel."""
    few, many = (BODIES[body] | {"num_hidden_layers": n} for n in (2, 5))
    c = parse(f"--model llama2-7b --device cpu --compute {compute} --weights {compute} --batch-size 8 --method {flags}"
              .split())  # fmt: skip
    predicted, held = (
        of(many) - of(few) for of in (
            lambda raw: predict(c, raw, 64)["bytes"]["activations"], lambda raw: kept_by_backward(raw, c)
        )
    )  # fmt: skip
    assert predicted == pytest.approx(held, rel=0.06)


@pytest.mark.parametrize("weights, copied", [("bf16", False), ("fp32", True), ("int4", True)])
def test_backward_copies_matrices_that_are_not_what_is_multiplied(weights, copied):
    """Products in bf16: one copy of each block's matrices, 12,952,010,752 bytes at the 7B shape."""
    more = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) if copied else 0
    kept = 8 * 4096 + 2 * (4 * 4096 + 3 * 11008) + 2 * 4 * (4096 + 2 * 8)  # a token and a layer
    activations = at_7b(f"--compute bf16 --weights {weights} --method lora")["activations"]
    assert activations == 8 * 64 * 32 * kept + more


def test_of_adapters_a_step_holds_each_probes_own_and_one_block_for_all():
    """By hand, at the 7B shape: LoRA trains 32 (2 (4096 + 4096)) 8 numbers; four queries are eight probes."""
    n, block = 32 * 2 * 8192 * 8, 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 2 * 4096
    parts = at_7b("--method lora --optimizer zo --queries 4 --weights bf16 --device cuda")
    assert parts["adapters"] == 4 * n and parts["scratch"] == block + 8 * 4 * n
    parts = at_7b("--method lora --weights bf16 --device cuda")
    assert parts["moments"] == 2 * 4 * n and parts["gradients"] == 4 * n


def test_a_forward_has_no_more_probes_than_a_step():
    """Two at a time on a CPU, whose cache more of them overflow.  --probes-per-forward bounds them; 10,000 steps of 16
    of 1,000 examples end in epoch 158: 8 queries, not 20."""

    def activations(flags: str, device: str = "cuda") -> int:
        return at_7b(f"--weights int4 --compute bf16 --device {device} {flags}")["activations"]

    pair = activations("--method quzo")
    assert activations("--method quzo --probes-per-forward 8") == pair
    assert activations("--method quzo --probes-per-forward 1") * 2 == pair
    assert activations("--method adazeta") == activations("--method adazeta --queries 8") == 8 * pair
    assert activations("--method adazeta --queries 8", "cpu") == pair
    assert 2 * activations("--method adazeta --probes-per-forward 3") == 3 * pair
    assert activations("--method adazeta --k 512") == 20 * pair  # whose files tell how many examples there are


def test_the_command_prints_a_table_and_json_and_writes_nothing(tmp_path, capsys, monkeypatch):
    """Also for a GPU that is not here, and a preset that is not on this disk."""
    monkeypatch.chdir(tmp_path)
    for flags in ([], "--model llama2-7b --weights int4 --device cuda --max-length 64".split()):
        assert train.main(["--dry-run", *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        predicted = json.loads(lines[-1])
        rows = {line[:16].strip(): line.split()[-2] for line in lines[:-1] if line.endswith("MiB")}
        printed = {part: float(size.replace(",", "")) * 2**20 for part, size in rows.items()}
        assert printed["expected peak"] == pytest.approx(predicted["expected_peak_bytes"], rel=0.01)
    assert predicted["tokens_a_sequence"] == 64 and predicted["device"] == "cuda"
    more = predicted["bytes"]["scratch"] + predicted["bytes"]["activations"]
    assert printed["and with graphs"] - printed["expected peak"] == pytest.approx(more, rel=0.01)
    assert predicted["expected_reserved_bytes"] == predicted["expected_peak_bytes"] + more
    assert not list(tmp_path.iterdir())


def test_the_task_gives_the_length_where_its_files_are_at_hand(capsys):
    train.main(["--dry-run"])
    longest = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_a_sequence"]
    problem, _ = train.prepare(train.parse([]))
    assert longest == max(len(e.sequences[0]) for e in [*problem.train, *problem.dev, *problem.tests["test"]])


def test_a_bad_config_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[]")
    assert train.main(["--dry-run", "--model", str(tmp_path), "--task", "tiny"]) == 2
    assert "is not a JSON object in UTF-8: it holds []" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flags", ["--weights int8", "--weights int4", "--method fo-ste --weights int8"])
def test_the_peak_is_within_ten_percent(flags):
    """At a size where the allocator's rounding no longer shows."""
    from benchmarks.memory import measure

    row = measure(flags, "tinyllama-1.1b", 16, 64)
    assert abs(row["predicted_bytes"] / row["peak_bytes"] - 1) < 0.1
