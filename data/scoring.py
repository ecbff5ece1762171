"""From examples to option scores: encode, batch, and read the model's opinion of every option.

A causal model scores an option by the mean log-probability of its tokens after the prompt (MeZO's protocol).
Where every option is one token, one forward per example is enough, and the softmax over options cancels the
vocabulary's normaliser, so the options' logits alone are the scores.  A masked model is read at the mask.

Shape key: P perturbed copies, B examples, O options, T tokens, M answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix  # of any sequences
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tasks import Example, Task
from data.tokenizer import Tokenizer

MASK = "<mask>"


@dataclass
class Encoded:
    """One example as tokens: one sequence that all options share, or one sequence an option."""

    sequences: list[list[int]]
    answers: list[list[int]]  # the options' own tokens; with one shared sequence each is a single token
    at: int  # where the shared sequence is read; in the other case the answers are at the sequences' ends
    label: int

    def __post_init__(self):
        self.branched = branches_of(self)
        self.width = len(self.sequences[0] if len(self.sequences) == 1 else self.branched.tokens)  # in a forward


@dataclass
class Batch:
    """Everything is on the model's device.  words is None where options have sequences of their own."""

    tokens: Tensor  # [B, T] int64, padded on the right
    mask: Tensor  # [B, T]
    labels: Tensor  # [B]
    row: Tensor  # [M] which example a read is in
    at: Tensor  # [M] and at which position: the token before the answer, or the mask
    words: Tensor | None  # [O] the options' token ids
    target: Tensor  # [M] answer token of each read
    owner: Tensor  # [M] in [0, B * O): the option that a read belongs to
    lengths: Tensor  # [B * O] tokens of each option
    branch: Tensor | None  # [B, T]; None where all options are read off one token


class Encoder:
    """Turns a task's examples into tokens for one model: prompts, or cloze texts for a masked model."""

    def __init__(self, tokenizer: Tokenizer, task: Task, config, max_length: int, share: bool = True):
        """share=False scores every option in a sequence of its own, which tests compare with the shared way."""
        self.tokenizer, self.task, self.config = tokenizer, task, config
        self.max_length, self.share = min(max_length, config.longest), share
        self.begin, self.end = tokenizer.begin, tokenizer.end  # its files go before config.json, which may be wrong
        if self.begin is None or config.masked and not self.begin:  # a masked model always has both
            self.begin = [] if config.bos_token_id is None else [config.bos_token_id]
        if config.masked:
            self.end = self.end or [config.eos_token_id]
            self.mask_id = tokenizer.id_of(MASK)
            self.label_words = [self._one_token(option) for option in task.options]

    def _one_token(self, word: str) -> int:
        ids = self.tokenizer.encode(word)
        if len(ids) != 1:
            raise ValueError(f"label word {word!r} must be one token at the mask, got {len(ids)}: {ids}")
        return ids[0]

    def __call__(self, example: Example) -> Encoded:
        """Raises ValueError where tokenizer, model and task do not fit together."""
        encoded = self._cloze(example) if self.config.masked else self._prompt(example)
        if len(set(map(tuple, encoded.answers))) < len(encoded.answers):
            raise ValueError(f"the tokenizer cannot tell the options apart: {list(self.task.options)}")
        for token in {*encoded.sequences[0], *(token for answer in encoded.answers for token in answer)}:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"token id {token} is outside the model's vocabulary of {self.config.vocab_size}")
        return encoded

    def _room(self, others: int) -> int:
        """The number of the text's tokens that fit beside `others` more."""
        if self.max_length <= others:
            raise ValueError(f"{self.max_length} tokens leave no room for the text beside {others} others")
        return self.max_length - others

    def _cloze(self, example: Example) -> Encoded:
        """<s> sentence joint <mask> . </s>, or <s> <mask> : sentence </s>; a sentence too long loses its end."""
        sentence, joint, after = (self.tokenizer.encode(text) if text else [] for text in self.task.cloze(example))
        special = len(self.begin) + 1 + len(self.end)
        if self.task.mask_first:
            after = after[: self._room(special)]
        else:
            sentence = sentence[: self._room(len(joint) + len(after) + special)]
        before = [*self.begin, *sentence, *joint]
        sequence = [*before, self.mask_id, *after, *self.end]
        return Encoded([sequence], [[word] for word in self.label_words], len(before), example.label)

    def _prompt(self, example: Example) -> Encoded:
        """<s> prompt option, without <s> where the tokenizer has none.  A long prompt loses its beginning (MeZO), but
        never the begin token.  An end token that the tokenizer would add has no place before an option."""
        prompt = self.tokenizer.encode(self.task.prompt(example))
        full = [self.tokenizer.encode(self.task.prompt(example) + option) for option in self.task.options]
        # an option's tokens are counted, not searched: a tokenizer may merge across the seam
        answers = [ids[len(prompt) :] or ids[-1:] for ids in full]
        shared = all(ids[:-1] == prompt and len(answer) == 1 for ids, answer in zip(full, answers, strict=True))
        begin, room = self.begin, self._room(len(self.begin) + max(map(len, answers)))
        if shared and self.share:
            sequence = begin + prompt[-room:]
            return Encoded([sequence], answers, len(sequence) - 1, example.label)
        sequences = [begin + ids[-(room + len(answer)) :] for ids, answer in zip(full, answers, strict=True)]
        return Encoded(sequences, answers, -1, example.label)


class Branched(NamedTuple):
    """An example's tokens as they go through the model."""

    tokens: list[int]
    branch: list[int]  # of each token: 0 in what all options begin with, then 1, 2, ... (model.Llama.hidden)
    reads: list[tuple[int, int, int]]  # where to read, the answer's token there, its option


