"""train.py --method mazo: masks measured once, bound in the record, read again by --resume and --replay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_equal_folders, shortened, tiny_llama, tiny_roberta

import train
from data.tasks import TINY
from family import mazo
from model import create, load
from random_bits import Key
from runtime.config import parse
from runtime.dry_run import predict
from runtime.problem import MASK_QUERIES, MASK_TEXTS, MASKS, NO_STEP, prepare
from runtime.record import read_run
from runtime.run_folder import check_free
from zo_optim import ZO

SHORT = "--method mazo --steps 6 --eval-every 3 --batch-size 8 --num-eval 16 --lr 3e-3 --device cpu"
SHAPES = {"llama": tiny_llama(), "tied": tiny_llama(tie_word_embeddings=True), "roberta": tiny_roberta()}
OTHER = {
    "prompt": "it was seen : {sentence:strip}", "options": {"0": " great", "1": " terrible"},
    "files": {name: f"{name}.tsv" for name in ("train", "dev", "test")},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with shortened():
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> str:
    """The embedded task and another, as --task names them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in OTHER["files"].values():
        shutil.copy(TINY / name, folder / name)
    (folder / "other.json").write_text(json.dumps(OTHER))
    return f"tiny,{folder / 'other.json'}"


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> Callable[[str], tuple[Path, dict]]:
    """Runs, each once: flags -> folder and result."""
    done = {}

    def whole(flags: str = "") -> tuple[Path, dict]:
        if flags not in done:
            folder = tmp_path_factory.mktemp("runs") / "run"
            done[flags] = folder, train.run(parse([*SHORT.split(), *flags.split(), "--out", str(folder)]))
        return done[flags]

    return whole


def said(capsys, *flags: str) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = train.main([*map(str, flags)])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else {}, err


def masks_of(folder: Path) -> dict[str, torch.Tensor]:
    return mazo.unpacked((folder / MASKS).read_bytes(), load(TINY / "model").weights)


# ---------------------------------------------------------------- the masks of a run


