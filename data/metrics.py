"""Metrics of a split: accuracy, SuperGLUE's F1 over answers and over classes, SQuAD's exact match and token F1."""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Prediction(NamedTuple):
    """What a model answered to one example."""

    text: str  # the option's, or what was written
    option: int  # its index; 0 where text was written
    golds: tuple  # the right options' indices, or the right answers
    group: str  # which question it answers
    scores: tuple[float, ...]  # of the options, empty where text was written
    options: tuple[str, ...]

    @property
    def texts(self) -> list[str]:
        """The right answers."""
        return [self.options[gold].strip() if isinstance(gold, int) else gold for gold in self.golds]


def normalised(text: str) -> list[str]:
    """SQuAD's words of an answer: lower case, without punctuation and without the articles a, an and the."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(answer: str, gold: str) -> float:
    """SQuAD's F1 of the words that both have; of two answers without words 1, of one such 0."""
    ours, theirs = normalised(answer), normalised(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    same = (Counter(ours) & Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def accuracy(p: Prediction) -> float:
    return float(p.option in p.golds) if p.options else exact_match(p)


def f1(p: Prediction) -> float:
    """The highest over the right answers."""
    return max(token_f1(p.text, gold) for gold in p.texts)


def exact_match(p: Prediction) -> float:
    return max(float(normalised(p.text) == normalised(gold)) for gold in p.texts)


def f1_macro(predictions: Sequence[Prediction]) -> float:
    """CB's: the mean over classes of the F1 of each; a class that is neither there nor predicted does not count."""
    pairs = [(p.option, p.golds[0]) for p in predictions]
    classes = sorted({i for pair in pairs for i in pair})
    return sum(_f1_of([(ours == c, gold == c) for ours, gold in pairs]) for c in classes) / len(classes)


def f1a(predictions: Sequence[Prediction]) -> float:
    """MultiRC's: the F1 of "this answer is right" (option 1) over all answers of all questions."""
    return _f1_of([(p.option == 1, 1 in p.golds) for p in predictions])


def exact_questions(predictions: Sequence[Prediction]) -> float:
    """MultiRC's exact match: the share of questions all of whose answers are judged rightly."""
    right = defaultdict(list)
    for p in predictions:
        right[p.group].append(p.option in p.golds)
    return sum(map(all, right.values())) / len(right)


def _f1_of(pairs: list[tuple[bool, bool]]) -> float:
    """Pairs of said and so."""
    hits = sum(said and so for said, so in pairs)
    said, so = (sum(column) for column in zip(*pairs, strict=True))
    return 2 * hits / (said + so) if said + so else 0.0


OF_ONE: dict[str, Callable[[Prediction], float]] = {"accuracy": accuracy, "f1": f1, "exact_match": exact_match}
OF_ALL: dict[str, Callable[[Sequence[Prediction]], float]] = {
    "f1_macro": f1_macro, "f1a": f1a, "exact_questions": exact_questions,
}  # fmt: skip


def metric_of_one(name: str) -> Callable[[Prediction], float]:
    """One of OF_ONE, or a function of the user's own, "module:name": of a text and its right answers, a number.

    Raises ValueError where there is none."""
    if name in OF_ONE:
        return OF_ONE[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = f"one of a split: {', '.join(OF_ALL)}" if name in OF_ALL else f"known: {', '.join((*OF_ONE, *OF_ALL))}"
        raise ValueError(f"unknown metric {name!r} of an answer; {known}, or module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # the module is the user's
        raise ValueError(f"metric {name!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"metric {name!r}: it is no function but {found!r}")

    def of_ones_own(p: Prediction) -> float:
        try:
            return float(found(p.text, p.texts))
        except (Exception, SystemExit) as error:
            raise ValueError(f"metric {name!r} failed on {p.text!r} and {p.texts}: {error!r}") from None

    return of_ones_own


def check_metric(name: str, of_texts: bool) -> None:
    """Raises ValueError where there is no such metric: before a run, whose end would be late to say so."""
    if name not in OF_ALL or of_texts:
        metric_of_one(name)


def measure(name: str, predictions: Sequence[Prediction]) -> float:
    """A metric of a split, between 0 and 1 but for a user's own."""
    if name in OF_ALL:
        return OF_ALL[name](predictions)
    return mean(metric_of_one(name), predictions)


def mean(of_one: Callable[[Prediction], float], predictions: Sequence[Prediction]) -> float:
    return sum(map(of_one, predictions)) / len(predictions)