def branches_of(e: Encoded) -> Branched:
    """The options' common beginning once, then the rest of each; an option's last token is only predicted."""
    sequences = e.sequences
    if len(sequences) == 1 and len(e.answers) > 1:
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


def collate(examples: list[Encoded], pad: int, device: torch.device, tokens: int = 0) -> Batch:
    """Examples -> one batch.  If any example needs the tokens of its options, all are read so: scores then compare.

    tokens: T is at least that.
    """
    shared = all(len(e.sequences) == 1 for e in examples) and len({str(e.answers) for e in examples}) == 1
    if shared:
        rows, branches = [e.sequences[0] for e in examples], None
        reads = [(i, e.at, 0, 0) for i, e in enumerate(examples)]
    else:
        branched, options = [e.branched for e in examples], len(examples[0].answers)
        rows, branches = [b.tokens for b in branched], [b.branch for b in branched]
        reads = [(i, at, token, i * options + option) for i, b in enumerate(branched) for at, token, option in b.reads]
    T = max(tokens, *map(len, rows))
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    branch = None if shared else torch.tensor([b + [0] * (T - len(b)) for b in branches])
    labels = torch.tensor([e.label for e in examples])
    lengths = torch.tensor([len(a) for e in examples for a in e.answers])
    words = torch.tensor([a[0] for a in examples[0].answers]) if shared else None
    row, at, target, owner = torch.tensor(reads).unbind(1)
    tensors = (ids, mask, labels, row, at, words, target, owner, lengths, branch)
    pin = device.type == "cuda"  # from pageable memory, CUDA would first finish all that it has
    return Batch(*(t if t is None else (t.pin_memory() if pin else t).to(device, non_blocking=pin) for t in tensors))


def option_scores(lm, batch: Batch, view) -> Tensor:
    """[P, B, O] float32, comparable within an example: softmax over O is the model's choice."""
    branches = {} if batch.branch is None else {"branch": batch.branch}  # a masked model has none
    mask = batch.mask if lm.config.masked else None  # left to right nothing sees the padding
    hidden = lm.hidden(batch.tokens, mask, view, wanted=(batch.row, batch.at), **branches)  # [P, M, D]
    if batch.words is not None:
        return lm.score(hidden, view, batch.words)
    log_p = F.log_softmax(lm.score(hidden, view), -1)
    log_p = log_p.gather(-1, batch.target.expand(len(log_p), -1)[..., None])[..., 0]  # [P, M]
    sums = log_p.new_zeros(len(log_p), len(batch.lengths)).index_add_(1, batch.owner, log_p)
    return (sums / batch.lengths).view(len(log_p), len(batch.labels), -1)


@dataclass
class BatchLoss:
    """The loss_fn of zo_optim.zo_step: a view of P copies -> each one's mean loss over the examples of all batches."""

    lm: object  # a model.LanguageModel
    batches: list[Batch]  # one after the other, to bound memory

    @classmethod
    def of(cls, lm, examples: list[Encoded], pad: int, micro_batch_size: int, multiple: int = 1) -> BatchLoss:
        """micro_batch_size examples a batch.  multiple > 1: all have one length, a multiple of that many tokens."""
        T = -(-max(e.width for e in examples) // multiple) * multiple if multiple > 1 else 0
        starts = range(0, len(examples), micro_batch_size)
        return cls(lm, [collate(examples[i : i + micro_batch_size], pad, lm.device, T) for i in starts])

    def __call__(self, view) -> Tensor:
        """-> [P] float32: means of the right option's cross-entropy."""
        n, total = sum(len(batch.labels) for batch in self.batches), 0.0
        for batch in self.batches:
            scores = option_scores(self.lm, batch, view)
            losses = torch.stack([F.cross_entropy(of_copy, batch.labels) for of_copy in scores])
            total = total + losses * (len(batch.labels) / n)
        return total

    def parts(self, view) -> Iterator[Tensor]:
        """[P] for each batch, which add up to the loss: a backward pass frees one batch's activations at a time."""
        n = sum(len(batch.labels) for batch in self.batches)
        for batch in self.batches:
            yield BatchLoss(self.lm, [batch])(view) * (len(batch.labels) / n)

    def tensors(self) -> list[Tensor | None]:
        return [tensor for batch in self.batches for tensor in vars(batch).values()]

    def with_tensors(self, tensors: list[Tensor | None]) -> BatchLoss:
        """This loss with other tensors() of the same shapes."""
        n = len(tensors) // len(self.batches)
        return BatchLoss(self.lm, [Batch(*tensors[i : i + n]) for i in range(0, len(tensors), n)])


class Quality(NamedTuple):
    accuracy: float  # share of examples whose right option scores highest
    loss: float  # mean cross-entropy of the right option


@torch.no_grad()
def score_batches(lm, encoded: list[Encoded], pad: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores [B, O] and labels [B] of a split in batches, with the weights as they are stored.  In order of length."""
    in_order, view = sorted(encoded, key=lambda e: len(e.sequences[0])), lm.stored_view()  # less padding
    for start in range(0, len(in_order), batch_size):
        batch = collate(in_order[start : start + batch_size], pad, lm.device)
        yield option_scores(lm, batch, view)[0], batch.labels


def evaluate(lm, encoded: list[Encoded], pad: int, batch_size: int) -> Quality:
    """Quality on a split, with the weights as they are stored."""
    right, loss = 0, 0.0
    for scores, labels in score_batches(lm, encoded, pad, batch_size):
        right += int((scores.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
    return Quality(right / len(encoded), loss / len(encoded))
