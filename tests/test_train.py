"""The command line as a user meets it: results, run folders, bad input, interrupts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train
from config import DEFAULTS, TINY_DEFAULTS, Config, check_products, recorded
from data.scoring import width
from data.tasks import TINY
from model import load
from run_folder import curve_svg, read_trajectory
from zo_optim import ZO, learning_rate, update

ROOT = Path(train.__file__).parent
SHORT = ["--steps", "6", "--eval-every", "3", "--batch-size", "8", "--num-eval", "100"]


@pytest.fixture
def quick(tmp_path):
    """quick(*flags) -> the result of a run of a few steps on the embedded task, in tmp_path/run."""

    def run(*flags: str, out: str = "run") -> dict:
        return train.run(train.parse([*SHORT, "--out", str(tmp_path / out), *flags]))

    return run


# ---------------------------------------------------------------- a run and its folder


@pytest.mark.parametrize("flags", [
    "", "--method mezo", "--method mezo --weights bf16", "--weights int4", "--weights int4 --residual 4 --oracle",
    "--weights fp8", "--estimator q-rge1 --probe codes", "--estimator random --activations int8",
])  # fmt: skip
def test_a_run_folder_redoes_the_run_without_a_forward(quick, tmp_path, flags):
    """Base weights + config.json + trajectory give the weights of the last step, to the bit."""
    result, run = quick(*flags.split(), "--queries", "2", "--lr", "1e-3"), tmp_path / "run"
    config = json.loads((run / "config.json").read_text())["flags"]
    lm = load(TINY / "model", weights=config["weights"], residual=config["residual"])
    bits = config["direction_bits"]
    zo = ZO(
        config["eps"], config["queries"], int(bits) if bits.isdigit() else None, bits == "grid", config["estimator"]
    )
    slopes = read_trajectory(run / "trajectory")
    assert len(slopes) == result["steps"] == 6 and all(len(s) == 2 for s in slopes)
    for step in range(result["best_step"]):
        lr = learning_rate(config["lr"], config["lr_schedule"], step, config["steps"])
        update(lm.store, slopes[step], config["seed"], step, zo, lr)
    assert lm.sha256() == result["weights_sha256"]
    saved = load(run / "model", weights=config["weights"], residual=config["residual"])
    assert saved.sha256() == result["weights_sha256"]


@pytest.mark.parametrize("flags, told", [
    ("--weights int8", ("4", 1e-3, None)), ("--weights int4", ("grid", 2e-4, 1)), ("--weights fp8", ("grid", 2e-4, 1)),
    ("--weights int8 --direction-bits grid", ("grid", 2e-4, 1)), ("--method mezo", ("full", 1e-3, None)),
    ("--weights int4 --direction-bits 3", ("3", 1e-3, None)), ("--weights int4 --eps 0.5", ("grid", 0.5, 1)),
    ("--weights int4 --activations int8", ("grid", 1e-3, 10)), ("--method fo", (None, None, None)),
    ("--weights int4 --activations int8 --stride 3", ("grid", 1e-3, 3)),
    ("--weights int8 --activations int8", ("4", 1e-3, None)),
    ("--model tiny --weights int4 --activations int8", ("grid", 1e-3, 1)),
])  # fmt: skip
def test_direction_and_eps_go_by_weights(flags, told):
    c = train.parse(["--model", "roberta-base", *flags.split()])
    assert (c.direction_bits, c.eps, c.stride) == told


def test_the_run_folder_holds_what_it_promises(quick, tmp_path):
    result, run = quick("--queries", "3"), tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json", "curve.svg", "metrics.jsonl", "model", "result.json", "trajectory"
    ]  # fmt: skip
    assert json.loads((run / "result.json").read_text()) == result
    config = json.loads((run / "config.json").read_text())
    assert set(config["flags"]) == {f.name for f in fields(train.Config)}
    assert {"python", "torch", "numpy", "safetensors"} <= set(config["versions"])
    assert set(config["data_sha256"]) == {"train.tsv", "dev.tsv", "test.tsv"}
    assert config["base_weights_sha256"] == load(TINY / "model", weights="int8").sha256()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, devs = [r for r in rows if "slope" in r], [r for r in rows if "dev" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and [r["step"] for r in devs] == [3, 6]
    for row in steps:
        both = zip(row["plus"], row["minus"], strict=True)
        assert row["slope"] == [(plus - minus) / (2 * config["flags"]["eps"]) for plus, minus in both]
        assert 0 <= row["clipped"] <= row["changed"] <= 1 and row["queries"] == 3 and row["tokens"] > 8
    best = min(devs, key=lambda r: r["dev_loss"])
    assert (result["dev"], result["dev_loss"], result["best_step"]) == (best["dev"], best["dev_loss"], best["step"])
    assert [row["forwards"] for row in devs] == [18, 36] and result["best_forwards"] == 6 * best["step"]
    assert "36 forwards" in (run / "curve.svg").read_text()
    assert (run / "curve.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("method", ["lora", "mezo"])
@pytest.mark.parametrize("schedule, after", [("constant", [1, 1, 1]), ("linear", [1, 2 / 3, 1 / 3])])
def test_the_rate_rises_for_the_first_steps(quick, tmp_path, method, schedule, after):
    """By AdamW and by forward passes; what is written down is what the step was given."""
    flags = "--weights fp32 --lr 1e-4 --steps 6 --warmup 3".split()
    quick("--method", method, "--lr-schedule", schedule, *flags)
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    lrs = [row["lr"] for row in rows if "lr" in row]
    assert lrs == pytest.approx([1e-4 * part for part in (0.25, 0.5, 0.75, *after)])


def test_the_same_seed_gives_the_same_run_and_another_does_not(quick):
    first, again = quick("--lr", "1e-3", out="a"), quick("--lr", "1e-3", out="b")
    other = quick("--lr", "1e-3", "--seed", "1", out="c")
    assert first["weights_sha256"] == again["weights_sha256"] != other["weights_sha256"]


def test_lr_zero_leaves_every_bit(quick):
    for weights, method in (("int8", "quzo"), ("fp32", "mezo"), ("bf16", "mezo")):
        result = quick("--lr", "0", "--weights", weights, "--method", method, out=f"{weights}-{method}")
        assert result["weights_sha256"] == load(TINY / "model", weights=weights).sha256()


def test_micro_batches_change_losses_by_rounding_only(quick, tmp_path):
    """lr 0, so that both runs stay at the same weights; float32 sums of 8 losses near 1 differ by some 1e-7."""
    for size in ("8", "3"):
        quick("--lr", "0", "--micro-batch-size", size, out=size)
    rows = [(tmp_path / size / "metrics.jsonl").read_text().splitlines() for size in ("8", "3")]
    for whole, parts in zip(*([json.loads(r) for r in run if "slope" in r] for run in rows), strict=True):
        assert whole["plus"] == pytest.approx(parts["plus"], abs=1e-6)
        assert whole["minus"] == pytest.approx(parts["minus"], abs=1e-6)


def test_a_trajectory_cut_in_mid_line_reads_to_its_last_whole_step(tmp_path):
    (tmp_path / "trajectory").write_text("0.1 -2.5\n1e-30 3.25\n7.0")
    assert read_trajectory(tmp_path / "trajectory") == [[0.1, -2.5], [1e-30, 3.25]]


def test_the_curve_is_xml_with_a_point_for_each_dev_evaluation():
    import xml.etree.ElementTree as ElementTree

    svg = ElementTree.fromstring(curve_svg([(s, 1 / s) for s in range(1, 1001)], [(500, 0.5), (1000, 0.75)]))
    assert len(svg.findall("{http://www.w3.org/2000/svg}circle")) == 2
    line = svg.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    assert 200 <= len(line) <= 300  # 1,000 steps, smoothed
    ElementTree.fromstring(curve_svg([], []))


def test_every_epoch_uses_every_example_once_whatever_the_batch_size():
    stream = [i for step in range(30) for i in train.batch_indices(5, step, batch_size=7, n=30)]
    assert [sorted(stream[e * 30 : (e + 1) * 30]) for e in range(7)] == [list(range(30))] * 7
    assert stream[:30] != stream[30:60]
    assert stream == [i for step in range(42) for i in train.batch_indices(5, step, batch_size=5, n=30)]


# ---------------------------------------------------------------- the command


def command(*flags: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", "--device", "cpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_the_last_line_is_json_and_progress_is_elsewhere(tmp_path):
    done = command(*SHORT, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    promised = (
        "model task method weights steps forwards trainable_parameters zero_shot dev test seconds peak_memory_bytes "
        "weights_sha256 out"
    )
    assert set(promised.split()) <= set(json.loads(done.stdout))
    assert "6/6" in done.stderr and "loss=" in done.stderr


def bad_inputs(tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Case -> (flags, what the line must say)."""
    empty, pickled, nan = tmp / "empty", tmp / "pickled", tmp / "nan"
    empty.mkdir()
    for folder in (pickled, nan):
        shutil.copytree(TINY / "model", folder)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    lm = load(nan)
    lm.store["model.norm.weight"].value[3] = float("nan")
    lm.save(nan)
    (tmp / "held").mkdir()
    (tmp / "held" / "result.json").write_text("{}")
    wrong = tmp / "data" / "k-shot" / "SST-2" / "16-42"
    wrong.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (wrong / f"{split}.tsv").write_text("sentence\tlabel\ngood\tpositive\n")
    sst2 = ["--task", "sst2", "--data-dir", str(tmp / "data")]
    return {
        "no config": (["--model", str(empty), "--task", "tiny"], "no config.json"),
        "pickle": (["--model", str(pickled), "--task", "tiny"], "pickles can run code and are never loaded"),
        "nan": (["--model", str(nan), "--task", "tiny"], "model.norm.weight holds NaN"),
        "model": (["--model", "gpt-5"], "unknown model 'gpt-5'"),
        "task": (["--task", "sst9"], "'sst9'"),
        "method": (["--method", "sgd"], "'sgd'"),
        "flag": (["--learning-rate", "1"], "--learning-rate"),
        "short flag": (["--step", "1"], "--step"),
        "not a number": (["--steps", "many"], "'many'"),
        "label": ([*sst2, "--k", "16"], "train.tsv:2: the label must be one of 0 to 1, got 'positive'"),
        "no file": ([*sst2, "--k", "512"], "512-42/train.tsv is missing"),
        "batch size": (["--batch-size", "0"], "--batch-size must be in [1, 2147483647], got 0"),
        "steps": (["--steps", "-5"], "--steps must be in [1, 2147483647], got -5"),
        "eps": (["--eps", "0"], "--eps"),
        "eps inf": (["--eps", "inf"], "--eps"),
        "lr": (["--lr", "-1"], "--lr"),
        "lr nan": (["--lr", "nan"], "got nan"),
        "queries": (["--queries", "0"], "--queries"),
        "seed": (["--seed", "-1"], "--seed"),
        "bits": (["--direction-bits", "9"], "'9'"),
        "mezo on codes": (["--method", "mezo", "--weights", "int8"], "use quzo for int8"),
        "mezo on a grid": (["--method", "mezo", "--direction-bits", "grid"], "use quzo for --direction-bits grid"),
        "fo on codes": (["--method", "fo", "--weights", "int4"], "use fo-ste for int4"),
        "fo-ste on floats": (["--method", "fo-ste", "--weights", "bf16"], "use fo for bf16"),
        "eps of adam": (["--method", "fo", "--eps", "1e-3"], "--eps means nothing beside --method fo"),
        "a zo decay": (["--weight-decay", "0.1"], "--weight-decay means nothing beside --method quzo"),
        "master of fo": (["--method", "fo", "--master", "bf16"], "--master means nothing beside --method fo"),
        "residual": (["--residual", "3"], "3"),
        "residual of fp8": (["--weights", "fp8", "--residual", "4"], "a residual needs weights int8 or int4, got fp8"),
        "oracle of fp8": (["--weights", "fp8", "--oracle"], "the oracle needs weights int8 or int4, got fp8"),
        "activations": (["--activations", "int4"], "'int4'"),
        "estimator": (["--estimator", "q-rge3"], "'q-rge3'"),
        "device": (["--device", "tpu"], "'tpu'"),
        "micro batch": (["--micro-batch-size", "0"], "--micro-batch-size"),
        "unused": (["--k", "16"], "--k means nothing beside task tiny"),
        "unused too": ([*sst2, "--k", "16", "--num-dev", "5"], "--num-dev means nothing beside --k"),
        "held": (["--out", str(tmp / "held")], "not empty"),
        "under a file": (["--out", str(tmp / "held" / "result.json" / "run")], "not a folder"),
    }


