"""An answer while it is made: ids become a thought and what is said; a thought can be closed early."""

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.io.cli import UserError
from data.tasks.task import TAGS
from data.text.chat import END_THINK, THINK
from data.text.tokenizer import Tokenizer


class Budget(NamedTuple):
    """How a thought is cut: it ends after so many tokens, and the answer is asked for at once."""

    tokens: int
    think: int  # the id that begins a thought
    closing: list[int]  # the id that ends it, and what stands before an answer


def budget_of(tokenizer: Tokenizer, tokens: int | None) -> Budget | None:
    """The budget of so many tokens in a model's own tags; None is none. Raises UserError where it has no tags."""
    if tokens is None:
        return None
    if not {THINK, END_THINK} <= tokenizer.specials.keys():
        raise UserError(f"budget: got {tokens}, but tokenizer {tokenizer.name} has no {THINK}: no thought to close")
    before = TAGS[2] if TAGS[2] in tokenizer.specials else "\n\n"  # <answer>, or R1's empty line
    return Budget(tokens, tokenizer.specials[THINK], tokenizer.encode_trusted(END_THINK + before))


def think_within(generate: Callable, model, prompts: Sequence[Sequence[int]], *, budget: Budget,
                 num_samples: int = 1, max_new_tokens: int = 256, stop_ids: Sequence[int] = (),
                 seed: int | Sequence[int] | None = None, on_token: Callable[[int, int], None] | None = None,
                 **sampling) -> list[list[int]]:
    """Completions whose thought is closed after `budget.tokens`, so that the answer comes at once.

    generate is sample.py's, and takes all but the budget; `max_new_tokens` includes it. Returns the ids of
    each row, without the stop token. A row that ended by itself is as it would have been.
    """
    asked = [list(prompt) for prompt in prompts for _ in range(num_samples)]  # (N,)
    options = dict(stop_ids=stop_ids, **sampling)
    first = generate(model, prompts, num_samples=num_samples, seed=seed, on_token=on_token,
                     max_new_tokens=min(budget.tokens + 1, max_new_tokens), **options)  # the tag is one
    texts = [prompt + first.completion(row) for row, prompt in enumerate(asked)]
    left = [row for row in range(len(texts)) if not first.finished[row]]
    for row in left:
        tags = [token for token in texts[row] if token in (budget.think, budget.closing[0])]
        if tags[-1:] == [budget.think]:
            texts[row] += budget.closing
            for token in budget.closing if on_token else ():
                on_token(row, token)
    left = [row for row in left if len(texts[row]) < model.config.max_position_embeddings]
    rest = max_new_tokens - budget.tokens
    if left and rest > 0:
        tell = on_token and (lambda i, token: on_token(left[i], token))
        again = sum(seed) if isinstance(seed, Sequence) else seed
        more = generate(model, [texts[row][:] for row in left], seed=None if again is None else again + 1,
                        on_token=tell, max_new_tokens=rest, **options)
        for i, row in enumerate(left):
            texts[row] += more.completion(i)
    return [ids[len(prompt) :] for prompt, ids in zip(asked, texts)]


def whole_characters(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A function of each id in turn: what it adds to the text. Half a character waits for its other half."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda token: decoder.decode(tokenizer.decode_bytes([token]))


class Reply:
    """What one row has said so far: `thought` and `said`, texts of whole characters.

    The tags of thought and answer belong to neither. prompt: the ids in front, which may have begun
    the thought. `thought_tokens` counts its tags too, as usage does; `has_ended`: by a stop token.

    >>> from data.text.tokenizer import load_tokenizer
    >>> tokenizer = load_tokenizer("plainseek")
    >>> reply = Reply(tokenizer, [])
    >>> for token in tokenizer.encode_trusted("<think>1+1=2</think><answer>2</answer>"):
    ...     _ = reply.add(token)
    >>> reply.thought, reply.said
    ('1+1=2', '2')
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer, self.thought, self.said = tokenizer, "", ""
        self.tokens = self.thought_tokens = 0
        self.tags = {tokenizer.specials[tag]: tag for tag in TAGS if tag in tokenizer.specials}
        last = next((self.tags[i] for i in reversed(prompt) if self.tags.get(i) in (THINK, END_THINK)), None)
        self.is_thinking, self.has_ended = last == THINK, False
        self.decoders = [whole_characters(tokenizer) for _ in range(2)]

    def add(self, token: int) -> tuple[str, str]:
        """What a token adds to the thought and to what is said; the one or the other is empty."""
        self.tokens += 1
        self.has_ended = token in self.tokenizer.stop_ids
        tag = self.tags.get(token)
        if tag in (THINK, END_THINK):
            self.thought_tokens += 1
            self.is_thinking = tag == THINK
        if tag is not None or self.has_ended:
            return "", ""
        text = self.decoders[self.is_thinking](token)
        if self.is_thinking:
            self.thought_tokens += 1
            text = text if self.thought else text.lstrip()  # R1 begins with an empty line
            self.thought += text
            return text, ""
        text = text if self.said else text.lstrip()
        self.said += text
        return "", text
