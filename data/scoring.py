"""From examples to losses, option scores and written answers: encode, batch, and ask the model.

A causal model scores an option by the mean log-probability of its tokens after the prompt (MeZO's protocol).
Where every option is one token, one forward per example is enough, and the softmax over options cancels the
vocabulary's normaliser, so the options' logits alone are the scores.  A masked model is read at the mask.
The loss is the options' cross-entropy, or language modelling of the right answer alone (tasks.Task.loss).

Shape key: P perturbed copies, B examples, R rows that hold them, O options (the most of any example), T tokens of a
row, M answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from operator import itemgetter
from os.path import commonprefix  # of any sequences
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.metrics import Prediction, mean
from data.tasks import MASK, Example, Row, Task
from data.tokenizer import Tokenizer

MAX_NEW_TOKENS = 50  # new tokens at most, where text is written (MeZO)
MOST_READS = 4096  # in a batch of an evaluation, unless one example has more: each holds the whole vocabulary's scores


@dataclass
class Encoded:
    """One example as tokens: one sequence that all options share, or one sequence an option."""

    sequences: list[list[int]]
    answers: list[list[int]]  # the options' own tokens; with one shared sequence each is a single token
    at: int  # where the shared sequence is read; in the other case -1: the answers are at the sequences' ends
    label: int
    example: Example | None = field(default=None, compare=False)
    cut: int = field(default=0, compare=False)  # tokens that its passage lost

    def __post_init__(self):
        self.width = len(self.sequences[0] if self.at >= 0 else self.branched.tokens)  # in a forward

    @cached_property
    def branched(self) -> Branched:
        return branches_of(self)


@dataclass
class Batch:
    """Everything is on the model's device.  words is None where options have sequences of their own."""

    tokens: Tensor  # [R, T] int64, padded on the right: a row an example, or several examples a row
    mask: Tensor  # [R, T]
    labels: Tensor  # [B]
    row: Tensor  # [M] the row of a read
    at: Tensor  # [M] and at which position: the token before the answer, or the mask
    words: Tensor | None  # [O] the options' token ids
    target: Tensor  # [M] answer token of each read
    owner: Tensor  # [M] in [0, B * O): the option that a read belongs to; B * O: none, the read fills M up
    lengths: Tensor  # [B * O] tokens of each option, 0 where an example has fewer than O
    branch: Tensor | None  # [R, T, 2] of each token its text in the row and its branch there (model.Llama.hidden); None
    # where each row is one text, which is read off one token
    terms: Tensor  # [B] of how many terms an example's loss is: 1, or the tokens of its right answer