def test_bad_input_gets_one_line_and_exit_code_2_and_writes_nothing(tmp_path, capsys):
    for case, (flags, told) in bad_inputs(tmp_path).items():
        out = ["--out", str(tmp_path / "new")] if "--out" not in flags else []
        assert train.main([*SHORT, *out, *flags]) == 2, case
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1, (case, captured.err)
        assert captured.err.startswith("train.py: ") and told in captured.err, (case, captured.err)
        assert not (tmp_path / "new").exists(), case
    assert [p.name for p in (tmp_path / "held").iterdir()] == ["result.json"]


def test_a_diverging_run_says_so_and_keeps_its_record(tmp_path, capsys, monkeypatch):
    """A norm weight that overflows at step 3, as a rate far too large would make it."""

    def overflow(store, slopes, seed, step, *rest):
        if step == 3:
            store["model.norm.weight"].value.fill_(float("inf"))
        return update(store, slopes, seed, step, *rest)

    monkeypatch.setattr(train, "update", overflow)
    run = tmp_path / "run"
    assert train.main([*SHORT, "--out", str(run)]) == 2
    assert "the loss is not finite at step 5" in capsys.readouterr().err.splitlines()[-1]
    assert len(read_trajectory(run / "trajectory")) == 4
    load(run / "model", weights="int8")  # the best weights so far, of step 3
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_at_an_evaluation_is_not_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "update", lambda store, *rest: store["model.norm.weight"].value.fill_(float("nan"))[:2])
    assert train.main([*SHORT, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    assert "the loss is not finite at step 1" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "model").exists()


def test_a_machine_that_gives_out_gets_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    def fail_with(error):
        monkeypatch.setattr(train, "run", lambda c: (_ for _ in ()).throw(error))
        return train.main(SHORT)

    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:121]\nDefaultCPUAllocator: can't allocate memory: you tried")
    for error in OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory"), cpu:
        assert fail_with(error) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(RuntimeError, match="a bug"):
        fail_with(RuntimeError("a bug"))


