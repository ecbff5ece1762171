"""An exported run in lm-evaluation-harness: its scores there are ours.  Skips where `lm_eval` is not installed."""

import json

import pytest

import train

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: our_rte
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{premise}}\\nDoes this mean that \\"{{hypothesis}}\\" is true? Yes or No?\\n"
doc_to_choice: ["Yes", "No"]
doc_to_target: "{{['entailment', 'not_entailment'].index(label)}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


DOCUMENTS = 60


@pytest.mark.full
def test_an_exported_run_scores_there_what_it_scores_here(tmp_path, monkeypatch, real_model, real_data, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data, run, plain = real_data("RTE"), tmp_path / "run", tmp_path / "plain"
    flags = "--task rte --num-train 8 --num-dev 8 --num-eval 40 --steps 4 --eval-every 2 --batch-size 4 --device cpu"
    model = str(real_model("zollama-28m"))
    assert train.main([*flags.split(), "--model", model, "--data-dir", str(data.parent), "--out", str(run)]) == 0
    assert train.main(["--evaluate", str(run), "--export", str(plain)]) == 0
    capsys.readouterr()
    assert train.main(["--evaluate", str(run), "--predict", str(data / "val.jsonl")]) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/our_rte.yaml").write_text(TASK.replace("FILE", str(data / "val.jsonl")))
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(plain), "dtype": "float32", "add_bos_token": True}, device="cpu",
        tasks=["our_rte"], task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks")),
        log_samples=True, batch_size=8, bootstrap_iters=0, limit=DOCUMENTS,
    )  # fmt: skip
    samples = sorted(found["samples"]["our_rte"], key=lambda sample: sample["doc_id"])
    same = 0
    for sample, row in zip(samples, ours, strict=False):
        doc = sample["doc"]
        if "  " in doc["premise"] + doc["hypothesis"]:  # transformers merges spaces otherwise than sentencepiece
            continue
        (yes, no), same = (float(of_one[0][0]) for of_one in sample["resps"]), same + 1
        assert yes - no == pytest.approx(row["scores"][0] - row["scores"][1], abs=2e-4)
    assert len(samples) == DOCUMENTS and same > DOCUMENTS - 3
    right = [row["prediction"] == sample["doc"]["label"] for row, sample in zip(ours, samples, strict=False)]
    accuracy = sum(right) / DOCUMENTS
    assert found["results"]["our_rte"]["acc,none"] == pytest.approx(accuracy)
