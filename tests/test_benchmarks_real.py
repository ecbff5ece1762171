"""What the table of a real model compares: equal numbers of forwards, and flags that mean something."""

import pytest

from benchmarks.adapters import EXAMPLES
from benchmarks.real import FIRST_ORDER, arms_of
from runtime.config import parse, validate
from zo_optim import adazeta_queries, epoch_of


@pytest.mark.parametrize("queries", [2000, 10_000])
def test_every_arm_means_something_and_has_the_same_forwards(queries):
    for name, (flags, choices) in (FIRST_ORDER | arms_of(queries)).items():
        for choice in choices:
            c = parse(["--model", "llama2-7b", "--device", "cpu", *flags.split(), *choice.split()])
            validate(c)
            if c.optimizer == "zo":
                asked = [
                    c.queries
                    or adazeta_queries(epoch_of(step, EXAMPLES["sst2"], c.batch_size), c.alpha, c.beta, c.max_queries)
                    for step in range(c.steps)
                ]
                assert queries <= sum(asked) < queries + asked[-1] and name.startswith(f"{2 * queries:,}: ")
