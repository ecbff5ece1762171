"""The tasks, one record each: how an example becomes a prompt, what may follow it, and where the official files are.

A user's own task is a JSON file of the same fields (docs/own_data.md).  Prompts for causal models and losses are those
of MeZO's large-model protocol, cloze texts for masked models and label words those of its k-shot protocol (LM-BFF's).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runtime.json_files import read_object, shown, shown_all

LONGEST_PROMPT = 2**23  # characters; a template may name a long field many times
TINY = Path(__file__).parent / "tiny"
MASK = "<mask>"


class Row(NamedTuple):
    """An example as a file has it."""

    place: str  # file:line, for errors
    fields: dict[str, Any]


class Example(NamedTuple):
    """An example as a model of one kind reads it."""

    pieces: tuple[str, ...]  # the prompt, or the cloze text with its <mask>: literal text and fields, in turn
    passage: int  # which piece loses tokens where all of them are too many
    options: tuple[str, ...]  # what may follow the prompt or stand at the mask; of a text to write, the answer to learn
    label: int  # the right option, or the first of those
    golds: tuple  # all right options' indices, or all right answers of a text to write
    group: str = ""  # which question this is an answer to, where a metric counts a question's answers together
    names: tuple[str, ...] = ()  # what metrics call the options, unless as they are


# ---------------------------------------------------------------- templates: "{field}" or "{field:filter}"


def _as_question(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith("?") else text + "?"


def _lower_first_word(text: str) -> str:
    first, space, rest = text.partition(" ")
    return text if first == "I" else first.lower() + space + rest


FILTERS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "lower_first_word": _lower_first_word,  # MeZO's COPA
    "without_last": lambda text: text[:-1],
    "without_period": lambda text: text.rstrip().removesuffix("."),
    "as_question": _as_question,  # MeZO's BoolQ
    "dashes": lambda text: text.replace("@highlight\n", "- "),  # MeZO's ReCoRD
    "conjunction": {"cause": "because", "effect": "so"}.__getitem__,
}


def render(template: str, fields: dict[str, Any]) -> tuple[list[str], list[str | None]]:
    """-> its pieces, and of each the field that it comes from, or None.  Raises ValueError for a field that is not
    there, and for too long a text.

    >>> render("{s:lower} It was", {"s": "Fine"})
    (['fine', ' It was'], ['s', None])
    """
    pieces, names, length = [], [], 0
    for literal, name, filters, _ in string.Formatter().parse(template):
        if literal:
            pieces.append(literal)
            names.append(None)
        if name is not None:
            try:
                value, _ = string.Formatter().get_field(name, (), fields)  # "target[span1_text]" is a field of a field
            except (KeyError, IndexError, AttributeError, TypeError):
                raise missing(name, fields) from None
            text = plain(value)
            for each in filter(None, filters.split("|")):
                text = FILTERS[each](text)
            pieces.append(text)
            names.append(name)
            length += len(text)
        if length > LONGEST_PROMPT:
            raise ValueError(f"its template and fields make a text of more than {LONGEST_PROMPT:,} characters")
    return pieces, names


def missing(name: str, fields: dict[str, Any]) -> ValueError:
    return ValueError(f"there is no field {shown(name)}; there are: {shown_all(fields)}")


def _with_spaces_first(pieces: list[str]) -> list[str]:
    """A cloze text's pieces, which are encoded one by one: the space between two belongs to the later one (LM-BFF)."""
    moved = [""] + [" " * (len(piece) - len(piece.rstrip(" "))) for piece in pieces[:-1]]
    kept = [piece.rstrip(" ") for piece in pieces[:-1]] + pieces[-1:]
    return [space + piece for space, piece in zip(moved, kept, strict=True)]


def _listed(fields: dict[str, Any], name: str) -> list:
    if not isinstance(fields.get(name), list):
        raise ValueError(f"field {shown(name)} must be a list, got {shown(fields.get(name))}")
    return fields[name]


def plain(value: Any) -> str:
    """A field's value as text: JSON's true is "true", and 1 is "1"."""
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- a task


