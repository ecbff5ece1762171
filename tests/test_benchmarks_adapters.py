"""What the table of adapters compares: equal numbers of forwards, and a fifth of LoRA's parameters at most."""

import pytest
from helpers import tiny_roberta

from benchmarks.adapters import EXAMPLES, QUERIES, arms_of
from benchmarks.speed import SHAPES
from data.files import load_splits
from data.tasks import get_task
from runtime.config import Config, parse, validate
from runtime.dry_run import predict
from zo_optim import adazeta_queries, epoch_of

ROBERTA = tiny_roberta(hidden_size=320, intermediate_size=1280, num_hidden_layers=8, num_attention_heads=5)


def configs(task: str) -> dict[str, Config]:
    """Each arm with each of its choices; the model is a preset's name, so that no file is looked for."""
    return {
        f"{arm} {choice}": parse(["--model", "llama2-7b", "--device", "cpu", *flags.split(), *choice.split()])
        for arm, (flags, choices) in arms_of(task).items() for choice in choices
    }  # fmt: skip


@pytest.mark.parametrize("task", EXAMPLES)
def test_every_arm_means_something_and_has_the_same_forwards(task):
    for name, c in configs(task).items():
        validate(c)
        if c.optimizer == "zo":
            of_step = [
                c.queries
                or adazeta_queries(epoch_of(step, EXAMPLES[task], c.batch_size), c.alpha, c.beta, c.max_queries)
                for step in range(c.steps)
            ]
            assert QUERIES <= sum(of_step) < QUERIES + of_step[-1], name
            assert c.steps // c.eval_every == 10, name


@pytest.mark.parametrize("raw, fitted", [
    (SHAPES["llama-28m"], "LoRETTA_adp, AdamW, 16 wide, rank 2"),
    (ROBERTA, "LoRETTA_adp, AdamW, 16 wide, rank 4, no norms"),
], ids=["llama", "roberta"])  # fmt: skip
def test_a_fifth_of_loras_parameters_is_a_fifth_at_most(raw, fitted):
    found = configs("trec").items()
    counts = {name.split(" --lr")[0]: predict(c, raw, 64)["trainable_parameters"] for name, c in found}
    lora = counts["trec: LoRA, AdamW"]
    for small in "LoRETTA_adp, AdamW, a fifth of LoRA's parameters", "LoRA of rank 1, AdamW", fitted:
        assert counts[f"trec: {small}"] <= lora / 5
    assert counts["trec: AdaZeta, one query, small"] < counts["trec: AdaZeta, one query"] < lora


@pytest.mark.parametrize("task", EXAMPLES)
def test_examples_are_as_many_as_the_files_have(task, real_data):
    found = load_splits(get_task(task), real_data("k-shot").parent, 512, 42, None, None, None)
    assert len(found[0]) == EXAMPLES[task]
