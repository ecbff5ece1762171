"""Several processes of one run (torchrun), here two on a CPU: one trajectory, the same bits, no rank left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from runtime.ranks import Ranks
from runtime.record import read_run

ROOT = Path(train.__file__).parent
SHORT = "--steps 6 --eval-every 3 --num-eval 16 --batch-size 9 --lr 1e-3 --device cpu"


def started(flags: str, world: int = 2, **changes) -> list[subprocess.Popen]:
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return [
        subprocess.Popen([sys.executable, "train.py", *flags.split()], **pipes,
                         env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *both) for process, both in zip(processes, said, strict=True)]


@pytest.mark.full
@pytest.mark.parametrize("flags", ["", "--queries 2", "--method lora --optimizer zo --objective accuracy"])
def test_two_processes_take_the_steps_of_one(tmp_path, capsys, flags):
    """Up to the rounding of a mean that is made of two; the first alone speaks and writes."""
    (first, out, err), (second, *nothing) = ended(started(f"{SHORT} {flags} --out {tmp_path / 'two'}"))
    assert (first, second, nothing) == (0, 0, ["", ""]), err
    assert train.main(f"{SHORT} {flags} --out {tmp_path / 'one'}".split()) == 0
    alone, shared = (read_run(tmp_path / name).rows for name in ("one", "two"))
    for of_one, of_two in zip(alone, shared, strict=True):
        for name in ("plus", "minus"):
            assert of_two.get(name, []) == pytest.approx(of_one.get(name, []), abs=2e-3)
        assert of_two.get("tokens") == of_one.get("tokens")
    assert shared[1]["plus"] == pytest.approx(alone[1]["plus"], abs=1e-6)  # the first step, before weights can differ
    capsys.readouterr()
    assert train.main(["--replay", str(tmp_path / "two"), "--verify", "3"]) == 0  # by one process
    assert json.loads(capsys.readouterr().out)["largest_difference"] < 1e-6 and json.loads(out)["steps"] == 6


@pytest.mark.full
def test_a_run_is_taken_up_by_another_number_of_processes(tmp_path, capsys):
    """Ctrl-C at one of them stops all after the same step."""
    out = tmp_path / "run"
    long = SHORT.replace("--steps 6", "--steps 100000").replace("--eval-every 3", "--eval-every 50")
    both = started(f"{long} --out {out}")
    deadline = time.monotonic() + 90
    while not (out / "trajectory").is_file() or (out / "trajectory").read_text().count("\n") < 4:
        assert time.monotonic() < deadline and all(process.poll() is None for process in both)
        time.sleep(0.1)
    both[1].send_signal(signal.SIGINT)
    (code, said, err), (other, *_) = ended(both)
    assert code == 130 and other in (0, 130) and json.loads(said)["interrupted"], err
    steps = json.loads(said)["steps"]
    config = json.loads((out / "config.json").read_text())
    assert len(read_run(out).trajectory) == steps and config["flags"]["steps"] == 100000
    capsys.readouterr()
    assert train.main(["--replay", str(out)]) == 0  # whatever the number was


@pytest.mark.full
def test_a_process_that_dies_ends_the_others_in_one_line(tmp_path):
    both = started(f"{SHORT.replace('--steps 6', '--steps 100000')} --out {tmp_path / 'run'}")
    deadline = time.monotonic() + 90
    while not (tmp_path / "run/trajectory").is_file():
        assert time.monotonic() < deadline and all(process.poll() is None for process in both)
        time.sleep(0.1)
    both[1].kill()
    (code, out, err), _ = ended(both)
    assert code == 1 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith("train.py: another process of this run has ended")
    assert read_run(tmp_path / "run").config  # which --resume finishes


@pytest.mark.full
def test_what_several_processes_cannot_do_is_said(tmp_path):
    for code, out, err in ended(started(f"{SHORT} --method fo --out {tmp_path / 'run'}")):
        assert code in (1, 2) and out == "" and "Traceback" not in err
        assert "start one process" in err or "another process of this run has ended" in err


@pytest.fixture
def sent(monkeypatch) -> list:
    """What a rank sends: of two ranks this is the second, and the first sends ones."""
    sums = []
    monkeypatch.setattr("torch.distributed.reduce", lambda tensor, to: sums.append(tensor.tolist()))
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, of: tensor.add_(1.0)[-1:].zero_())
    return sums


def test_a_share_without_examples_counts_as_nothing(sent):
    ranks = Ranks(rank=1, world=2)
    loss_fn = ranks.loss_of(lambda examples: SimpleNamespace(), len)(["only"], 1)
    assert loss_fn.agreed(torch.tensor([float("nan"), 1.0])).tolist() == [1.0, 1.0] and sent == [[0.0] * 5]
    two = ranks.loss_of(lambda examples: SimpleNamespace(n=len(examples)), len)(["a", "b", "c", "d", "e"], 1)
    assert two.n == 2 and two.queries == range(1)
    assert two.agreed(torch.tensor([4.0, 1.0])).tolist() == [3.0, 1.0]  # (2 * 4 + 1) / (2 + 1)
    assert sent[1] == [8.0, 2.0, 2.0, 2.0, 0.0] and not ranks.stopping


def test_queries_are_shared_where_their_number_divides_so(sent):
    """All examples then, and the others' losses are zeros over no terms."""
    ranks = Ranks(rank=1, world=2)
    of = ranks.loss_of(lambda examples: SimpleNamespace(n=len(examples)), len)
    whole, odd = of(["a", "b", "c"], 4), of(["a", "b", "c"], 3)
    assert (whole.n, whole.queries) == (3, range(1, 4, 2)) and (odd.n, odd.queries) == (1, range(3))
    whole.agreed(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert sent == [[0, 0, 3, 6, 0, 0, 9, 12, 0, 0, 3, 3, 0, 0, 3, 3, 0]]
