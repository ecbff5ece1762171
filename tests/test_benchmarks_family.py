"""What the table of the family compares: equal numbers of forwards, and flags that mean something."""

import pytest

from benchmarks.adapters import EXAMPLES
from benchmarks.family import ARMS
from family.mezo_svrg import svrg
from runtime.config import parse, validate
from zo_optim import ZO


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_means_something_and_has_the_forwards_of_its_name(name):
    """To an eighth of MeZO-SVRG's, whose anchors come in whole."""
    flags, choices = ARMS[name]
    for choice in choices:
        c = parse(["--model", "llama2-7b", "--device", "cpu", *flags.split(), *choice.split()])
        validate(c)
        assert c.steps // c.eval_every <= 8
        if c.optimizer == "zo":
            forwards = 2 * c.steps
            if c.method == "mezo-svrg":
                zo = svrg(ZO(), c.anchor_steps, c.anchor_rate)
                forwards = sum(zo.forwards(step, -(-EXAMPLES[c.task] // c.batch_size)) for step in range(c.steps))
            assert forwards == pytest.approx(int(name.split(", ")[1].split(":")[0].replace(",", "")), rel=1 / 8)
