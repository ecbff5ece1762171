"""What is asked without training: evaluations, predictions, texts, checkpoints, and what a model will see."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import pytest
import transformers

import train
from data.tasks import TINY

ROOT = Path(train.__file__).parent
OWN = (ROOT / "docs" / "own_data.md").read_text()
WORDS = {"sad": "dull awful stale weak boring".split(), "happy": "lovely superb warm funny gripping".split()}


def lines(capsys, flags: str) -> list[dict]:
    """What a command prints, which must end well."""
    capsys.readouterr()
    code = train.main(flags.split())
    said = capsys.readouterr()
    assert code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


@pytest.fixture
def reviews(tmp_path, monkeypatch) -> Path:
    """docs/own_data.md's folder, with its mood.json and tables of its three columns; it is the current one's."""
    folder, rng = tmp_path / "reviews", random.Random(0)
    folder.mkdir()
    (folder / "mood.json").write_text(re.search(r"```json\n(.*?)```", OWN, re.DOTALL)[1])
    for name, n in (("train", 200), ("dev", 40), ("test", 40), ("new", 5)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "text", "mood"] if name != "new" else ["id", "text"])
            for i in range(n):
                mood = rng.choice(sorted(WORDS))
                text = f"the film, they said, was {rng.choice(WORDS[mood])} ."
                table.writerow([i, text, mood] if name != "new" else [i, text])
    monkeypatch.chdir(tmp_path)
    return folder


def test_own_data_becomes_a_model_and_its_predictions_in_two_commands(reviews, capsys):
    """Those of docs/own_data.md, word for word, but for fewer steps."""
    first, second, both = re.findall(r"^python train\.py (.*)$", OWN, re.MULTILINE)[:3]
    (result,) = lines(capsys, f"{first} --steps 80 --eval-every 20")
    assert result["zero_shot"] < 0.7 and result["test"] > 0.9 and result["metric"] == "accuracy"
    texts = [row["text"] for row in csv.DictReader((reviews / "new.csv").open())]
    moods = [next(mood for mood in WORDS if text.split()[-2] in WORDS[mood]) for text in texts]
    assert [line["prediction"] for line in lines(capsys, second)] == moods
    recorded = json.loads(Path("runs/mood/config.json").read_text())
    assert set(recorded["data_sha256"]) == {"train.csv", "dev.csv", "test.csv", "mood.json"}
    (result,) = lines(capsys, f"{both} --steps 2 --eval-every 2 --num-eval 8")  # several tasks at once
    assert set(result["tests"]) == {"tiny", "mood"}


def test_what_the_model_will_see_is_shown(reviews, capsys):
    shown = lines(capsys, "--task reviews/mood.json --show 3")
    assert [line["from"] for line in shown] == [f"reviews/train.csv:{i}" for i in (2, 3, 4)]
    rows = list(csv.DictReader((reviews / "train.csv").open()))
    for line, row in zip(shown, rows, strict=False):
        assert line["prompt"] == f"{row['text']} it was" and line["options"] == [" terrible", " great"]
        assert line["right"] == [{"sad": " terrible", "happy": " great"}[row["mood"]]]
        assert line["option_tokens"] == [1, 1] and line["cut"] == 0 and line["prompt_tokens"] > 8


@pytest.mark.parametrize("method", [
    "quzo --weights int4", *(pytest.param(m, marks=pytest.mark.full) for m in ("lora --steps 20", "loretta-adp", "fo"))
])  # fmt: skip
def test_a_finished_run_is_evaluated_as_it_ended(method, tmp_path, capsys):
    """Dev and test of its best weights, whatever they are: codes, floats, adapters around a base."""
    flags = f"--method {method} --steps 4 --eval-every 2 --num-eval 30 --batch-size 4 --out {tmp_path / 'run'}"
    (result,) = lines(capsys, flags)
    (found,) = lines(capsys, f"--evaluate {tmp_path / 'run'}")
    for name in ("dev", "dev_loss", "tests", "weights_sha256"):
        assert found[name] == result[name], name
    (more,) = lines(capsys, f"--evaluate {tmp_path / 'run'} --num-eval 50")
    assert more["dev_loss"] == found["dev_loss"] and more["tests"] != found["tests"]


@pytest.mark.full
def test_an_exported_run_is_one_of_transformers_with_the_same_scores(tmp_path, capsys):
    """int8 codes become the floats that they stand for, LoRA is merged; what cannot be merged says so."""
    for method in ("quzo", "lora --weights fp32"):
        run, new = tmp_path / method.split()[0], tmp_path / f"{method.split()[0]}-exported"
        lines(capsys, f"--method {method} --steps 4 --eval-every 2 --num-eval 30 --batch-size 4 --out {run}")
        assert lines(capsys, f"--evaluate {run} --export {new}") == [{"exported": str(new)}]
        transformers.AutoModelForCausalLM.from_pretrained(new)
        ours, exported = (
            lines(capsys, f"--evaluate {path} --task tiny --num-eval 30")[0]["dev_loss"] for path in (run, new)
        )
        assert exported == pytest.approx(ours, abs=2e-4)
    run = tmp_path / "adp"
    lines(capsys, f"--method loretta-adp --steps 2 --eval-every 2 --num-eval 8 --batch-size 4 --out {run}")
    assert train.main(["--evaluate", str(run), "--export", str(tmp_path / "no")]) == 2
    assert "merge" in capsys.readouterr().err


@pytest.mark.full
def test_adapters_around_calibrated_codes_are_evaluated(real_model, real_data, tmp_path, capsys):
    """The codes are not saved with them: they are made again from the same prompts."""
    flags = f"--model {real_model('zollama-28m')} --data-dir {real_data('RTE').parent} --task rte --num-train 8"
    flags += " --num-dev 4 --num-eval 8 --method loretta-adp --weights int4 --calibrate 4 --batch-size 2 --steps 2"
    (result,) = lines(capsys, f"{flags} --eval-every 1 --device cpu --out {tmp_path / 'run'}")
    (found,) = lines(capsys, f"--evaluate {tmp_path / 'run'} --device cpu")
    assert (found["dev_loss"], found["tests"]) == (result["dev_loss"], result["tests"])


def test_predictions_want_neither_labels_nor_the_training_files(reviews, capsys):
    """A column of labels may be empty."""
    lines(capsys, "--task reviews/mood.json --steps 2 --eval-every 2 --batch-size 4 --out runs/mood")
    (reviews / "new.csv").write_text("id,text,mood\n1,the film was warm .,\n")
    asked = "--evaluate runs/mood --predict reviews/new.csv"
    (line,) = lines(capsys, asked)
    (reviews / "train.csv").unlink()
    assert lines(capsys, asked) == [line] and line["prediction"] in WORDS and len(line["scores"]) == 2


def test_a_text_is_continued(capsys):
    (line,) = lines(capsys, f"--model {TINY / 'model'} --task tiny --generate film")
    assert line["text"].startswith("film ") and len(line["text"].split()) > 4
    assert lines(capsys, "--generate film") == [line]


def test_what_cannot_be_asked_gets_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("id,words\n1,a\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trajectory").write_text("")
    for flags, message in {
        "--evaluate /nowhere": "unknown model",
        f"--evaluate {tmp_path / 'broken'}": "cannot be read as a run folder",
        f"--predict {tmp_path / 'bad.csv'}": "bad.csv:2: there is no field 'sentence'; there are: 'id', 'words'",
        f"--predict {tmp_path / 'none.csv'}": "is missing",
        "--show 0": "--show must be in",
        "--generate a --show 1": "one question at a time, got --show and --generate",
        f"--evaluate {TINY / 'model'} --export {tmp_path}": "not empty",
        "--task nothing.json": "nothing.json",
    }.items():
        assert train.main(flags.split()) == 2, flags
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and said.out == "", (flags, said)
