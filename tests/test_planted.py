"""What bugs that were planted on purpose once passed, and no other file's tests see (RESULTS.md lists them)."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import shortened, tiny_llama
from oracles import gaussian
from safetensors.torch import load_file, save_file

import tensor_train
import train
from data.files import load_splits, read_rows
from data.metrics import Prediction, measure
from data.scoring import Encoded, evaluate
from data.tasks import TASKS, TINY, Example
from model import create
from quant import ACTIVATIONS
from random_bits import tensor_id
from runtime.config import parse
from runtime.run_folder import StepRecorder
from tensor_train import Spec, TensorTrain, balanced
from zo_optim import Step


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened(train=64, dev=8):
        yield


def rows_of(out: Path, *flags: str) -> list[dict]:
    """The lines of metrics.jsonl of a short run of the embedded model."""
    assert train.main([*"--batch-size 8 --num-eval 8 --device cpu".split(), *flags, "--out", str(out)]) == 0
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def test_weight_decay_reaches_adamw_from_the_command_line(tmp_path, capsys):
    """A step by lr 1e-3 with a decay of 100 takes a tenth from every matrix: the next batch's loss is another one."""
    flags = "--method fo --steps 2 --eval-every 2 --lr 1e-3 --weight-decay".split()
    runs = [rows_of(tmp_path / decay, *flags, decay) for decay in ("0", "100")]
    plain, decayed = ([row["loss"] for row in rows if "loss" in row] for rows in runs)
    assert plain[0] == decayed[0] and abs(plain[1] - decayed[1]) > 1e-3


def test_the_clip_is_by_the_mean_square_of_queries_not_of_steps(tmp_path, capsys):
    """Of four queries a step, from the fifth step on, when there are 16; a tenth of it is reached by nearly all."""
    rows = rows_of(tmp_path / "run", *"--queries 4 --clip 0.1 --steps 6 --eval-every 6 --lr 1e-3".split())
    grads = [row["projected_grad"] for row in rows if "loss" in row]
    for step in (4, 5):
        before = [g for of_step in grads[:step] for g in of_step]
        bound = 0.1 * math.sqrt(sum(g * g for g in before) / len(before))
        assert max(map(abs, grads[step])) == pytest.approx(bound)


def test_examples_of_other_answers_are_not_read_as_one():
    """Each has options of one token that are read at one place, but not the same ones."""
    lm = create(tiny_llama(), seed=3)
    for stored in lm.weights.values():
        if stored.value.ndim == 2:
            stored.value.mul_(10)  # or every score would be near 0
    example = Example((), 0, ("a", "b"), 0, (0,))
    examples = [Encoded([[1, 5, 6]], [[7], [8]], 2, 0, example), Encoded([[1, 9]], [[10], [11]], 1, 1, example)]
    alone = [evaluate(lm, [e], 0, 1) for e in examples]
    assert abs(alone[0].loss - alone[1].loss) > 0.1
    assert evaluate(lm, examples, 0, 2).loss == pytest.approx((alone[0].loss + alone[1].loss) / 2, abs=1e-5)


def test_each_core_starts_with_a_size_of_its_own():
    """The right rank's: W's variance is the same by the left one's, but a direction has one size in all cores, and so
    moves small ones more.  A mean square of n normal numbers is off by sqrt(2 / n) of it; five of these."""
    parts = torch.nn.ModuleDict({"down": TensorTrain(64, 64, 8, bias=False)})
    values = tensor_train.initial(parts, Spec("rep", "qv", 8, 8), tensor_id)
    cores = [values[f"down.cores.{i}"] for i in range(len(parts["down"].factors))]
    deviation = (1 / 128) ** (1 / (2 * len(cores)))
    for core in cores:
        square = core.square().mean().item() * core.shape[2] / deviation**2
        assert square == pytest.approx(1, abs=5 * (2 / core.numel()) ** 0.5)


def test_factors_are_as_equal_as_can_be_before_the_largest_is_small():
    """10 and 12 are the first numbers of whose factorisations the two are not the same."""
    assert balanced(3960) == (6, 6, 10, 11)  # not 5 8 9 11
    assert balanced(4680) == (6, 6, 10, 13)  # not 5 8 9 13


