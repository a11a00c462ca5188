"""A conversation in a terminal: the thought before one's eyes, then folded; votes, budgets, commands."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from data.io.checkpoint import write_json
from data.io.cli import UserError, nearest
from data.talk.reply import Reply
from data.talk.screen import BRIGHT, DIM, Screen
from data.tasks.exam import tally
from data.tasks.task import TAGS
from data.text.chat import chat_ids
from data.text.tokenizer import Tokenizer

COMMANDS = {
    "/help": "this list; a line that ends in \\ goes on in the next one",
    "/reset": "forget the conversation",
    "/temp X": "how freely is drawn; 0 is greedy",
    "/seed N": "where chance begins",
    "/votes K": "K answers at once, and the most frequent of them",
    "/budget N": "think for at most N tokens; none: as long as it likes",
    "/history on": "a question sees those before it; off: each stands alone",
    "/think": "show the last thought",
    "/save FILE": "the conversation as JSON [chat.json]",
    "/quit": "leave, as Ctrl-D; Ctrl-C ends an answer",
}
KNOBS = {"/temp": ("temperature", float), "/seed": ("seed", int), "/votes": ("votes", int),
         "/budget": ("budget", int), "/history": ("history", {"on": True, "off": False}.__getitem__)}
BAR = 24  # characters of the longest bar
FORGET = "this turn is forgotten"


class Console:
    """One person and one model.

    knobs: a dataclass with temperature, seed, votes, budget and thinking, which checks itself;
    answer(prompt, on_token, knobs) makes `votes` completions and calls `on_token(row, id)`
    for each token.
    """

    def __init__(self, knobs, tokenizer: Tokenizer, answer: Callable):
        self.knobs, self.tokenizer, self.answer, self.screen = knobs, tokenizer, answer, Screen()
        if knobs.history is None:  # what rl.py teaches has one question
            self.knobs = dataclasses.replace(knobs, history=TAGS[2] not in tokenizer.specials)
        self.messages: list[dict] = []
        self.thought = ""  # the last one

    def run(self, title: str) -> None:
        """Talk until /quit or the end of the input."""
        chat_ids(self.tokenizer, [{"role": "user", "content": "?"}], self.knobs.thinking)  # or it says why not
        alone = "" if self.knobs.history else "; each question stands alone, as this model learned it (/history on)"
        self.screen.line(title + alone, DIM)
        for text in self.lines():
            try:
                if text == "/quit":
                    return
                if text.startswith("/"):
                    self.obey(*text.split(maxsplit=1))
                elif text.strip():
                    self.turn(text.strip())
            except UserError as error:
                self.screen.line(f"error: {error}")

    def lines(self) -> Iterator[str]:
        """What is typed, until it ends; lines that end in a backslash go on."""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty():
            with suppress(ImportError):  # Windows has none: then there is no history
                import readline  # noqa: F401, input() edits lines and remembers them
        prompt, parts = ">>> ", []
        while True:
            try:
                line = input(prompt if sys.stdin.isatty() else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                self.screen.line("\n/quit or Ctrl-D leaves", DIM)
                prompt, parts = ">>> ", []
                continue
            parts.append(line.removesuffix("\\"))
            prompt = "... "
            if not line.endswith("\\"):
                yield "\n".join(parts)
                prompt, parts = ">>> ", []

    def obey(self, command: str, value: str = "") -> None:
        """Do what a command says. Raises UserError for one that is not known or does not fit."""
        if command in KNOBS:
            self.set(*KNOBS[command], value)
        elif command == "/help":
            for name, what in COMMANDS.items():
                self.screen.line(f"{name:12}{what}")
        elif command == "/reset":
            self.messages, self.thought = [], ""
            self.screen.line("a new conversation", DIM)
        elif command == "/think":
            self.screen.line(self.thought or "there was no thought", DIM)
        elif command == "/save":
            write_json(value or "chat.json", {"messages": self.messages})
            self.screen.line(f"{len(self.messages)} messages in {value or 'chat.json'}", DIM)
        else:
            known = [name.split()[0] for name in COMMANDS]
            raise UserError(f"{command} is no command{nearest(command, known)}; /help lists all, and a "
                            "text that begins with / wants a space in front")

    def set(self, name: str, kind: type, value: str) -> None:
        """Change a knob, or say what it is. Raises UserError for a value that does not fit."""
        if value:
            try:
                number = None if name == "budget" and value == "none" else kind(value)
            except (ValueError, KeyError):
                wanted = "on or off" if name == "history" else "a number"
                raise UserError(f"{name}: got {value!r}, wanted {wanted}") from None
            self.knobs = dataclasses.replace(self.knobs, **{name: number})
        self.screen.line(f"{name} {getattr(self.knobs, name)}", DIM)

    def turn(self, question: str) -> None:
        """Ask, show thought and answer, remember both. Raises UserError where there is no room left."""
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = chat_ids(self.tokenizer, asked if self.knobs.history else asked[-1:], self.knobs.thinking)
        replies = [Reply(self.tokenizer, prompt) for _ in range(self.knobs.votes)]
        knobs = dataclasses.replace(self.knobs, seed=self.knobs.seed + len(self.messages) // 2)
        started = time.perf_counter()
        show, is_whole = Watch(self.screen, replies), True
        try:
            self.answer(prompt, show, knobs)
        except KeyboardInterrupt:
            is_whole = False
        seconds = time.perf_counter() - started
        show.fold()
        self.thought = replies[0].thought
        said = self.vote(replies) if is_whole and len(replies) > 1 else replies[0].said.strip()
        made = sum(reply.tokens for reply in replies)
        notes = [f"{made} tokens, {made / seconds:,.0f} tokens/s"]
        if not is_whole:
            notes.append("ended by Ctrl-C")
        elif not replies[0].has_ended:
            notes.append("cut: --max_new_tokens or the context is at its end")
        if said and (is_whole or len(replies) == 1):
            self.messages = [*asked, {"role": "assistant", "content": said}]
        else:
            notes.append(f"no answer: {FORGET}")
        self.screen.line(f"[{'; '.join(notes)}]", DIM)

    def vote(self, replies: list[Reply]) -> str:
        """Show how often each answer was given; returns the most frequent one (R1's cons@k)."""
        answers = [reply.said.strip() or None if reply.has_ended else None for reply in replies]
        counts = tally(answers)
        for text, count in counts[:8]:
            bar = "█" * max(1, round(BAR * count / counts[0][1]))
            self.screen.line(f"{' '.join(text.split())[:40]:>12} {bar} {count}")
        rest = len(replies) - sum(count for _, count in counts[:8])
        if rest:
            self.screen.line(f"{'others, none':>12} {rest}", DIM)
        if not counts:
            return ""
        self.screen.line(counts[0][0], BRIGHT)
        return counts[0][0]


class Watch:
    """An `on_token` that shows row 0 as it is made: its thought dimmed, its answer bright."""

    def __init__(self, screen: Screen, replies: list[Reply]):
        self.screen, self.replies, self.is_folded = screen, replies, False
        self.started = time.perf_counter()

    def __call__(self, row: int, token: int) -> None:
        thought, said = self.replies[row].add(token)
        if row == 0 and thought:
            self.screen.write(thought, DIM)
        if row == 0 and said and len(self.replies) == 1:
            self.fold()
            self.screen.write(said, BRIGHT)

    def fold(self) -> None:
        """The thought, once it is over, becomes one line."""
        reply = self.replies[0]
        if not self.is_folded and reply.thought_tokens:
            self.screen.fold()
            seconds = time.perf_counter() - self.started
            self.screen.line(f"▸ thought for {reply.thought_tokens} tokens, {seconds:.2g} s (/think shows it)", DIM)
        self.is_folded = True