class Encoder:
    """Turns a task's examples into tokens for one model: prompts, or cloze texts for a masked model."""

    def __init__(self, tokenizer: Tokenizer, task: Task, config, max_length: int, share: bool = True):
        """share=False scores every option in a sequence of its own, which tests compare with the shared way."""
        self.tokenizer, self.task, self.config = tokenizer, task, config
        self.max_length, self.share = min(max_length, config.longest), share
        self.words: list[list[int]] = []  # of a masked model's options
        self.begin, self.end = tokenizer.begin, tokenizer.end  # its files go before config.json, which may be wrong
        if self.begin is None or config.masked and not self.begin:  # a masked model always has both
            self.begin = [] if config.bos_token_id is None else [config.bos_token_id]
        if config.masked and task.loss == "answer":
            raise ValueError(f"task {task.name}: the loss of an answer is for causal models, this one is masked")
        if config.masked:
            self.end = self.end or [config.eos_token_id]
            self.mask_id = tokenizer.id_of(MASK)

    def __call__(self, row: Row, right_alone: bool = False) -> Encoded:
        return self.all([row], right_alone)[0]

    def all(self, rows: Sequence[Row], right_alone: bool = False) -> list[Encoded]:
        """right_alone: without the other options, where the loss is the right answer's alone.

        Raises ValueError where tokenizer, model and task do not fit together, or a file's row has no such example.
        """
        examples = [self.task.example(row, self.config.masked) for row in rows]
        if right_alone and self.task.loss == "answer":
            examples = [e._replace(options=(e.options[e.label],), label=0) for e in examples]
        texts = list(dict.fromkeys(text for e in examples for text in self._texts(e)))
        ids = dict(zip(texts, self.tokenizer.encode_all(texts), strict=True))
        encoded = [self._encoded(row, example, ids) for row, example in zip(rows, examples, strict=True)]
        if self.config.masked:  # a batch is read off one list of words
            self.words = self.words or encoded[0].answers
            for row, e in zip(rows, encoded, strict=True):
                if e.answers != self.words:
                    raise ValueError(f"{row.place}: of a masked model all examples have the same options, here "
                                     f"{list(e.example.options)}")  # fmt: skip
        return encoded

    def _texts(self, example: Example) -> Iterator[str]:
        """What of an example is encoded."""
        if self.config.masked:
            yield from (part for piece in example.pieces for part in piece.split(MASK) if part)
            yield from (" " + option.strip() for option in example.options)  # as within a text
        else:
            text = "".join(example.pieces)
            yield text.rstrip(" ")
            yield from (text + option for option in example.options)

    def _encoded(self, row: Row, example: Example, ids: dict[str, list[int]]) -> Encoded:
        try:
            encoded = self._cloze(example, ids) if self.config.masked else self._prompt(example, ids)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        if len(set(map(tuple, encoded.answers))) < len(encoded.answers):
            raise ValueError(f"{row.place}: the tokenizer cannot tell the options apart: {list(example.options)}")
        tokens = [*encoded.sequences[0], *chain.from_iterable(encoded.answers)]
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"token id {token} is outside the model's vocabulary of {self.config.vocab_size}")
        return encoded

    def _kept(self, passage: int, others: int) -> int:
        """How many of the passage's tokens fit beside `others` more, which are never cut."""
        if self.max_length <= others:
            raise ValueError(f"{self.max_length} tokens leave no room for the text beside {others} others")
        return min(passage, self.max_length - others)

    def _cloze(self, example: Example, ids: dict[str, list[int]]) -> Encoded:
        """<s> text <mask> text </s>, each piece encoded by itself (LM-BFF); a passage too long loses its end."""
        pieces, at = [], example.passage
        for piece in example.pieces:
            before, mask, after = piece.partition(MASK)
            pieces.append([*ids.get(before, ()), *([self.mask_id] if mask else ()), *ids.get(after, ())])
        passage = len(pieces[at])
        kept = self._kept(passage, sum(map(len, pieces)) - passage + len(self.begin) + len(self.end))
        pieces[at] = pieces[at][:kept]
        sequence = [*self.begin, *(token for piece in pieces for token in piece), *self.end]
        words = [ids[" " + option.strip()] for option in example.options]
        for option, word in zip(example.options, words, strict=True):
            if len(word) != 1:
                raise ValueError(f"label word {option!r} must be one token at the mask, got {len(word)}: {word}")
        return Encoded([sequence], words, sequence.index(self.mask_id), example.label, example, passage - kept)

    def _prompt(self, example: Example, ids: dict[str, list[int]]) -> Encoded:
        """<s> prompt option, without <s> where the tokenizer has none.  A long prompt loses its beginning (MeZO), but
        never the begin token nor what follows the passage.  An end token that the tokenizer would add has no place
        before an option."""
        text = "".join(example.pieces)
        # an option's tokens are counted, not searched: a tokenizer may merge across the seam, so that a space at the
        # prompt's end belongs to the option (MeZO)
        prompt, full = ids[text.rstrip(" ")], [ids[text + option] for option in example.options]
        answers = [of_one[len(prompt) :] or of_one[-1:] for of_one in full]
        shared = all(of_one[:-1] == prompt and len(answer) == 1 for of_one, answer in zip(full, answers, strict=True))
        others = max(MAX_NEW_TOKENS if self.task.generates else 0, *map(len, answers)) + len(self.begin)
        cut = 0
        if len(prompt) + others > self.max_length:
            passage = len(self.tokenizer.encode("".join(example.pieces[: example.passage + 1])))
            cut = passage - self._kept(passage, len(prompt) - passage + others)
        if shared and self.share and len(answers) > 1:
            sequence = self.begin + prompt[cut:]
            return Encoded([sequence], answers, len(sequence) - 1, example.label, example, cut)
        return Encoded([self.begin + of_one[cut:] for of_one in full], answers, -1, example.label, example, cut)