def test_the_residual_stream_is_float32_whatever_products_are_computed_in():
    """Where no block adds anything, what comes out is the embedding as it was, normalised: in bf16 it would be off by
    2^-9 of it."""
    lm = create(tiny_llama(), seed=3, dtype=torch.bfloat16)
    for name, stored in lm.weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            stored.value.zero_()
    tokens = torch.tensor([[5, 17, 96]])
    x = lm.weights[lm.embedding].value[tokens]
    want = torch.nn.functional.rms_norm(x, x.shape[-1:], None, lm.config.rms_norm_eps)
    torch.testing.assert_close(lm.hidden(tokens, None, lm.stored_view())[0], want, rtol=1e-6, atol=0)


def test_scores_of_chosen_words_are_float32_whatever_products_are_computed_in():
    """bf16 would round each product's factors by 2^-9 of it."""
    lm = create(tiny_llama(), seed=3, dtype=torch.bfloat16)
    hidden, words = gaussian(1, 4, 32), torch.tensor([7, 3, 96])
    want = hidden[0].double() @ lm.weights[lm.decoder].value[words].double().T
    torch.testing.assert_close(lm.score(hidden, lm.stored_view(), words)[0].double(), want, rtol=1e-5, atol=1e-6)


def test_a_class_that_is_only_predicted_counts_in_f1_macro():
    """As scikit-learn's macro average: class 0 has an F1 of 2/3, class 1, which is nobody's, of 0."""
    said = [Prediction("", option, (0,), "", (), ("a", "b")) for option in (0, 1)]
    assert measure("f1_macro", said) == pytest.approx(1 / 3)


def test_the_gold_label_is_the_last_one_whatever_annotators_said(tmp_path):
    """SNLI's header has one column for the annotators' labels, of which a row has up to five."""
    path = tmp_path / "train.tsv"
    rows = ["A.\tB.\tneutral\tcontradiction\tentailment", "C.\tD.\tneutral\tcontradiction"]
    path.write_text("\n".join(["sentence1\tsentence2\tlabel1\tgold_label", *rows, ""]))
    golds = [row.fields["gold_label"] for row in read_rows(path, TASKS["snli"])]
    assert golds == ["entailment", "contradiction"]