@dataclass(frozen=True)
class Task:
    """One of four kinds, by what follows the prompt.

    options a dict: a word for each value of the field `label`.  options a list of templates: one for each choice, and
    `label` is the index of the right one.  options the name of a field: a list of choices of the example's own, and
    `label` names a list of the indices of the right ones.  answer a template: text is written, up to a new line, and
    what it is compared with is all that `label` holds, a text or a list of texts, of which the first is learnt.
    """

    name: str
    prompt: str | None = None  # for causal models
    cloze: str | None = None  # for masked models, with one <mask>
    options: dict[str, str] | tuple[str, ...] | str | None = None
    answer: str | None = None
    label: str = "label"
    group: str | None = None  # a field
    names: str | None = None  # a field that lists what metrics call the options
    passage: str | None = None  # the field that loses tokens where all are too many; by default the first
    loss: str = "options"  # cross-entropy over the options' scores; "answer": language modelling of the right one alone
    metric: str = "accuracy"
    also: tuple[str, ...] = ()  # metrics that the benchmark itself reports
    files: dict[str, str] = field(default_factory=dict)  # of train, dev and test; without dev it is drawn from train
    k_shot: dict[str, str] = field(default_factory=dict)  # the same for --k
    num_dev: int = 500  # examples drawn from train
    cloze_tokens: int = 128  # of the longest cloze text, as LM-BFF has it
    columns: tuple[str, ...] = ()  # of .csv and .tsv files that have no header
    rename: dict[str, str] = field(default_factory=dict)  # a file's field: its name here
    layout: str | None = None  # how the files nest examples (data/files.py); by default what their names end in says it
    quoting: str | None = None  # "csv" or "none"; by default csv files quote and tsv files do not (GLUE's way)
    folder: Path | None = None  # that its files are in; None: --data-dir

    @property
    def generates(self) -> bool:
        return self.answer is not None

    def example(self, row: Row, masked: bool) -> Example:
        """Raises ValueError, with the place, for a field that is not there or a label that is not known."""
        template = self.cloze if masked else self.prompt
        if template is None:
            kind, name = ("masked", "cloze text") if masked else ("causal", "prompt")
            raise ValueError(f"task {self.name} has no {name}: a {kind} model cannot learn it")
        try:
            pieces, names = render(template, row.fields)
            options, golds = self._options(row.fields)
            group = "" if self.group is None else render("{" + self.group + "}", row.fields)[0][0]
            called = () if self.names is None else tuple(map(plain, _listed(row.fields, self.names)))
            if masked and any(MASK in piece for piece, name in zip(pieces, names, strict=True) if name):
                raise ValueError(f"a field holds {MASK}, which stands for the word that is looked for")
        except (ValueError, KeyError) as error:
            of_value = f"the value {shown(error.args[0])} has no place in a template"
            message = error if isinstance(error, ValueError) else of_value
            raise ValueError(f"{row.place}: {message}") from None
        passages = [i for i, name in enumerate(names) if name and self.passage in (None, name.partition("[")[0])]
        label = 0 if self.generates else golds[0]
        pieces = _with_spaces_first(pieces) if masked else pieces
        return Example(tuple(pieces), passages[0], options, label, golds, group, called)

    def _options(self, fields: dict[str, Any]) -> tuple[tuple[str, ...], tuple]:
        """The options, and which are right; or the answer to learn, and all that are right."""
        if self.label not in fields:
            raise missing(self.label, fields)
        label = fields[self.label]
        if self.generates:
            answers = tuple(map(plain, label)) if isinstance(label, list) else (plain(label),)
            if not answers:
                raise ValueError(f"{shown(self.label)} holds no answer")
            return ("".join(render(self.answer, fields | {self.label: answers[0]})[0]),), answers
        if isinstance(self.options, dict):
            if plain(label) not in self.options:
                known = shown_all(self.options)
                raise ValueError(f"the {self.label:.80} must be one of {known}, got {shown(plain(label))}")
            return tuple(self.options.values()), (list(self.options).index(plain(label)),)
        if isinstance(self.options, str):
            options = tuple(map(plain, _listed(fields, self.options)))
        else:
            options = tuple("".join(render(option, fields)[0]) for option in self.options)
        golds = tuple(label) if isinstance(label, list) else (label,)
        golds = tuple(int(gold) if re.fullmatch("[0-9]{1,9}", str(gold)) else -1 for gold in golds)
        if not golds or not all(0 <= gold < len(options) for gold in golds):
            raise ValueError(f"the {self.label:.80} must be one of 0 to {len(options) - 1}, got {shown(label)}")
        return options, golds


# ---------------------------------------------------------------- the papers' tasks


def _k_shot(folder: str, ending: str = "tsv", **other: str) -> dict[str, str]:
    names = {"train": "train", "dev": "dev", "test": "test"} | other
    return {split: f"k-shot/{folder}/{{k}}-{{seed}}/{name}.{ending}" for split, name in names.items()}


def _jsonl(folder: str) -> dict[str, str]:
    return {"train": f"{folder}/train.jsonl", "test": f"{folder}/val.jsonl"}


