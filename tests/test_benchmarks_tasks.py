"""What the table of all tasks runs: flags that mean something, and as many forwards as it says."""

import pytest

from benchmarks.tasks import ARMS, CAUSAL, MASKED, QUERIES, adazeta_steps
from data.tasks import TASKS
from runtime.config import parse, validate
from zo_optim import adazeta_queries


def test_every_task_is_there():
    """But ReCoRD, of whose training file few rows are at hand, and the embedded one."""
    assert {*CAUSAL, *MASKED} == set(TASKS) - {"record", "tiny"} and len(ARMS) == 6 * (len(CAUSAL) + len(MASKED))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_means_something(name):
    flags, choices = ARMS[name]
    assert choices == [""]
    c = parse(["--model", "llama2-7b", "--device", "cpu", *flags.split()])
    validate(c)
    assert c.steps // c.eval_every <= 8
    if c.optimizer == "zo" and c.queries:
        assert c.steps * c.queries == QUERIES


def test_adazetas_steps_spend_the_queries():
    """150 examples are 10 steps of 16 an epoch: as many queries as those of all its epochs."""
    steps = adazeta_steps(150, 16)
    asked = [adazeta_queries(step // 10, 0.85, 0.45, 20) for step in range(steps)]
    assert sum(asked[:-1]) < QUERIES <= sum(asked) and steps == 616
