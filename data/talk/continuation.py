"""A text continued in a terminal: the first sample as it is made, the others behind it, what it took."""

import os
import sys
import time
from collections.abc import Callable

from data.io.experts import ExpertCache
from data.io.plot import expert_touch_figure
from data.talk.reply import whole_characters
from data.talk.screen import Screen
from data.text.chat import encode_prompt
from data.text.tokenizer import Tokenizer


def printer(tokenizer: Tokenizer, screen: Screen) -> Callable[[int, int], None]:
    """An `on_token` that prints row 0 as it is made, whole characters only, the tags of a thought too."""
    text_of = whole_characters(tokenizer)

    def show(row: int, token: int) -> None:
        if row == 0 and token not in tokenizer.stop_ids:
            screen.write(text_of(token))

    return show


def continue_text(knobs, tokenizer: Tokenizer, answer: Callable, where: str, cache: ExpertCache | None) -> None:
    """Print `num_samples` continuations of the prompt, and on stderr how fast they came.

    knobs: those of sample.py; answer(prompt, on_token, knobs) makes them, a `Generation`; where: the model and
    its device; cache: of the experts, whose `stats` may be asked for.
    """
    prompt = os.fsencode(knobs.prompt).decode(errors="replace")  # bytes that are no UTF-8
    ids, screen = encode_prompt(tokenizer, prompt, knobs.chat, knobs.thinking), Screen()
    lead = "" if knobs.chat else prompt
    screen.write(lead)
    started = time.perf_counter()
    out = answer(ids, printer(tokenizer, screen), knobs)
    seconds = time.perf_counter() - started
    screen.write("\n")
    for row in range(1, knobs.num_samples):
        screen.write(f"--- {row + 1}\n{lead}{tokenizer.decode(out.completion(row))}\n")
    made = int(out.mask.sum())
    if knobs.stats:
        print(cache.report(len(ids) + made), file=sys.stderr)
        expert_touch_figure("experts.png", cache.counts())
    shares = [] if out.depth is None else [f"{share:.0%}" for share in out.acceptance()]
    hits = f", drafts right {' '.join(shares)}" if shares else ""
    print(f"[{where}: {made} tokens, {made / seconds:.3g} tokens/s{hits}]", file=sys.stderr)