class Branched(NamedTuple):
    """An example's tokens as they go through the model."""

    tokens: list[int]
    branch: list[int]  # of each token: 0 in what all options begin with, then 1, 2, ... (model.Llama.hidden)
    reads: list[tuple[int, int, int]]  # where to read, the answer's token there, its option


def branches_of(e: Encoded) -> Branched:
    """The options' common beginning once, then the rest of each; an option's last token is only predicted."""
    sequences = e.sequences
    if e.at >= 0:
        sequences = [sequences[0] + answer for answer in e.answers]
    bodies = [sequence[:-1] for sequence in sequences]
    same = len(commonprefix(bodies))
    tokens, branch, reads = bodies[0][:same], [0] * same, []
    for option, (body, answer) in enumerate(zip(bodies, e.answers, strict=True)):
        shift = len(tokens) - same  # of the option's own tokens
        places = [*range(same), *range(same + shift, len(body) + shift)]
        tokens, branch = tokens + body[same:], branch + [option + 1] * (len(body) - same)
        reads += [(at, token, option) for at, token in zip(places[-len(answer) :], answer, strict=True)]
    return Branched(tokens, branch, reads)


def collate(
    examples: list[Encoded], pad: int, device: torch.device, tokens: int = 0, multiple: int = 1, loss: str = "options",
    pack: bool = True,
) -> Batch:  # fmt: skip
    """Examples -> one batch.  If any example needs the tokens of its options, all are read so: scores then compare.

    tokens: T is at least that, where each example has a row of its own; else it is a multiple of `multiple`.  M is a
    multiple of 8 times that, unless it is 1.  pack: several short examples may share a row.
    """
    shared = all(e.at >= 0 for e in examples) and len({str(e.answers) for e in examples}) == 1 and loss == "options"
    options = max(len(e.answers) for e in examples)
    texts = [Branched(e.sequences[0], [0] * len(e.sequences[0]), [(e.at, 0, 0)]) if shared else e.branched
             for e in examples]  # fmt: skip
    T = max(tokens, *(len(text.tokens) for text in texts))
    rows = [[i] for i in range(len(texts))]
    if T > SHORT and pack:
        rows, T = rows_of([len(text.tokens) for text in texts], T, multiple)
    ids, mask, text_of, part_of, reads = [], [], [], [], []  # lists: the host is soon done, and the GPU waits for it
    for r, of_row in enumerate(rows):
        line, in_text, in_part = [], [], []
        for k, i in enumerate(of_row):
            reads += [(i, r, len(line) + place, token, option) for place, token, option in texts[i].reads]
            line = line + texts[i].tokens
            in_text, in_part = in_text + [k] * len(texts[i].tokens), in_part + texts[i].branch
        more = T - len(line)
        ids.append(line + [pad] * more)
        mask.append([1] * len(line) + [0] * more)
        text_of.append(in_text + [len(of_row) - 1] * more)
        part_of.append(in_part + [0] * more)
    reads = [(r, at, token, i * options + option) for i, r, at, token, option in sorted(reads, key=itemgetter(0))]
    if not shared:
        fill = 8 * multiple if multiple > 1 else 1  # coarsely: each M has a graph of its own
        reads += [(0, 0, 0, options * len(examples))] * (-len(reads) % fill)
    ids, mask, branch = torch.tensor(ids), torch.tensor(mask), None  # there are faster kernels for none
    if not shared or len(rows) < len(examples):
        branch = torch.stack((torch.tensor(text_of), torch.tensor(part_of)), -1)
    labels = torch.tensor([e.label for e in examples])
    lengths = torch.tensor([n for e in examples for n in [*map(len, e.answers), *[0] * (options - len(e.answers))]])
    words = torch.tensor([a[0] for a in examples[0].answers]) if shared else None
    row, at, target, owner = torch.tensor(reads).unbind(1)
    terms = torch.tensor([1 if loss == "options" else len(e.answers[e.label]) for e in examples])
    tensors = (ids, mask, labels, row, at, words, target, owner, lengths, branch, terms)
    pin = device.type == "cuda"  # from pageable memory, CUDA would first finish all that it has
    return Batch(*(t if t is None else (t.pin_memory() if pin else t).to(device, non_blocking=pin) for t in tensors))


