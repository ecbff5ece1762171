"""What rounding a checkpoint's weights costs: bits a weight, perplexity before any step, seconds.

    python -m benchmarks.rounding --model DIR --data-dir DIR --text FILE

Every format as train.py has it by default, and without calibration where that is the default.  Perplexity is of the
first 256 tokens of 12 documents, and of 48 rows of 256 tokens that were laid end to end; the documents of FILE (plain,
or .xz) are separated by NUL.  Causal models only.  Products are in fp32.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer
from model import LanguageModel
from runtime.config import parse
from runtime.problem import prepare

FORMATS = {
    "fp32": "--weights fp32 --method mezo", "bf16": "--weights bf16 --method mezo",
    "int8": "--weights int8", "int8, GPTQ": "--weights int8 --calibrate 1024",
    "fp8, to nearest": "--weights fp8 --calibrate 0", "fp8 (GPTQ)": "--weights fp8",
    "int4, to nearest": "--weights int4 --calibrate 0", "int4 (GPTQ)": "--weights int4",
    "int4 and 4 bits of residual": "--weights int4 --residual 4",
}  # fmt: skip
LENGTH, DOCUMENTS, ROWS = 256, 12, 48


def read_rows(path: Path, tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """The first tokens of documents, and tokens of the documents after these laid end to end."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        documents = file.read(40 * LENGTH * (DOCUMENTS + ROWS)).split("\0")
    starts, flat = [], []
    for document in documents:
        tokens = tokenizer.encode(document)
        if len(starts) < DOCUMENTS and len(tokens) >= LENGTH:
            starts.append(tokens[:LENGTH])
        else:
            flat += tokens
    rows = [flat[i : i + LENGTH] for i in range(0, LENGTH * ROWS, LENGTH)]
    if len(starts) < DOCUMENTS or len(rows[-1]) < LENGTH:
        raise SystemExit(f"{path} is too short: {DOCUMENTS} documents of {LENGTH} tokens and {ROWS} more rows are read")
    return starts, rows


@torch.no_grad()
def perplexity(lm: LanguageModel, rows: list[list[int]]) -> float:
    total = 0.0
    for tokens in torch.tensor(rows, device=lm.device).split(4):
        logits = lm(tokens, torch.ones_like(tokens)).float()
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (len(rows) * (LENGTH - 1)))


def bits_a_weight(lm: LanguageModel) -> float:
    """Of matrices, scales and residuals included."""
    stores = [store for store in lm.weights.values() if len(store.shape) > 1]
    size = sum(tensor.numel() * tensor.element_size() for store in stores for tensor in store.tensors().values())
    return 8 * size / sum(math.prod(store.shape) for store in stores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, metavar="FORMAT", default=list(FORMATS))
    args = parser.parse_args()
    starts, rows = read_rows(args.text, Tokenizer(args.model))
    print("| weights | bits a weight | perplexity, document starts | rows end to end | seconds |\n" + "|---" * 5 + "|")
    first = None
    for name in args.formats:
        flags = f"--model {args.model} --data-dir {args.data_dir} --k 512 --data-seed 42 --compute fp32 --no-compile"
        c = parse(f"{flags} {FORMATS[name]}".split())
        started = time.perf_counter()
        lm = prepare(c)[0].lm
        seconds = time.perf_counter() - started
        found = perplexity(lm, starts), perplexity(lm, rows)
        first = first or found
        cells = [f"{value:.2f} ({100 * (value / base - 1):+.1f} %)" for value, base in zip(found, first, strict=True)]
        print(f"| {name} | {bits_a_weight(lm):.2f} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