YES_NO = {"true": "Yes", "false": "No"}
NO_YES = {"false": "No", "true": "Yes"}
INFERENCE = "{sentence1:without_last}?<mask>, {sentence2:lower_first}"  # of two sentences (LM-BFF)
INFERRED = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
MATCHED = {"dev": "dev_matched", "test": "test_matched", "test_mismatched": "test_mismatched"}
TREC = dict(zip("012345", " Description, Entity, Expression, Human, Location, Number".split(","), strict=True))

TASKS = {task.name: task for task in (
    Task("sst2", "{sentence:strip} It was", "{sentence:strip} It was<mask>.", {"0": " terrible", "1": " great"},
         files={"train": "SST-2/train.tsv", "test": "SST-2/dev.tsv"}, k_shot=_k_shot("SST-2")),
    Task("rte", "{premise}\nDoes this mean that \"{hypothesis}\" is true? Yes or No?\n",
         "{premise:without_last}?<mask>, {hypothesis:lower_first}", {"entailment": "Yes", "not_entailment": "No"},
         files=_jsonl("RTE"), k_shot=_k_shot("RTE"), rename={"sentence1": "premise", "sentence2": "hypothesis"},
         cloze_tokens=256),
    Task("cb", "Suppose {premise} Can we infer that \"{hypothesis}\"? Yes, No, or Maybe?\n",
         options={"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}, files=_jsonl("CB"),
         also=("f1_macro",), num_dev=100),
    Task("boolq", "{passage} {question:as_question}\n", options=YES_NO, files=_jsonl("BoolQ")),
    Task("wsc", "{text}\nIn the previous sentence, does the pronoun \"{target[span2_text]:lower}\" refer to "
         "{target[span1_text]}? Yes or No?\n", options=NO_YES, files=_jsonl("WSC"),
         num_dev=100),  # ours: MeZO's 500 would leave 54 to train with
    Task("wic", "Does the word \"{word}\" have the same meaning in these two sentences? Yes, No?\n"
         "{sentence1}\n{sentence2}\n", options=NO_YES, files=_jsonl("WiC"), passage="sentence1"),
    Task("multirc", "{paragraph}\nQuestion: {question}\nI found this answer \"{answer}\". Is that correct? "
         "Yes or No?\n", options={"0": "No", "1": "Yes"}, files=_jsonl("MultiRC"), layout="multirc", group="group",
         also=("f1a", "exact_questions")),
    Task("copa", "{premise:without_period} {question:conjunction} ",
         options=("{choice1:lower_first_word}", "{choice2:lower_first_word}"), files=_jsonl("COPA"), loss="answer",
         num_dev=100),
    Task("record", "{passage:dashes}\n-", options="choices", files=_jsonl("ReCoRD"), layout="record", loss="answer",
         names="entities", also=("f1",)),
    Task("squad", "Title: {title}\nContext: {context}\nQuestion: {question:strip}\nAnswer:", answer=" {answers}\n",
         label="answers", passage="context", files={"train": "squad/train-v1.1.json", "test": "squad/dev-v1.1.json"},
         layout="squad", loss="answer", metric="f1", also=("exact_match",)),
    Task("drop", "Passage: {context}\nQuestion: {question:strip}\nAnswer:", answer=" {answers}\n", label="answers",
         files={"train": "drop/drop_dataset_train.json", "test": "drop/drop_dataset_dev.json"},
         layout="drop", loss="answer", metric="f1", also=("exact_match",)),
    Task("sst5", cloze="{sentence:strip} It was<mask>.", files={"train": "sst-5/train.csv", "test": "sst-5/test.csv"},
         k_shot=_k_shot("sst-5", "csv"), columns=("label", "sentence"),
         options=dict(zip("01234", ("terrible", "bad", "okay", "good", "great"), strict=True))),
    Task("snli", cloze=INFERENCE, options=INFERRED, label="gold_label",
         files={"train": "SNLI/train.tsv", "test": "SNLI/dev.tsv"}, k_shot=_k_shot("SNLI"),
         cloze_tokens=256, layout="annotated"),
    Task("mnli", cloze=INFERENCE, options=INFERRED, label="gold_label",
         files={"train": "MNLI/train.tsv", "test": "MNLI/dev_matched.tsv",
                "test_mismatched": "MNLI/dev_mismatched.tsv"},
         k_shot=_k_shot("MNLI", **MATCHED), cloze_tokens=256, layout="annotated"),
    # in MeZO for masked models alone: its prompt for causal ones is ours
    Task("trec", "{sentence:strip} Type:", "<mask>: {sentence:strip}", TREC,
         files={"train": "trec/train.csv", "test": "trec/test.csv"}, k_shot=_k_shot("trec", "csv"),
         columns=("label", "sentence")),
    Task("tiny", "{sentence:strip} it was", options={"0": " terrible", "1": " great"}, folder=TINY,
         files={split: f"{split}.tsv" for split in ("train", "dev", "test")}),
)}  # fmt: skip


def get_task(name: str) -> Task:
    """One of TASKS, or the one that a .json file describes, whose files are then beside it."""
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".json"):
        known = f"{', '.join(TASKS)}, or a .json file that describes your own"
        raise ValueError(f"unknown task {shown(name)}; known: {known}")
    return read_task(Path(name))