SHORT, NARROWEST = 32, 64  # tokens up to which texts are not worth packing, and for which a row has room at least
LEAST_SAVED = 0.1  # the share of tokens that packing has to save


def rows_of(lengths: list[int], longest: int, multiple: int = 1) -> tuple[list[list[int]], int]:
    """Texts of such lengths, several to a row where that saves padding -> the texts of each row, and its tokens.

    The longest first, each into the first row that has room: of SST-2's prompts a batch of 16 is 0.46 times as many
    tokens as with a row each.  Where little is saved each has a row of its own, of `longest` tokens.
    multiple > 1: rows of few sizes, so that batches share graphs: T is rounded up by an eighth to a quarter at most.
    """
    room, rows = max(longest, NARROWEST), []
    coarse = max(multiple, 2 ** (room.bit_length() - 3)) if multiple > 1 else 1
    room = -(-room // coarse) * coarse
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row in rows if sum(lengths[j] for j in row) + lengths[i] <= room), None)
        rows.append([i]) if row is None else row.append(i)
    T = room if multiple > 1 else max(sum(lengths[i] for i in row) for row in rows)
    if len(rows) * T > (1 - LEAST_SAVED) * len(lengths) * longest:
        return [[i] for i in range(len(lengths))], longest
    return rows, T


def option_scores(lm, batch: Batch, view, loss: str = "options") -> tuple[Tensor, Tensor]:
    """-> scores [P, B, O] float32 and losses [P], a sum of batch.terms.

    Scores are comparable within an example: softmax over O is the model's choice; -inf where there is no such option.
    loss "options": the right option's cross-entropy, summed over examples.  "answer": -log p summed over the tokens of
    the right answers, so that all of a batch's tokens weigh the same (MeZO).
    """
    mask = batch.mask if lm.config.masked else None  # left to right nothing sees the padding
    hidden = lm.hidden(batch.tokens, mask, view, (batch.row, batch.at), branch=batch.branch)  # [P, M, D]
    if batch.words is not None:
        scores = lm.score(hidden, view, batch.words)
    else:
        log_p = F.log_softmax(lm.score(hidden, view), -1)
        log_p = log_p.gather(-1, batch.target.expand(len(log_p), -1)[..., None])[..., 0]  # [P, M]
        sums = log_p.new_zeros(len(log_p), len(batch.lengths) + 1).index_add_(1, batch.owner, log_p)[:, :-1]
        means = (sums / batch.lengths.clamp(min=1)).masked_fill(batch.lengths == 0, -torch.inf)
        scores = means.view(len(log_p), len(batch.labels), -1)
    if loss == "options":
        losses = [F.cross_entropy(of_copy, batch.labels, reduction="sum") for of_copy in scores]
    else:
        losses = [-(of_copy.gather(1, batch.labels[:, None])[:, 0] * batch.terms).sum() for of_copy in scores]
    return scores, torch.stack(losses)


