"""`--profile N`: every phase is there, times add up, and bytes and operations are those that a count by hand gives."""

import gc
import json
import math
import time
import timeit

import pytest
import torch

import profiler
import train
from config import recorded
from data.scoring import Encoded, collate
from model import load
from profiler import (
    IDLE,
    PHASES,
    WARM_UP,
    bytes_coded,
    bytes_decoded,
    bytes_probed,
    bytes_stepped,
    measure,
    phase,
    profiled,
)
from quant import encode, stored_parts
from zo_optim import ZO, Pair

N = 2  # steps profiled
FLAGS = ["--steps", str(WARM_UP + N + 1), "--eval-every", str(WARM_UP + 1), "--batch-size", "8", "--num-eval", "20",
         "--device", "cpu"]  # fmt: skip


def start(folder, *flags: str) -> train.Config:
    return train.parse([*FLAGS, "--out", str(folder), *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, profile.json) of a run that is evaluated between two profiled steps."""
    folder = tmp_path_factory.mktemp("profile") / "run"
    c = start(folder, "--profile", str(N))
    train.run(c)
    return c, json.loads((folder / "profile.json").read_text())


# ---------------------------------------------------------------- a run


def test_phases_are_all_there_and_add_up(run):
    profile = run[1]
    phases = profile["phases"]
    assert list(phases) == [*PHASES, IDLE] and profile["steps"] == N
    assert all(row["ms"] > 0 for row in phases.values())
    assert sum(row["ms"] for row in phases.values()) == pytest.approx(profile["step_ms"], rel=1e-6)
    assert phases["materialise"]["gb_per_s"] > 0 and phases["matmul"]["tflop_per_s"] > 0
    assert phases["update"]["times_floor"] > 1  # it draws, rounds and counts for every byte
    assert phases["loss"]["times_floor"] is None and phases["loss"]["idle_ms"] is None
    assert profile["copy_gb_per_s"] > 0.1 and profile["matmul_tflop_per_s"] > 1e-4


def test_a_step_is_as_long_as_the_clock_says(tmp_path):
    """Without the evaluation within it.  Tolerance: what a busy machine may do between two readings of the clock."""
    seconds, profiles = [], []
    wait, evaluate = phase("data")(time.sleep), phase("evaluation")(time.sleep)
    for _ in profiled(range(WARM_UP + 3), 3, torch.device("cpu"), torch.float32, profiles.append):
        started = time.perf_counter()
        wait(0.03)
        seconds.append(time.perf_counter() - started)
        evaluate(0.02)
    assert profiles[0]["step_ms"] == pytest.approx(1e3 * sum(seconds[WARM_UP:]) / 3, rel=0.1)
    assert profiles[0]["phases"]["data"]["ms"] == pytest.approx(profiles[0]["step_ms"], rel=0.1)
    assert profiles[0]["unprofiled_step_ms"] >= 50  # which a wall clock cannot part from its evaluation


def test_bytes_and_operations_equal_a_count_by_hand(run):
    """int8 codes, fp32 products, one query: every forward holds both probes."""
    c, profile = run
    problem = train.prepare(c)[0]
    lm, model = problem.lm, problem.lm.config
    D, F, L, P = model.hidden_size, model.intermediate_size, model.num_hidden_layers, 2
    head, kv = model.head_dim * model.num_attention_heads, model.head_dim * model.num_key_value_heads
    matrices = [(head, D), (kv, D), (kv, D), (D, head), (F, D), (F, D), (D, F)] * L
    vectors = (2 * L + 1) * D
    whole = sum(R * C + 4 * R + P * R * C * 4 for R, C in matrices) + vectors * (4 + P * 4)
    moved, flops = [], []
    for step in range(WARM_UP, WARM_UP + N):
        indices = train.batch_indices(c.seed, step, c.batch_size, len(problem.train))
        batch = collate([problem.train[i] for i in indices], problem.pad, lm.device)
        rows = len(batch.tokens.unique()) + len(batch.words)
        moved.append(whole + rows * (D + 4 + P * D * 4))
        last = sum(R * C for R, C in matrices[-4:])  # what comes after the last block's attention, of what is read
        products = (sum(R * C for R, C in matrices) - last) * batch.tokens.numel()
        products += (last + D * len(batch.words)) * len(batch.row)
        flops.append(2 * P * products)
    assert profile["phases"]["materialise"]["bytes"] == sum(moved) / N
    assert profile["phases"]["matmul"]["flops"] == sum(flops) / N
    everything = [*matrices, *[(model.vocab_size, D)] * (1 if model.tie_word_embeddings else 2)]
    assert profile["phases"]["update"]["bytes"] == sum(2 * R * C + 4 * R for R, C in everything) + 2 * 4 * vectors


def test_profiling_a_run_with_a_warmup_needs_no_other_flags():
    """Which may be longer than what is left of the run."""
    train.validate(train.parse("--method mezo --warmup 60 --profile 2".split()))


def test_profiling_changes_no_weight(run, tmp_path):
    c = run[0]
    assert train.run(start(tmp_path / "run"))["weights_sha256"] == load(f"{c.out}/model", weights="int8").sha256()
    assert not (tmp_path / "run" / "profile.json").exists()


def test_the_table_is_on_standard_error_and_the_json_alone_on_standard_output(tmp_path, capsys):
    flags = ["--profile", "1", "--batch-size", "2", "--num-eval", "4", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == WARM_UP + 2 and len(captured.out.splitlines()) == 1
    assert profiler.table(json.loads((tmp_path / "run" / "profile.json").read_text())) in captured.err


@pytest.mark.parametrize("flags, told", [
    ("--method fo --profile 2", "--profile means nothing beside --method fo"),
    ("--method lora --profile 2", "--profile means nothing beside --method lora --optimizer adamw"),
    (f"--profile 5 --steps {WARM_UP + 4}", f"--profile 5 needs --steps of {WARM_UP + 5} or more, got {WARM_UP + 4}"),
    ("--profile -1", "--profile must be in [0, 1000], got -1"),
])  # fmt: skip
def test_what_cannot_be_profiled_is_refused(flags, told):
    with pytest.raises(ValueError) as error:
        train.validate(train.parse(flags.split()))
    assert told in str(error.value)


def test_a_run_taken_up_again_is_not_profiled(run):
    c, _ = run
    assert recorded(train.parse(["--resume", c.out]), vars(c)).profile == 0
    with pytest.raises(ValueError, match="a run has its own flags"):
        recorded(train.parse(["--resume", c.out, "--profile", "2"]), vars(c))


# ---------------------------------------------------------------- ranges


def test_without_a_profiler_a_range_counts_nothing_and_costs_next_to_nothing():
    ranged = phase("data", lambda x: 1 / 0)(lambda x: x)
    assert ranged(3) == 3
    assert min(timeit.repeat(lambda: ranged(3), number=1000, repeat=20)) / 1000 < 1e-6  # seconds


def test_an_interrupted_run_stops_the_profiler():
    profiles = []
    for step in profiled(range(99), 9, torch.device("cpu"), torch.float32, profiles.append):
        if step == WARM_UP + 1:
            assert torch.autograd.profiler._is_profiler_enabled
            break
    gc.collect()
    assert not torch.autograd.profiler._is_profiler_enabled and not profiles


@pytest.mark.parametrize("weights, residual", [
    ("fp32", 0), ("bf16", 0), ("int8", 0), ("int8", 4), ("int4", 0), ("int4", 8), ("fp8", 0)
])  # fmt: skip
def test_bytes_of_every_format(weights, residual):
    """From the shapes that the format promises."""
    shape, vector = torch.Size((6, 260)), torch.Size((260,))
    store = {name: encode(torch.randn(s), weights, residual) for name, s in (("w", shape), ("norm", vector))}
    size = {
        suffix: dtype.itemsize * math.prod(size)
        for suffix, (dtype, size) in stored_parts(shape, weights, residual).items()
    }
    pair = Pair(store, 0, 0, 0, ZO(), torch.bfloat16)
    forward = size[""] + size.get(".scale", 0)  # residuals are not read
    assert bytes_probed(pair, "w") == forward + 2 * 6 * 260 * 2
    assert bytes_probed(pair, "w", torch.tensor([0, 5, 5])) == forward // 2 + 2 * 3 * 260 * 4  # float32
    assert bytes_probed(pair, "norm") == 260 * (4 + 2 * 4)
    assert bytes_stepped(store, []) == 2 * sum(size.values()) - size.get(".scale", 0) + 2 * 4 * 260
    if weights == "fp8":
        assert bytes_coded(pair, "w") == forward + 2 * 6 * 260
    pair.probes = 1
    assert bytes_decoded(pair, "w") == (0 if weights == "bf16" else forward + 6 * 260 * 2)  # bf16 is not copied


def names_of(work) -> list[str]:
    """Of the ranges that a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        work()
    return [e["name"] for e in profiler.timeline(recorded) if e["cat"] == "user_annotation"]


def test_each_way_to_weights_and_data_is_one_range():
    """Twice would count its bytes twice."""
    pair = Pair({"w": encode(torch.randn(6, 256), "fp8")}, 0, 0, 0, ZO(), torch.bfloat16)
    index, batch = torch.tensor([0, 5]), [Encoded([[1, 2, 3]], [[4], [5]], 2, 0)]
    for work in (lambda: pair.read("w"), lambda: pair.codes("w"), lambda: pair.rows("w", index)):
        assert [name.partition(",")[0] for name in names_of(work)] == ["materialise"]
    assert names_of(lambda: collate(batch, 0, torch.device("cpu"))) == ["data"]


# ---------------------------------------------------------------- a GPU's timeline


def host(name, ts, dur, cat="cpu_op", **args):
    return {"cat": cat, "name": name, "ts": float(ts), "dur": float(dur), "tid": 1, "args": args}


def span(name, ts, dur):
    return host(name, ts, dur, "user_annotation")


def launch(number, ts, cat="cuda_runtime"):
    return host("cudaLaunchKernel", ts, 2, cat, correlation=number)


def kernel(name, number, ts, dur):
    return host(name, ts, dur, "kernel", correlation=number) | {"tid": 7}


DIMS = {"Input Dims": [[2, 3, 4], [2, 4, 5]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
A_STEP = [
    span("data", 0, 10),  # of a step that does not count
    launch(1, 5),
    kernel("copy", 1, 7, 3),
    span("step", 100, 400),
    span("other forward", 110, 200),
    span("data", 110, 20),
    span("materialise, 1000 bytes", 130, 20),
    launch(2, 140, "cuda_driver"),  # Triton's, within no operator
    kernel("_pair_kernel", 2, 150, 50),
    host("aten::matmul", 160, 20),
    host("aten::bmm", 162, 16, **DIMS),
    host("aten::bmm", 163, 14, **DIMS),  # the same product, handed on
    launch(3, 165),
    kernel("nvjet_tst_128x256", 3, 200, 30),
    launch(4, 166),
    kernel("splitKreduce_kernel", 4, 230, 10),
    host("Torch-Compiled Region: 0/0", 190, 40),
    launch(5, 195, "cuda_driver"),
    kernel("triton_poi_fused_silu_mul", 5, 240, 5),
    launch(6, 200),
    kernel("sm90_xmma_gemm_bf16", 6, 245, 5),
    launch(7, 210),
    kernel("fmha_cutlassF_bf16", 7, 250, 10),
    span("loss", 250, 20),
    launch(8, 255),
    kernel("log_softmax", 8, 262, 4),
    span("update, 600 bytes", 350, 50),
    kernel("_update_kernel", 99, 360, 40),  # whose launch was not recorded
    launch(9, 390),
    kernel("prefetched", 9, 370, 20),  # on another stream
    span("evaluation", 410, 50),
    span("materialise, 7 bytes", 410, 5),
    launch(10, 412),
    kernel("ampere_gemm", 10, 420, 20),
    launch(11, 470),
    kernel("Memcpy DtoH", 11, 480, 10),  # in the step and in no phase
]


def test_kernels_belong_to_the_range_that_launched_them():
    """Kernels run from 150 to 260, 262 to 266, 360 to 400 and 480 to 490, in a step of 350 us beside its evaluation."""
    m = measure(A_STEP)
    us = {name: m.us[name] for name in (*PHASES, IDLE)}
    assert us == {
        "data": 0, "materialise": 50, "matmul": 30 + 10 + 5, "other forward": 5 + 10 + 10, "loss": 4, "update": 40 + 20,
        IDLE: 350 - 110 - 4 - 40 - 10,
    }  # fmt: skip
    assert m.steps == 1 and m.wall == 350
    assert m.moved == {"materialise": 1000, "update": 600, "matmul": 2 * (24 + 40 + 30)} | dict.fromkeys(
        set(m.moved) - {"materialise", "update", "matmul"}, 0)  # fmt: skip
    assert m.flops["matmul"] == 2 * 2 * 3 * 4 * 5 == m.flops.total()


def test_idle_time_is_where_the_host_was_meanwhile():
    waits = measure(A_STEP).waits
    assert waits.total() == 186
    assert waits["data"] == 20 and waits["materialise"] == 20 and waits["matmul"] == 0
    assert waits["loss"] == 2 + 4 and waits["other forward"] == 310 - 270 and waits["update"] == 10
    assert waits[IDLE] == 10 + 40 + 10 + 30


@pytest.mark.parametrize("name, dims, flops, numbers", [
    ("aten::mm", [[3, 4], [4, 5]], 120, 12 + 20 + 15),
    ("aten::addmm", [[5], [3, 4], [4, 5], [], []], 120, 5 + 12 + 20 + 15),
    ("aten::baddbmm", [[2, 1, 5], [2, 3, 4], [2, 4, 5]], 240, 10 + 24 + 40 + 30),
])  # fmt: skip
def test_cost_of_products(name, dims, flops, numbers):
    event = host(name, 0, 1, **{"Input Dims": dims, "Input type": ["float"] * len(dims)})
    assert profiler.cost(event, True) == (4 * numbers, flops) and profiler.cost(event, False) == (0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path):
    c = start(tmp_path / "run", "--profile", str(N), "--device", "cuda")
    train.run(c)
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    phases = profile["phases"]
    assert all(phases[name]["ms"] > 0 for name in (*PHASES, IDLE))
    assert sum(row["ms"] for row in phases.values()) == pytest.approx(profile["step_ms"], rel=0.02)
    assert sum(row["idle_ms"] for row in phases.values()) == pytest.approx(phases[IDLE]["ms"])
    assert phases["materialise"]["times_floor"] > 0.9 and phases["update"]["times_floor"] > 0.9
    assert train.run(start(tmp_path / "plain", "--device", "cuda"))["weights_sha256"] == load(
        f"{c.out}/model", "cuda", weights="int8").sha256()  # fmt: skip