KINDS = {  # of a task of a user's: the fields that it can have, and what JSON each is
    "prompt": "text", "cloze": "text", "options": "object list text", "answer": "text", "label": "text",
    "group": "text", "names": "text", "passage": "text", "loss": "text", "metric": "text", "also": "list",
    "files": "object", "num_dev": "number", "columns": "list", "rename": "object", "quoting": "text",
}  # fmt: skip


def _fits(value: Any, kinds: str) -> bool:
    """Lists and objects hold texts, and numbers are those that a flag can have."""
    if isinstance(value, list | dict):
        held = value.values() if isinstance(value, dict) else value
        return ("object" if isinstance(value, dict) else "list") in kinds and all(isinstance(v, str) for v in held)
    return isinstance(value, str) and "text" in kinds or "number" in kinds and type(value) is int and 1 <= value < 2**31


def read_task(path: Path) -> Task:
    """A user's own task.  Raises ValueError, with the file and the field, for what no task can have."""
    given = read_object(path)
    for name in given:
        if name not in KINDS:
            raise ValueError(f"{path}: unknown field {shown(name)}; known: {', '.join(KINDS)} (docs/own_data.md)")
    for name, value in given.items():
        if not _fits(value, KINDS[name]):
            kinds = " or ".join(KINDS[name].split()).replace("number", "number from 1 to 2147483647")
            raise ValueError(f"{path}: {name} must be {kinds}, got {shown(value)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "answer" in given:
        given = {"loss": "answer", "metric": "f1"} | given
    task = Task(path.stem, **given, folder=path.parent)
    for fault in (*_faults(task), *_faults_of_files(task), *_faults_of_templates(task)):
        raise ValueError(f"{path}: {fault}")
    return task


def _faults(task: Task) -> Iterator[str]:
    """What is wrong with a task of a user's as a whole."""
    if task.prompt is None and task.cloze is None:
        yield '"prompt" is missing (for a masked model: "cloze")'
    if task.cloze is not None and task.cloze.count(MASK) != 1:
        yield f"cloze must have one {MASK}"
    if (task.options is None) == (task.answer is None):
        yield 'one of "options" and "answer" is needed'
    if task.answer is not None and task.loss != "answer":
        yield 'beside "answer" the loss is "answer"'
    if not isinstance(task.options, str | None) and len(task.options) < 2:
        yield "there must be two options or more"
    for name, choices in (("loss", ("options", "answer")), ("quoting", (None, "csv", "none"))):
        if getattr(task, name) not in choices:
            known = shown_all(filter(None, choices))
            yield f"{name} must be one of {known}, got {shown(getattr(task, name))}"
    if len(set(task.columns)) < len(task.columns):
        yield f"two columns have the same name: {shown(list(task.columns))}"


def _faults_of_files(task: Task) -> Iterator[str]:
    if not {"train", "test"} <= set(task.files):
        yield '"files" must name a train and a test file'
    for split in task.files:
        if split not in ("train", "dev") and not split.startswith("test"):
            yield f"files: a split is train, dev or one that begins with test, got {shown(split)}"


def _faults_of_templates(task: Task) -> Iterator[str]:
    templates = {name: getattr(task, name) for name in ("prompt", "cloze", "answer")}
    if isinstance(task.options, tuple):
        templates |= {f"options[{i}]": text for i, text in enumerate(task.options)}
    for name, template in templates.items():
        yield from () if template is None else _of_template(name, template, task.passage)


def _of_template(name: str, template: str, passage: str | None) -> Iterator[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        yield f"{name}: {error}; a brace of the text itself is written twice"
        return
    columns = [(column or "").partition("[")[0] for _, column, _, _ in parsed]
    if name in ("prompt", "cloze") and passage and passage not in columns:
        yield f"passage: {name} has no field {shown(passage)}"
    for _, column, _, conversion in parsed:
        if conversion or "." in (column or ""):
            yield f"{name}: {shown(column)} is no plain name of a field; rename the column"
    if not any(column for _, column, _, _ in parsed):
        yield f'{name} has no field: write its name in braces, as in "{{text}}"'
    for filters in (filters for _, _, filters, _ in parsed if filters):
        for each in filters.split("|"):
            if each not in FILTERS:
                yield f"{name}: unknown filter {shown(each)}; known: {', '.join(FILTERS)}"
