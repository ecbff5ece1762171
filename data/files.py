"""Files of examples, in the layouts in which benchmarks and people keep them, and the splits that the papers draw.

.jsonl, .csv and .tsv; and JSON that nests questions in passages: MultiRC, ReCoRD, SQuAD and DROP.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from data.tasks import Row, Task, plain
from runtime.json_files import parse, shown

LARGEST_FILE = 2**30  # bytes; SNLI's training file has 0.5 GB
LARGEST_NESTED = 2**29  # bytes of a file that is one JSON value and so is read whole
LONGEST_LINE = 2**25  # characters; a line of MultiRC or ReCoRD is a passage and all its questions
LONGEST_TEXT = 2**20  # characters of one field; a passage has some thousands
MOST_ROWS = 2**21  # examples in a file, of which the shortest take 200 bytes of memory and 8 microseconds each


class Splits(NamedTuple):
    train: list[Row]
    dev: list[Row]
    tests: dict[str, list[Row]]  # "test", and others where a task has more than one
    files: list[Path]  # what they were read from, for the run's record


def read_rows(path: Path, task: Task) -> list[Row]:
    """Raises ValueError, with the line, for a file that is missing, too large, or not what its ending says."""
    if not path.is_file():
        where = "; see README.md for where to get the official files" if task.folder is None else ""
        raise ValueError(f"{path} is missing{where}")
    kind = task.layout if task.layout in READERS else path.suffix
    if kind not in READERS:
        raise ValueError(f"{path}: files of examples end in .jsonl, .csv or .tsv")
    most = LARGEST_NESTED if kind in ("squad", "drop") else LARGEST_FILE
    if path.stat().st_size > most:
        raise ValueError(f"{path} has {path.stat().st_size / 2**30:.1f} GB; at most {most / 2**30} are read")
    rows = []
    for number, fields in _read(kind, path, task):
        for name, value in fields.items():
            longest = max(map(len, _texts(value)), default=0)
            if longest > LONGEST_TEXT:
                raise ValueError(
                    f"{path}:{number}: {shown(name)} has {longest:,} characters; at most {LONGEST_TEXT:,}"
                )
        fields = {task.rename.get(name, name): value for name, value in fields.items()}
        rows.append(Row(f"{path}:{str(number):.80}", fields))
        if len(rows) > MOST_ROWS:
            raise ValueError(f"{path} holds more than {MOST_ROWS:,} examples")
    if not rows:
        raise ValueError(f"{path} holds no examples")
    return rows


def _texts(value: Any) -> Iterator[str]:
    """All texts in a field's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _texts(held)