NOTHING = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
NESTED = {  # a file of the benchmark's own layout: what its examples are, in order
    "multirc": (
        '{"idx": 3, "passage": {"text": "It rains.", "questions": [{"idx": 7, "question": "What?", "answers": '
        '[{"text": "Rain", "label": 1}, {"text": "Snow", "label": 0}]}]}}\n',
        [{"paragraph": "It rains.", "question": "What?", "answer": answer, "label": label, "group": "3, 7"}
         for answer, label in (("Rain", 1), ("Snow", 0))],
    ),
    "record": (  # ends of entities are inclusive; they are in the passage's order, each once
        '{"passage": {"text": "Ann met Bo. Ann won.", "entities": [{"start": 8, "end": 9}, {"start": 12, "end": 14}, '
        '{"start": 0, "end": 2}]}, '
        '"qas": [{"query": "@placeholder lost.", "answers": [{"text": "Bo"}, {"text": "Bo"}]}]}',
        [{"passage": "Ann met Bo. Ann won.", "entities": ["Ann", "Bo"], "choices": [" Ann lost.", " Bo lost."],
          "label": [1]}],
    ),
    "squad": (
        json.dumps({"data": [{"title": "Rain", "paragraphs": [{"context": "It rains.", "qas": [
            {"id": "a", "question": "What?", "answers": [{"text": "rains"}, {"text": "It rains"}, {"text": "rains"}]},
        ]}]}]}),
        [{"title": "Rain", "context": "It rains.", "question": "What?", "answers": ["rains", "It rains"]}],
    ),
    "drop": (  # a question without any answer is left out
        json.dumps({"p": {"passage": "It rains.", "qa_pairs": [
            {"query_id": "a", "question": "When?", "answer": NOTHING | {"number": "3"}, "validated_answers": [
                NOTHING | {"date": {"day": "1", "month": "May", "year": ""}}, NOTHING | {"spans": ["noon", "3"]}]},
            {"query_id": "b", "question": "Why?", "answer": NOTHING}]}}),
        [{"context": "It rains.", "question": "When?", "answers": ["3", "1 May", "noon"]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_nested_files_become_the_examples_that_they_hold(name, tmp_path):
    text, expected = NESTED[name]
    (tmp_path / "train.json").write_text(text)
    assert [row.fields for row in read_rows(tmp_path / "train.json", TASKS[name])] == expected


def test_shares_of_a_step_are_each_of_their_own_whole():
    """Of 10 elements 3 changed; of 5 that were to move the edge held 2 back; of 8 spacings it took 6."""
    folder = SimpleNamespace(chain=hashlib.sha256(), losses=[], events=None)
    folder.trajectory, folder.metrics = io.StringIO(), io.StringIO()
    one = torch.tensor([0.5], dtype=torch.float64)
    with StepRecorder(folder, size=10) as recorder:
        recorder.write((1, 0.7, Step(one, one, one, torch.tensor([3, 5, 2, 8, 6])), {}))
    row = json.loads(folder.metrics.getvalue())
    assert (row["changed"], row["held_back"], row["lost"]) == (0.3, 0.4, 0.75)


@pytest.mark.parametrize("method", ["quzo", "fo-ste"])
def test_activations_are_rounded_as_the_flag_says(method):
    """All three ways give losses of their own, near one another, as 8-bit numbers leave them."""
    losses = set()
    for kind in ACTIVATIONS:
        problem, _ = train.prepare(parse(["--method", method, "--activations", kind, "--num-eval", "8"]))
        losses.add(problem.quality(problem.dev).loss)
    assert len(losses) == len(ACTIVATIONS) == 3 and max(losses) - min(losses) < 0.1


def test_the_loss_of_guessing_goes_by_the_options_or_the_vocabulary():
    """By it a dead model is known.  What moves in steps, as a reward does, has none."""
    for loss, objective, want in (("options", "loss", math.log(3)), ("answer", "loss", math.log(97)),
                                  ("options", "reward", math.inf)):  # fmt: skip
        lm, task = SimpleNamespace(config=SimpleNamespace(vocab_size=97)), SimpleNamespace(loss=loss)
        part = SimpleNamespace(dev=[Encoded([[1, 5]], [[7], [8], [9]], 1, 0)], task=task)
        problem = SimpleNamespace(parts=[part], lm=lm)
        assert train.guess_of(SimpleNamespace(objective=objective), problem) == want


def test_verify_compares_the_dev_loss(tmp_path, capsys, monkeypatch):
    """Steps' losses and the weights may be those of the record, and dev's loss not."""
    rows_of(tmp_path / "run", *"--steps 2 --eval-every 2".split())
    quality = train.Problem.quality
    monkeypatch.setattr(train.Problem, "quality", lambda *of: (found := quality(*of))._replace(loss=found.loss + 1))
    capsys.readouterr()
    code, result = train.main(["--replay", str(tmp_path / "run"), "--verify", "2"]), json.loads(capsys.readouterr().out)
    assert code == 1 and not result["equal"] and result["weights_sha256"] == result["recorded_sha256"]
    assert result["largest_difference"] == 0 and result["loss_difference"] == pytest.approx(1)


def test_a_run_is_not_taken_up_around_other_weights(tmp_path, capsys):
    """Their config.json and tokenizer may be the same."""
    out, base = tmp_path / "run", tmp_path / "base"
    rows_of(out, *"--steps 2 --eval-every 2".split())
    (out / "result.json").unlink()
    shutil.copytree(TINY / "model", base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert train.main(["--resume", str(out), "--model", str(base)]) == 2
    assert "the run's base_weights_sha256 is" in capsys.readouterr().err and not (out / "result.json").exists()


def test_few_shot_examples_that_are_cut_are_in_one_split_alone(tmp_path):
    """Of each label the first k to learn from, and the next k to choose by."""
    for split in ("train", "dev"):  # SST-2's dev file is the test
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        rows = [f"{split} {i}\t{i % 2}" for i in range(20)]
        (tmp_path / f"SST-2/{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    splits = load_splits(TASKS["sst2"], tmp_path, 3, 0, None, None, 5)
    for part in (splits.train, splits.dev):
        assert sorted(row.fields["label"] for row in part) == ["0"] * 3 + ["1"] * 3
    learnt, chosen_by = ({row.fields["sentence"] for row in part} for part in (splits.train, splits.dev))
    assert len(learnt) == len(chosen_by) == 6 and not learnt & chosen_by
    assert [row.fields["sentence"] for row in splits.tests["test"]] == [f"dev {i}" for i in range(5)]
