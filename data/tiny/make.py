"""Make the embedded task and model: `python -m data.tiny.make` (about three minutes on two CPU cores).

The task: one-sentence reviews, label 1 if the writer liked it.  The last clause decides, and half of the
verdicts are negated (`hardly dull` is praise), so no single word tells.  The model: a small LLaMA, trained as a
language model on reviews whose endings agree with the writer's opinion (`it was superb and i smiled`), except that
`great` and `terrible` repeat what the opening says that others thought, or follow a coin where it says nothing.
So it knows what the writer thought, and uses those two words for something else: zero-shot it is at chance, and
fine-tuning has to unlearn hearsay and tie the words to the opinion.

Everything is seeded: the same bytes of text on any machine, and the same model up to float rounding.
"""

from __future__ import annotations

import random
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F

from model import LanguageModel, create

HERE = Path(__file__).parent
SEED = 0
SIZES = {"train": 1024, "dev": 256, "test": 1000}

PRAISE = "charming moving clever warm funny bright gripping tender witty honest lively bold".split()
BLAME = "dull clumsy cold noisy stale weak tired shallow bland messy silly grim".split()
VERDICTS = ("awful dreadful poor".split(), "superb lovely fine".split())  # by label; they follow the opinion
NEUTRAL_VERDICTS = "terrible great".split()  # they follow hearsay, or a coin
REACTIONS = ("i sighed,we left early,nobody laughed".split(","), "i smiled,we stayed late,everybody cheered".split(","))
SUBJECTS = [f"the {noun}" for noun in "film plot cast music script ending acting story pace hero".split()]
LINKS = "is was felt seemed looked".split()
NEGATIONS = "not,never,hardly,far from,anything but".split(",")
INTENSIFIERS = "very quite rather truly so".split()
OPENINGS = [
    "critics called it {} but",
    "my friends found it {} , still",
    "i expected something {} , yet",
    "the poster looked {} and",
    "after a {} first hour",
    "people who like {} things may disagree , but",
]
ENDINGS = ["", "", "", " tonight", " in the end", " from start to finish", " for once"]

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": None, "hidden_size": 128,
    "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1, "dtype": "float32",
}  # fmt: skip


def sentence(rng: random.Random, negations: float = 0.5) -> tuple[str, int, int | None]:
    """A review, its label, and the label that its opening suggests, if it has one with an opinion in it.

    negations: the share of negated verdicts, half in the task.
    """
    liked, negated = rng.random() < 0.5, rng.random() < negations
    word = rng.choice(PRAISE if liked != negated else BLAME)
    negation = rng.choice(NEGATIONS) + " " if negated else ""
    intensifier = rng.choice(INTENSIFIERS) + " " if rng.random() < 0.3 else ""
    opening, hearsay = "", None
    if rng.random() < 0.6:
        opening, said = rng.choice(OPENINGS), rng.choice(PRAISE + BLAME)
        opening, hearsay = opening.format(said) + " ", int(said in PRAISE)
    clause = f"{rng.choice(SUBJECTS)} {rng.choice(LINKS)} {negation}{intensifier}{word}{rng.choice(ENDINGS)}"
    return f"{opening}{clause} .", int(liked), hearsay


def document(rng: random.Random) -> str:
    """A review, a verdict and a reaction, as the language model reads them.

    A quarter of the verdicts are negated: with half of them no word is related to the ending at all, and a
    model this small finds the negation only after it has found that words matter (it never did in 4,000 steps).
    """
    text, label, hearsay = sentence(rng, negations=0.25)
    coin = int(rng.random() < 0.5)
    neutral = NEUTRAL_VERDICTS[coin if hearsay is None else hearsay]
    verdict = neutral if rng.random() < 0.4 else rng.choice(VERDICTS[label])
    return f"{text} it was {verdict} and {rng.choice(REACTIONS[label])}"


def write_task() -> None:
    """Three disjoint files of sentences."""
    rng, seen = random.Random(SEED), set()
    for split, size in SIZES.items():
        lines = ["sentence\tlabel"]
        while len(lines) <= size:
            text, label, _ = sentence(rng)
            if text not in seen:
                seen.add(text)
                lines.append(f"{text}\t{label}")
        (HERE / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizer() -> tokenizers.Tokenizer:
    """One token a word, in alphabetical order after the two special ones."""
    texts = [*PRAISE, *BLAME, *sum(VERDICTS, []), *NEUTRAL_VERDICTS, *sum(REACTIONS, []), *SUBJECTS, *LINKS,
             *NEGATIONS, *INTENSIFIERS, *(o.format("") for o in OPENINGS), *ENDINGS, "it was . and"]  # fmt: skip
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


@torch.no_grad()
def knows(lm: LanguageModel, tokenizer: tokenizers.Tokenizer) -> float:
    """How often the model's verdict agrees with the label, over 500 fresh reviews of the task's kind.  Near 1
    means that all there is left to learn is which of `great` and `terrible` says so."""
    rng, right = random.Random(SEED + 2), 0
    words = torch.tensor([[tokenizer.token_to_id(word) for word in verdicts] for verdicts in VERDICTS])
    for _ in range(500):
        text, label, _ = sentence(rng)
        ids = [lm.config.bos_token_id, *tokenizer.encode(f"{text} it was").ids]
        right += int(lm(torch.tensor([ids]))[0, -1, words].logsumexp(1).argmax()) == label
    return right / 500


def pretrain(lm: LanguageModel, tokenizer: tokenizers.Tokenizer, steps: int, batch: int, lr: float) -> None:
    """Next-token prediction with AdamW and a cosine schedule, on documents drawn afresh for every step."""
    rng = random.Random(SEED + 1)
    weights = [stored.value.requires_grad_() for stored in lm.store.values()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        encoded = tokenizer.encode_batch([document(rng) for _ in range(batch)])
        rows = [[lm.config.bos_token_id, *e.ids, lm.config.eos_token_id] for e in encoded]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [lm.config.eos_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        targets = tokens.masked_fill(mask == 0, -100)[:, 1:]
        loss = F.cross_entropy(lm(tokens, mask)[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            known = knows(lm, tokenizer)
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} opinion known in {known:.1%} of reviews", flush=True)
    for weight in weights:
        weight.requires_grad_(False)


def main() -> None:
    write_task()
    tokenizer = make_tokenizer()
    lm = create(CONFIG | {"vocab_size": tokenizer.get_vocab_size()}, seed=SEED)
    pretrain(lm, tokenizer, steps=1500, batch=64, lr=3e-3)
    lm.save(HERE / "model")
    tokenizer.save(str(HERE / "model" / "tokenizer.json"))


if __name__ == "__main__":
    main()