def start_and_wait_for_steps(out: Path) -> subprocess.Popen:
    flags = ["--steps", "100000", "--eval-every", "4", "--batch-size", "4", "--num-eval", "100", "--out", str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that share a core with others wait for one another
    process = subprocess.Popen([sys.executable, "train.py", "--device", "cpu", *flags], cwd=ROOT, env=env, **pipes)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "trajectory").is_file() and len(read_trajectory(out / "trajectory")) >= 6:
            return process
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no six steps in a minute: {process.communicate()[1][-500:]}")


def test_ctrl_c_leaves_a_complete_run_folder(tmp_path):
    process = start_and_wait_for_steps(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    result = json.loads(out)
    assert result["interrupted"] and result["test"] is None and result["dev"] is not None
    assert result["steps"] == len(read_trajectory(tmp_path / "run" / "trajectory"))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert load(tmp_path / "run" / "model", weights="int8").sha256() == result["weights_sha256"]
    assert "Traceback" not in err


def test_a_killed_process_leaves_a_loadable_run_folder(tmp_path):
    process = start_and_wait_for_steps(tmp_path / "run")
    process.kill()
    process.communicate(timeout=60)
    steps = len(read_trajectory(tmp_path / "run" / "trajectory"))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert steps >= 6 and json.loads(rows[steps // 2])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["weights"] == "int8"
    load(tmp_path / "run" / "model", weights="int8")


# ---------------------------------------------------------------- the flags


def test_every_flag_is_a_field_and_every_default_has_one_home():
    config = train.parse([])
    assert (config.model, config.method, config.task, config.weights) == ("tiny", "quzo", "tiny", "int8")
    unused = {name for name, value in vars(config).items() if value is None}
    of_adapters = {"placement", "bottleneck", "tt_rank", "lora_rank", "lora_alpha", "init", "norms"}
    of_adapters |= {"alpha", "beta", "max_queries"}
    of_files = {"data_dir", "k", "data_seed", "num_train", "num_dev"}
    others = {"weight_decay", "master", "stride", "probes_per_forward", "resume", "replay"}
    assert unused == of_files | of_adapters | others
    assert "auto" not in vars(config).values()
    real = train.parse(["--model", "llama2-7b", "--method", "mezo"])
    assert (real.num_train, real.num_dev, real.data_seed, real.data_dir) == (1000, 500, 0, "datasets")
    assert (real.task, real.steps, real.lr, real.batch_size, real.weights) == ("sst2", 20000, 1e-6, 16, "bf16")
    k_shot = train.parse(["--task", "sst2", "--k", "16"])
    assert (k_shot.data_seed, k_shot.num_train, k_shot.data_dir) == (42, None, "datasets")
    assert set(DEFAULTS) == set(TINY_DEFAULTS)
    for table in (*DEFAULTS.values(), *TINY_DEFAULTS.values()):
        assert set(table) <= {f.name for f in fields(train.Config) if f.default is None}


def test_the_commands_of_the_readme_parse():
    readme = (ROOT / "README.md").read_text()
    found = re.findall(r"^python train\.py(.*)$", readme, re.MULTILINE)
    commands = [flags for flags in found if not re.search("--(help|resume|replay)", flags)]
    assert len(commands) >= 3
    for flags in commands:
        train.validate(train.parse(flags.replace("--model DIR ", "--model . ").split()))


def test_only_train_and_scripts_print_and_imports_go_one_way():
    """The graph that README's Files states; nothing imports train; no pickle anywhere."""
    allowed = {
        "quant": set(), "random_bits": set(), "checkpoint": set(), "run_folder": set(), "profiler": set(),
        "graphs": set(),
        "fused": {"quant", "random_bits", "zo_optim"},  # the last for an annotation only
        "model": {"checkpoint", "fused", "profiler", "quant", "random_bits", "tensor_train"},  # the last to annotate
        "zo_optim": {"profiler", "quant", "random_bits", "fused", "model"},  # the last for an annotation only
        "tensor_train": {"checkpoint", "quant", "random_bits", "model"},  # the last for annotations only
        "first_order": {"quant"}, "config": {"data", "profiler", "quant", "tensor_train"},
        "dry_run": {"config", "model", "quant", "tensor_train", "zo_optim"},
    }  # fmt: skip
    ours = {*allowed, "train", "data"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        text = path.read_text()
        imports = {m for m in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE) if m in ours}
        if path.stem in allowed:
            assert imports <= allowed[path.stem], path
        assert "train" not in imports and not re.search(r"torch\.load|pickle\.|weights_only", text), path
        if path.stem != "train":
            assert not re.search(r"^\s*print\(", text, re.MULTILINE), path


def test_what_is_installed_is_what_is_there():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert told["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))


def test_importing_has_no_effect():
    """No output, no global random draw, no thread or device change."""
    code = (
        "import torch; s = torch.get_rng_state(); n = torch.get_num_threads()\n"
        "import model, quant, zo_optim, train, run_folder, data.hub, data.scoring\n"
        "assert torch.equal(s, torch.get_rng_state()) and n == torch.get_num_threads()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_and_cpu_take_the_same_first_steps(quick, tmp_path):
    """Directions are equal integers; losses differ by float32 rounding of a small model's forward."""
    for device in ("cpu", "cuda"):
        quick("--device", device, "--compute", "fp32", "--lr", "0", out=device)
    runs = [read_trajectory(tmp_path / device / "trajectory") for device in ("cpu", "cuda")]
    assert [s for step in runs[0] for s in step] == pytest.approx([s for step in runs[1] for s in step], abs=5e-3)


@pytest.mark.parametrize("flags, told", [
    ("", ("fp32", False)), ("--device cuda", ("bf16", True)), ("--device cuda --weights fp32", ("fp32", True)),
    ("--device cuda --weights fp8 --activations fp8", ("fp8", True)), ("--device cuda --method fo", ("fp32", False)),
    ("--device cuda --weights fp8 --activations fp8 --compute bf16 --no-compile", ("bf16", False)),
    ("--weights fp8 --activations fp8", ("fp32", False)),
    ("--device cuda --method lora --weights fp8 --activations fp8", ("bf16", False)),
    ("--device cuda --weights fp8 --activations fp8 --direction-bits 4", ("bf16", True)),
    ("--device cuda --weights fp8 --activations fp8 --direction-bits 4 --probe codes", ("fp8", True)),
    ("--device cuda --method adazeta", ("bf16", False)), ("--device cuda --method adazeta --queries 4", ("bf16", True)),
])  # fmt: skip
def test_products_and_compilation_go_by_the_device(flags, told):
    c = train.parse(["--model", "roberta-base", "--device", "cpu", *flags.split()])
    assert (c.compute, c.compile) == told


@pytest.mark.parametrize("flags, on", [
    ("--device cpu", False), ("--device cuda", True), ("--device cuda --no-graphs", False),
    ("--device cuda --method fo", False), ("--device cuda --profile 3", False),
    ("--device cuda --method adazeta", True),
])  # fmt: skip
def test_graphs_go_by_the_device(flags, on):
    assert train.parse(["--model", "roberta-base", *flags.split()]).graphs is on


def test_a_gpu_without_triton_gets_no_graphs(monkeypatch):
    monkeypatch.setattr("config.has_triton", lambda: False)
    c = train.parse(["--model", "roberta-base", "--device", "cuda"])
    assert (c.graphs, c.compile, c.compute) == (False, False, "bf16")
    check_products(c)
    for flag in ("--graphs", "--compile"):
        with pytest.raises(ValueError, match="need Triton"):
            check_products(train.parse(["--model", "roberta-base", "--device", "cuda", flag]))


@pytest.mark.parametrize("flags", ["--method fo", "--profile 3"])
def test_graphs_are_refused_where_there_is_nothing_to_record(flags):
    """Without asking whether there is a GPU."""
    with pytest.raises(ValueError, match="--graphs are for zo on cuda"):
        check_products(train.parse(["--model", "roberta-base", "--device", "cuda", "--graphs", *flags.split()]))


def test_a_run_with_graphs_is_taken_up_on_a_cpu_without():
    flags = vars(train.parse(["--model", "roberta-base", "--device", "cuda"]))
    assert recorded(train.parse(["--resume", "run"]), flags).graphs
    assert not recorded(Config(resume="run", device="cpu"), flags).graphs


def test_batches_of_a_step_have_one_length_where_lengths_are_rounded_up():
    c = train.parse(["--device", "cpu", "--batch-size", "12"])
    problem = train.prepare(c)[0]
    examples = sorted(problem.train, key=width)[:1] + problem.train[:11]
    ragged = [batch.tokens.shape[1] for batch in train.batches_of(problem, examples, 4)]
    assert problem.multiple == 1 and len(set(ragged)) > 1
    problem.multiple = 8
    rounded = [batch.tokens.shape[1] for batch in train.batches_of(problem, examples, 4)]
    assert rounded == [-(-max(ragged) // 8) * 8] * 3
    cuda = train.parse(["--device", "cuda", "--no-graphs"])
    assert (train.multiple_of(cuda, 512), train.multiple_of(cuda, 510), train.multiple_of(c, 512)) == (8, 1, 1)


@pytest.mark.parametrize("flags, told", [
    ("--weights int4 --estimator q-rge1", "--estimator q-rge1 is about rounding directions"),
    ("--method mezo --estimator q-rge2", "--direction-bits full does not: use 2 to 8"),
    ("--weights fp32 --rounding nearest", "mean nothing beside --weights fp32"),
    ("--method mezo --weights fp32 --probe codes", "mean nothing beside --weights fp32"),
    ("--weights int4 --eps 1e-6", "is under a 4096th of the grid's widest spacing"),
    ("--weights int4 --eps 1e-2 --stride 4000", "is under a 4096th of the grid's widest spacing"),
    ("--compute fp8", "--compute fp8 multiplies codes by codes"),
    ("--weights fp8 --activations int8 --compute fp8", "--compute fp8 multiplies codes by codes"),
    ("--weights fp8 --activations fp8 --compute fp8 --direction-bits 4", "by quzo with --direction-bits grid"),
    ("--weights int4 --stride 3 --probe codes", "--probe codes would hold --stride 3 back"),
    ("--graphs --device cpu", "--graphs are for zo on cuda"),
    ("--method adazeta --compile", "--compile makes code for each number of probes, which grows here"),
    ("--weights int8 --stride 2", "--stride is about directions on the grid"),
    ("--method fo --stride 2", "--stride means nothing beside --method fo"),
    ("--warmup 1", "--warmup 1 leaves none of --steps 1 at the full rate"),
    ("--method lora --warmup -1", "--warmup must be in [0, 2147483647], got -1"),
])  # fmt: skip
def test_flags_that_would_be_ignored_are_refused(tmp_path, capsys, flags, told):
    assert train.main([*flags.split(), "--steps", "1", "--num-eval", "4", "--out", str(tmp_path / "run")]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