def _read(kind: str, path: Path, task: Task) -> Iterator[tuple[int | str, Fields]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from READERS[kind](path, file, task)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not in the layout of {kind}'s official files: {shown(error)}") from None


# ---------------------------------------------------------------- one reader a layout: line number and fields of each

Fields = dict[str, Any]


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """With their ends, of which there is but one kind: not U+2028, say, which sentences may hold."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{path}:{number}: a line has {LONGEST_LINE:,} characters or more")
        yield line


def _json_lines(path: Path, file: TextIO, task: Task | None = None) -> Iterator[tuple[int, Fields]]:
    for number, line in enumerate(_lines(path, file), start=1):
        if not line.strip():
            continue
        try:
            fields = parse(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {shown(line.strip())}")
        yield number, fields


def _table(path: Path, file: TextIO, task: Task) -> Iterator[tuple[int, Fields]]:
    """.csv and .tsv, with a header unless the task names the columns."""
    tab = path.suffix == ".tsv"
    quoted = (task.quoting or ("none" if tab else "csv")) == "csv"
    rows = (_quoted_rows if quoted else _plain_rows)(path, file, "\t" if tab else ",")
    columns, in_quotes, found = list(task.columns), 0, 0
    for number, cells in rows:
        if not columns:
            columns = cells
            if len(set(columns)) < len(columns):
                raise ValueError(f"{path}:{number}: two columns have the same name: {shown(cells, 200)}")
            continue
        if task.layout == "annotated":  # SNLI's and MNLI's rows have as many labels as annotators, the gold one last
            cells = [*cells[: len(columns) - 1], cells[-1]]
        if len(cells) != len(columns):
            expected = f"{len(columns)} columns ({shown(', '.join(columns), 200)[1:-1]})"
            raise ValueError(f"{path}:{number}: expected {expected}, got {len(cells)}")
        found += 1
        in_quotes += not quoted and all(len(c) > 1 and c[0] == c[-1] == '"' for c in cells if not c.isdigit())
        yield number, dict(zip(columns, cells, strict=True))
    if found > 1 and in_quotes == found:
        raise ValueError(f'{path}: every text is in quotes; read it with "quoting": "csv"')


def _plain_rows(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """GLUE's way: a quote is a character like any other."""
    for number, line in enumerate(_lines(path, file), start=1):
        if line.strip():
            yield number, line.removesuffix("\n").split(delimiter)


def _quoted_rows(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Strictly, or a quote that is never closed swallows what follows it."""
    reader, start = csv.reader(_lines(path, file), delimiter=delimiter, strict=True), 1
    while True:
        limit = csv.field_size_limit(LONGEST_LINE)  # the module's, for this row; LONGEST_TEXT says it better
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{start}: a quote that begins here does not end well: {error}") from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield start, cells
        start = reader.line_num + 1


def _multirc(path: Path, file: TextIO, task: Task) -> Iterator[tuple[int, Fields]]:
    for number, row in _json_lines(path, file):
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                yield number, {"paragraph": row["passage"]["text"], "question": question["question"],
                               "answer": answer["text"], "label": answer["label"],
                               "group": f"{row['idx']}, {question['idx']}"}  # fmt: skip


def _record(path: Path, file: TextIO, task: Task) -> Iterator[tuple[int, Fields]]:
    """Each entity of the passage, in the order in which they appear, fills the query's gap once."""
    for number, row in _json_lines(path, file):
        passage = row["passage"]["text"]
        spans = sorted(row["passage"]["entities"], key=lambda span: span["start"])
        entities = list(dict.fromkeys(passage[span["start"] : span["end"] + 1] for span in spans))
        for query in row["qas"]:
            right = list(dict.fromkeys(answer["text"] for answer in query["answers"]))
            yield number, {"passage": passage, "entities": entities,
                           "choices": [" " + query["query"].replace("@placeholder", entity) for entity in entities],
                           "label": [entities.index(answer) for answer in right if answer in entities]}  # fmt: skip


def _nested(path: Path, file: TextIO) -> Any:
    text = file.read()
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def _squad(path: Path, file: TextIO, task: Task) -> Iterator[tuple[str, Fields]]:
    for article in _nested(path, file)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                yield qa["id"], {"title": article["title"], "context": paragraph["context"],
                                 "question": qa["question"], "answers": list(dict.fromkeys(answers))}  # fmt: skip


def _drop(path: Path, file: TextIO, task: Task) -> Iterator[tuple[str, Fields]]:
    """Right is the answer, and what others answered who validated it; of several spans each (Hugging Face's way)."""
    for passage in _nested(path, file).values():
        for qa in passage["qa_pairs"]:
            answers = []
            for answer in (qa["answer"], *qa.get("validated_answers", ())):
                date = " ".join(filter(None, (answer["date"].get(part, "") for part in ("day", "month", "year"))))
                answers += filter(None, (answer["number"], date, *answer["spans"]))
            if answers:
                yield qa["query_id"], {"context": passage["passage"], "question": qa["question"],
                                       "answers": list(dict.fromkeys(answers))}  # fmt: skip


READERS = {".jsonl": _json_lines, ".csv": _table, ".tsv": _table,
           "multirc": _multirc, "record": _record, "squad": _squad, "drop": _drop}  # fmt: skip


# ---------------------------------------------------------------- splits


def load_splits(
    task: Task, data_dir: str | Path | None, k: int | None, data_seed: int | None, num_train: int | None,
    num_dev: int | None, num_eval: int,
) -> Splits:  # fmt: skip
    """Train and dev to learn from, the tests to report.

    With k: the published few-shot files where there are any, else k examples a class by LM-BFF's rule.  Where the task
    has a dev file: every file as it is.  Without either: MeZO's large-model protocol, num_train + num_dev examples
    drawn from the training file by a numpy permutation of data_seed (dev is the end of the draw; where there are too
    few, fewer train) and num_eval from the test file.
    """
    root = Path(data_dir) if task.folder is None else task.folder
    named = {split: root / path for split, path in task.files.items()}
    if k and task.k_shot:
        few = {split: root / path.format(k=k, seed=data_seed) for split, path in task.k_shot.items()}
        if few["train"].is_file() or not ("train" in named and named["train"].is_file()):
            return _as_they_are(task, _present(few), num_eval)
    if k:
        return _cut_by_class(task, named, k, data_seed, num_eval)
    if "dev" in named:
        return _as_they_are(task, named, num_eval)
    num_dev = num_dev or task.num_dev
    drawn = _draw(read_rows(named["train"], task), data_seed or 0, (num_train or 1000) + num_dev)
    if len(drawn) <= num_dev:
        raise ValueError(f"{named['train']} holds {len(drawn)} examples: {num_dev} for dev leave none to train with, "
                         "unless --num-dev is smaller")  # fmt: skip
    tests = {split: _draw(read_rows(path, task), data_seed or 0, num_eval) for split, path in _tests(named)}
    return Splits(drawn[:-num_dev], drawn[-num_dev:], tests, list(named.values()))


def _tests(named: dict[str, Path]) -> Iterable[tuple[str, Path]]:
    return ((split, path) for split, path in named.items() if split.startswith("test"))


def _as_they_are(task: Task, named: dict[str, Path], num_eval: int) -> Splits:
    rows = {split: read_rows(path, task) for split, path in named.items()}
    tests = {split: rows[split][:num_eval] for split, _ in _tests(named)}
    return Splits(rows["train"], rows["dev"], tests, list(named.values()))


def _present(named: dict[str, Path]) -> dict[str, Path]:
    """Raises ValueError, with the splits that there are, where their folder is missing."""
    folder = named["train"].parent
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.glob("*-*") if path.is_dir())
        there = f"; there are {', '.join(known)}" if known else "; see README.md for where to get the official files"
        raise ValueError(f"{folder} is missing{there}")
    return named


def _cut_by_class(task: Task, named: dict[str, Path], k: int, seed: int, num_eval: int) -> Splits:
    """LM-BFF's rule: the training file shuffled by numpy, then of each label the first k train and the next k dev."""
    if not isinstance(task.options, dict):
        raise ValueError(f"--k takes examples of each class, and task {task.name} has no classes")
    pool, by_label = read_rows(named["train"], task), defaultdict(list)
    np.random.RandomState(seed).shuffle(pool)
    for row in pool:
        by_label[plain(row.fields.get(task.label))].append(row)
    train = [row for of_label in by_label.values() for row in of_label[:k]]
    dev = [row for of_label in by_label.values() for row in of_label[k : 2 * k]]
    tests = {split: read_rows(path, task)[:num_eval] for split, path in _tests(named)}
    return Splits(train, dev, tests, list(named.values()))


def _draw(pool: list[Row], seed: int, n: int) -> list[Row]:
    """MeZO's draw; RandomState, because numpy's newer generators would choose other examples."""
    return [pool[i] for i in np.random.RandomState(seed).permutation(len(pool))[:n]]