@dataclass
class BatchLoss:
    """The loss_fn of zo_optim.zo_step: a view of P copies -> each one's mean loss over the examples of all batches."""

    lm: object  # a model.LanguageModel
    batches: list[Batch]  # one after the other, to bound memory
    loss: str = "options"
    agreed: Callable[[Tensor], Tensor] | None = None  # zo_optim.probe_losses: where processes share a step
    queries: range | None = None  # this process's
    meanwhile: Callable[[], object] = int  # also probe_losses': called while a GPU computes

    @classmethod
    def of(
        cls, lm, examples: list[Encoded], pad: int, micro_batch_size: int, multiple: int = 1, loss: str = "options"
    ) -> BatchLoss:
        """micro_batch_size examples a batch.  multiple > 1: rows have one length, a multiple of that many tokens."""
        T = -(-max(e.width for e in examples) // multiple) * multiple if multiple > 1 else 0
        parts = [examples[i : i + micro_batch_size] for i in range(0, len(examples), micro_batch_size)]
        return cls(lm, [collate(part, pad, lm.device, T, multiple, loss) for part in parts], loss)

    def __call__(self, view) -> Tensor:
        """-> [P] float32: means over all batches."""
        n = sum(batch.terms.sum() for batch in self.batches)
        return sum(option_scores(self.lm, batch, view, self.loss)[1] / n for batch in self.batches)

    def parts(self, view) -> Iterator[Tensor]:
        """[P] for each batch, which add up to the loss: a backward pass frees one batch's activations at a time."""
        n = sum(batch.terms.sum() for batch in self.batches)
        for batch in self.batches:
            yield BatchLoss(self.lm, [batch], self.loss)(view) * (batch.terms.sum() / n)

    def tensors(self) -> list[Tensor | None]:
        return [tensor for batch in self.batches for tensor in vars(batch).values()]

    def with_tensors(self, tensors: list[Tensor | None]) -> BatchLoss:
        """This loss with other tensors() of the same shapes."""
        n = len(tensors) // len(self.batches)
        batches = [Batch(*tensors[i : i + n]) for i in range(0, len(tensors), n)]
        return BatchLoss(self.lm, batches, self.loss)


@dataclass
class MeanLoss:
    """The loss_fn of several tasks, as BatchLoss: the mean of theirs.  Of MetricLoss it can only be called."""

    losses: list[BatchLoss | MetricLoss]

    def __call__(self, view) -> Tensor:
        return sum(loss(view) for loss in self.losses) / len(self.losses)

    def parts(self, view) -> Iterator[Tensor]:
        yield from (part / len(self.losses) for loss in self.losses for part in loss.parts(view))

    def tensors(self) -> list[Tensor | None]:
        return [tensor for loss in self.losses for tensor in loss.tensors()]

    def with_tensors(self, tensors: list[Tensor | None]) -> MeanLoss:
        left = iter(tensors)
        return MeanLoss([loss.with_tensors(list(islice(left, len(loss.tensors())))) for loss in self.losses])


# ---------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    loss: float
    predictions: list[Prediction]  # in the examples' order


def evaluate(lm, encoded: list[Encoded], pad: int, batch_size: int, loss: str = "options") -> Evaluation:
    """The mean loss on a split, and what the model chooses."""
    return evaluate_copies(lm, encoded, pad, batch_size, loss, lm.stored_view())[0]


def _batches(encoded: list[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Places of examples of like lengths, which need less padding: batch_size of them, or fewer with many options."""
    at, reads = [], 0
    for i in sorted(range(len(encoded)), key=lambda i: len(encoded[i].sequences[0])):
        of_one = 1 if encoded[i].at >= 0 else sum(map(len, encoded[i].answers))
        if at and (len(at) == batch_size or reads + of_one > MOST_READS):
            yield at
            at, reads = [], 0
        at.append(i)
        reads += of_one
    yield at


@torch.no_grad()
def evaluate_copies(lm, encoded: list[Encoded], pad: int, batch_size: int, loss: str, view) -> list[Evaluation]:
    """The same by each copy of a view."""
    chosen, sums, n = [{} for _ in range(view.probes)], 0.0, 0
    for at in _batches(encoded, batch_size):
        batch = collate([encoded[i] for i in at], pad, lm.device, loss=loss)
        scores, losses = option_scores(lm, batch, view, loss)
        sums, n = sums + losses.double().cpu(), n + int(batch.terms.sum())
        for copy, of_copy in zip(chosen, scores, strict=True):
            for i, option, of_one in zip(at, of_copy.argmax(-1).tolist(), of_copy.tolist(), strict=True):
                example = encoded[i].example
                names = example.names or example.options
                of_one = tuple(of_one[: len(names)])
                copy[i] = Prediction(names[option].strip(), option, example.golds, example.group, of_one, names)
    answers = [[copy[i] for i in range(len(encoded))] for copy in chosen]
    return [Evaluation(of_copy / n, found) for of_copy, found in zip(sums.tolist(), answers, strict=True)]


@torch.no_grad()
def write(
    lm, encoded: list[Encoded], tokenizer: Tokenizer, pad: int, batch_size: int, view=None, cache_bytes: int = 0
) -> list[Prediction]:
    """What the model writes after each prompt, greedily, up to a new line; in the examples' order.  Of a view of one
    copy, or of the weights as they are stored.  cache_bytes: of keys and values, for which a batch has room at least.
    """
    prompts = [e.sequences[0][: -len(e.answers[0])] for e in encoded]
    longest = max(map(len, prompts)) + MAX_NEW_TOKENS
    batch_size = max(batch_size, cache_bytes // (longest * lm.cache_bytes))  # each token waits for all launches
    in_order, line_ends = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), tokenizer.line_ends
    written, eos = {}, lm.config.eos_token_id
    ends = {*line_ends, *([eos] if isinstance(eos, int) else eos or [])}
    for start in range(0, len(in_order), batch_size):
        at = in_order[start : start + batch_size]
        T = max(len(prompts[i]) for i in at)
        ids = torch.tensor([[pad] * (T - len(prompts[i])) + prompts[i] for i in at], device=lm.device)
        mask = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in at], device=lm.device)
        for i, new in zip(at, lm.generate(ids, MAX_NEW_TOKENS, mask, line_ends, view)[:, T:].tolist(), strict=True):
            length = next((n for n, token in enumerate(new, start=1) if token in ends), len(new))  # then comes padding
            new = [token for token in new[:length] if token not in ends or token in line_ends]  # one may end a word too
            text = tokenizer.decode(new).partition("\n")[0].strip()
            written[i] = Prediction(text, 0, encoded[i].example.golds, encoded[i].example.group, (), ())
    return [written[i] for i in range(len(encoded))]


@dataclass
class MetricLoss:
    """The loss_fn for what has no gradient (MeZO, section 3.3): 1 less the mean metric of each copy's answers."""

    lm: object
    examples: list[Encoded]
    task: Task
    tokenizer: Tokenizer
    pad: int
    batch_size: int
    metric: Callable[[Prediction], float]
    agreed: Callable[[Tensor], Tensor] | None = None  # as of BatchLoss
    queries: range | None = None

    def __call__(self, view) -> Tensor:
        """-> [P] float32; P = 1 where text is written."""
        if self.task.generates:
            answers = [write(self.lm, self.examples, self.tokenizer, self.pad, self.batch_size, view)]
        else:
            found = evaluate_copies(self.lm, self.examples, self.pad, self.batch_size, self.task.loss, view)
            answers = [of_copy.predictions for of_copy in found]
        return torch.tensor([1 - mean(self.metric, of_copy) for of_copy in answers])