@pytest.mark.full
def test_masks_are_those_of_all_tasks_measured_before_the_first_step(both, wholes):
    """Put together by hand: each task's own texts and losses, the first of its order, at the base weights."""
    folder, _ = wholes(f"--task {both}")
    problem, _ = prepare(parse([*SHORT.split(), "--task", both]))
    zo, key, tasks = ZO(1e-3, MASK_QUERIES), Key(0, NO_STEP), []
    for at, part in enumerate(problem.parts):
        indices = train.batch_indices(0, 0, 2 * MASK_TEXTS, 256, 256)[at * MASK_TEXTS : (at + 1) * MASK_TEXTS]
        examples = [problem.train[i] for i in indices]
        texts = [example.sequences[0] for example in examples]
        tasks.append(mazo.measure(part.lm, part.loss_fn(8)(examples[:4]), texts, key, zo))
    want, found = mazo.masks(problem.lm.weights, tasks, key, zo, 0.5), masks_of(folder)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    alone = masks_of(wholes("")[0])
    assert all(found[name].sum(1).eq(found[name].shape[1] // 2).all() for name in found)
    assert all(not torch.equal(alone[name], found[name]) for name in found)


@pytest.mark.parametrize("flags", ["", "--weights int8 --direction-bits 4 --mask-share 0.1"])
def test_what_is_masked_stays(wholes, flags):
    """And what is not moves: the weights that are kept against those that the run began with."""
    folder, result = wholes(flags)
    weights = "int8" if "int8" in flags else "fp32"
    before, after = load(TINY / "model", weights=weights).weights, load(folder / "model", weights=weights).weights
    found, share = masks_of(folder), 0.1 if "0.1" in flags else 0.5
    assert result["best_step"] and len(found) == 22
    for name, mask in found.items():
        changed = before[name].dequantise() != after[name].dequantise()
        assert not (changed & ~mask).any() and changed.any()
        assert mask.sum(1).eq(round(share * mask.shape[1])).all()


def test_masks_of_whole_rows_are_mezos_run(wholes):
    """The same losses, projected gradients and weights, to the bit."""
    (masked, ours), (plain, theirs) = wholes("--mask-share 1"), wholes("--method mezo")
    assert ours["weights_sha256"] == theirs["weights_sha256"] and ours["dev_loss"] == theirs["dev_loss"]
    assert read_run(masked).projected_grads == read_run(plain).projected_grads
    assert ours["weights_sha256"] != wholes("")[1]["weights_sha256"]
    assert not (plain / MASKS).exists() and "masks_sha256" not in read_run(plain).config


def test_a_file_of_masks_is_a_bit_a_weight():
    """A row's last byte ends in zeros.  Read back as they were; the same bytes for the same masks."""
    lm = create(tiny_llama(hidden_size=20, num_attention_heads=2))
    shapes = {name: store.matrix_shape for name, store in lm.weights.items() if len(store.shape) == 2}
    drawn = {name: torch.rand(s, generator=torch.Generator().manual_seed(0)) < 0.3 for name, s in shapes.items()}
    file = mazo.packed(drawn)
    assert mazo.packed(mazo.unpacked(file, lm.weights)) == file
    assert all(torch.equal(mask, drawn[name]) for name, mask in mazo.unpacked(file, lm.weights).items())
    held = sum(r * -(-columns // 8) for r, columns in shapes.values())
    assert held < len(file) < held + 100 * len(shapes) + 100


@pytest.mark.parametrize("kind", SHAPES)
def test_a_dry_run_knows_their_bytes(kind):
    """One a weight, in memory, of the matrices that have inputs."""
    lm, c = create(SHAPES[kind]), parse(["--method", "mazo"])
    found = mazo.mean_squares(lm, [[5, 9, 30, 41], [7, 8]])
    held = sum(lm.weights[name].shape.numel() for name in found)
    predicted = predict(c, SHAPES[kind], 16)
    assert predicted["bytes"]["masks"] == held
    plain = predict(parse(["--method", "mezo"]), SHAPES[kind], 16)
    assert predicted["expected_peak_bytes"] == plain["expected_peak_bytes"] + held


# ---------------------------------------------------------------- their record


def test_a_replay_reads_them_and_verify_measures_them_again(capsys, both, wholes, monkeypatch):
    folder, result = wholes(f"--task {both}")
    code, replayed, _ = said(capsys, "--replay", folder, "--verify", 3)
    assert code == 0 and replayed["masks_difference"] == replayed["largest_difference"] == 0.0
    for name in ("LanguageModel.hidden", "LanguageModel.score", "Llama.hidden"):
        monkeypatch.delattr(f"model.{name}")
    code, replayed, _ = said(capsys, "--replay", folder)
    assert code == 0 and replayed["equal"] and replayed["weights_sha256"] == result["weights_sha256"]


def test_other_masks_are_refused(capsys, tmp_path, wholes):
    """By --replay, and by --resume of a run that was killed after its second line."""
    folder, cut = wholes("")[0], tmp_path / "cut"
    shutil.copytree(folder, cut)
    content = bytearray((folder / MASKS).read_bytes())
    content[-1] ^= 1
    for way in ("--replay", "--resume"):
        if way == "--resume":
            (cut / "result.json").unlink()
        (cut / MASKS).write_bytes(content)
        code, _, err = said(capsys, way, cut)
        assert code == 2 and err.endswith(f"{cut / MASKS} is not what the run began with: begin a new run\n")
        (cut / MASKS).unlink()
        code, _, err = said(capsys, way, cut)
        assert code == 2 and f"{MASKS} is missing" in err
    (cut / MASKS).write_bytes((folder / MASKS).read_bytes())
    assert said(capsys, "--resume", cut)[0] == 0
    assert_equal_folders(cut, folder)


@pytest.mark.full
def test_masks_that_were_made_up_are_found_out(capsys, tmp_path, monkeypatch):
    """Masks that no measure gave, in a record that is otherwise true."""
    measured = train.mask_file

    def turned(c, problem, zo) -> bytes:
        masks = mazo.unpacked(measured(c, problem, zo), problem.lm.weights)
        return mazo.packed({name: ~mask for name, mask in masks.items()})

    with monkeypatch.context() as patch:
        patch.setattr(train, "mask_file", turned)
        assert said(capsys, *SHORT.split(), "--out", tmp_path / "run")[0] == 0
    assert said(capsys, "--replay", tmp_path / "run")[1]["equal"]
    code, replayed, _ = said(capsys, "--replay", tmp_path / "run", "--verify", 2)
    assert code == 1 and not replayed["equal"] and replayed["masks_difference"] == 1.0


@pytest.mark.full
def test_an_interrupted_run_is_finished_to_the_same_bits(capsys, tmp_path, both, wholes, monkeypatch):
    """Without measuring again."""

    class Stop:
        asked = iter([0, 0, 0, 0])
        signal = property(lambda self: next(self.asked, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Stop", Stop)
        assert said(capsys, *SHORT.split(), "--task", both, "--out", tmp_path / "cut")[0] == 130
    monkeypatch.delattr("train.mask_file")
    assert said(capsys, "--resume", tmp_path / "cut")[0] == 0
    assert_equal_folders(tmp_path / "cut", wholes(f"--task {both}")[0])


def test_a_folder_in_which_a_run_was_killed_before_it_began_is_free(tmp_path):
    (tmp_path / MASKS).write_bytes(b"")
    check_free(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        check_free(tmp_path)


# ---------------------------------------------------------------- flags


def test_a_run_says_what_it_is(capsys, tmp_path):
    code, result, err = said(capsys, *SHORT.split(), "--steps", 1, "--mask-share", 0.25, "--out", tmp_path / "run")
    assert code == 0 and "mazo on fp32 weights, Gaussian directions, 25 % of each row, cpu" in err
    assert result["method"] == "mazo" and result["directions"] == "full"


@pytest.mark.full
def test_lr_zero_leaves_every_bit(capsys, tmp_path):
    for weights in ("bf16", "int4"):
        flags = [*SHORT.split(), "--lr", "0", "--steps", "2", "--weights", weights, "--out", str(tmp_path / weights)]
        assert said(capsys, *flags)[1]["weights_sha256"] == read_run(tmp_path / weights).config["base_weights_sha256"]


REFUSED = {
    "--direction-bits sparse": "--method mazo masks dense directions of floats: leave out --direction-bits sparse",
    "--weights int8 --probe codes": "--method mazo masks dense directions of floats: leave out --probe codes",
    "--mask-share 0": "--mask-share must be in [0.001, 1], got 0.0", "--optimizer adamw": "means --optimizer zo",
    "--graphs": "--graphs are for zo on cuda, and of the methods of family/ for subzero and mazo alone",
}  # fmt: skip


def test_what_it_cannot_do_is_one_line(capsys, monkeypatch):
    for flags, message in REFUSED.items():
        code, result, err = said(capsys, "--method", "mazo", *flags.split())
        assert code == 2 and not result and message in err and err.count("\n") == 1, err
    monkeypatch.setattr(train, "joined", lambda device: train.ExitStack())
    monkeypatch.setattr(train.ExitStack, "world", 2, raising=False)
    monkeypatch.setattr(train.ExitStack, "__enter__", lambda self: self)
    code, _, err = said(capsys, "--method", "mazo", "--device", "cpu")
    assert code == 2 and "several tasks and mezo-svrg, mazo, elasticzo, zo2 are not shared" in err
    assert err.count("\n") == 1
