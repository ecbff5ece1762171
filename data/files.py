"""Files of examples, in the layouts in which benchmarks and people keep them, and the splits that the papers draw.

.jsonl, .csv and .tsv; and JSON that nests questions in passages: MultiRC, ReCoRD, SQuAD and DROP.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tasks import Row, Task, plain

LARGEST_FILE = 2 * 2**30  # bytes; SNLI's training file has 0.5 GB
LONGEST_TEXT = 2**20  # characters of one field; a passage has some thousands


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
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} has {path.stat().st_size / 2**30:.1f} GB; at most {LARGEST_FILE >> 30} are read")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    kind = task.layout if task.layout in READERS else path.suffix
    if kind not in READERS:
        raise ValueError(f"{path}: files of examples end in .jsonl, .csv or .tsv")
    rows = []
    for number, fields in _read(kind, path, text, task):
        for name, value in fields.items():
            if isinstance(value, str) and len(value) > LONGEST_TEXT:
                raise ValueError(f"{path}:{number}: {name!r} has {len(value):,} characters; at most {LONGEST_TEXT:,}")
        fields = {task.rename.get(name, name): value for name, value in fields.items()}
        rows.append(Row(f"{path}:{number}", fields))
    if not rows:
        raise ValueError(f"{path} holds no examples")
    return rows


def _read(kind: str, path: Path, text: str, task: Task) -> Iterator[tuple[int | str, Fields]]:
    try:
        yield from READERS[kind](path, text, task)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not in the layout of {kind}'s official files: {error!r}") from None


# ---------------------------------------------------------------- one reader a layout: line number and fields of each

Fields = dict[str, Any]


def _lines(text: str) -> list[str]:
    # not splitlines, which also splits at characters that sentences may hold, such as U+2028
    return text.rstrip("\n").split("\n")


def _json_lines(path: Path, text: str, task: Task | None = None) -> Iterator[tuple[int, Fields]]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {line[:40]!r}")
        yield number, fields


def _table(path: Path, text: str, task: Task) -> Iterator[tuple[int, Fields]]:
    """.csv and .tsv, with a header unless the task names the columns."""
    tab = path.suffix == ".tsv"
    quoted = (task.quoting or ("none" if tab else "csv")) == "csv"
    rows = _quoted_rows(path, text, "\t" if tab else ",") if quoted else _plain_rows(text, "\t" if tab else ",")
    columns, in_quotes, found = list(task.columns), 0, 0
    for number, cells in rows:
        if not columns:
            columns = cells
            if len(set(columns)) < len(columns):
                raise ValueError(f"{path}:{number}: two columns have the same name: {cells}")
            continue
        if task.layout == "annotated":  # SNLI's and MNLI's rows have as many labels as annotators, the gold one last
            cells = [*cells[: len(columns) - 1], cells[-1]]
        if len(cells) != len(columns):
            expected = f"{len(columns)} columns ({', '.join(columns)})"
            raise ValueError(f"{path}:{number}: expected {expected}, got {len(cells)}")
        found += 1
        in_quotes += not quoted and all(len(c) > 1 and c[0] == c[-1] == '"' for c in cells if not c.isdigit())
        yield number, dict(zip(columns, cells, strict=True))
    if found > 1 and in_quotes == found:
        raise ValueError(f'{path}: every text is in quotes; read it with "quoting": "csv"')


def _plain_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """GLUE's way: a quote is a character like any other."""
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            yield number, line.split(delimiter)


def _quoted_rows(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Strictly, or a quote that is never closed swallows what follows it."""
    reader, rows, start = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [], 1
    limit = csv.field_size_limit(max(len(text), 1))  # the module's; LONGEST_TEXT says it better
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{start}: a quote that begins here does not end well: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _multirc(path: Path, text: str, task: Task) -> Iterator[tuple[int, Fields]]:
    for number, row in _json_lines(path, text):
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                yield number, {"paragraph": row["passage"]["text"], "question": question["question"],
                               "answer": answer["text"], "label": answer["label"],
                               "group": f"{row['idx']}, {question['idx']}"}  # fmt: skip


def _record(path: Path, text: str, task: Task) -> Iterator[tuple[int, Fields]]:
    """Each entity of the passage, in the order in which they appear, fills the query's gap once."""
    for number, row in _json_lines(path, text):
        passage = row["passage"]["text"]
        spans = sorted(row["passage"]["entities"], key=lambda span: span["start"])
        entities = list(dict.fromkeys(passage[span["start"] : span["end"] + 1] for span in spans))
        for query in row["qas"]:
            right = list(dict.fromkeys(answer["text"] for answer in query["answers"]))
            yield number, {"passage": passage, "entities": entities,
                           "choices": [" " + query["query"].replace("@placeholder", entity) for entity in entities],
                           "label": [entities.index(answer) for answer in right if answer in entities]}  # fmt: skip


def _nested(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def _squad(path: Path, text: str, task: Task) -> Iterator[tuple[str, Fields]]:
    for article in _nested(path, text)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                yield qa["id"], {"title": article["title"], "context": paragraph["context"],
                                 "question": qa["question"], "answers": list(dict.fromkeys(answers))}  # fmt: skip


def _drop(path: Path, text: str, task: Task) -> Iterator[tuple[str, Fields]]:
    """Right is the answer, and what others answered who validated it; of several spans each (Hugging Face's way)."""
    for passage in _nested(path, text).values():
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
        raise ValueError(f"{named['train']} holds {len(drawn)} examples: {num_dev} for dev leave none to train with")
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
