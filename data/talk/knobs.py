"""What can be asked of a conversation, in a terminal or over HTTP."""

from dataclasses import dataclass

from data.io.cli import Knobs, knob


@dataclass
class TalkKnobs(Knobs):
    """The knobs of `python sample.py --chat` without a question, and of --serve."""

    votes: int = knob(1, "with --chat: answers to each question at once, of which the most frequent counts", least=1)
    budget: int | None = knob(None, "with --chat: close a thought after so many tokens [as long as it likes]", least=0)
    history: bool | None = knob(None, "with --chat: a question sees those before it [where the model learned to]")
    serve: bool = knob(False, "answer over HTTP as DeepSeek's API does, and show a page (requirements-serve.txt)")
    host: str = knob("127.0.0.1", "with --serve: the address to listen at; 0.0.0.0 is everybody's")
    port: int = knob(8000, "with --serve: the port; 0 is any that is free", least=0, most=65535)
    rows: int = knob(32, "with --serve: answers that are decoded together", least=1, most=1024)
    queue: int = knob(64, "with --serve: requests that may wait", least=1)
    longest: int = knob(8192, "with --serve: tokens of prompt and answer, if the model has a context of that", least=2)

    def rules(self):
        yield from super().rules()
        yield "budget", "--chat", self.budget is None or getattr(self, "chat", False)
        yield "votes", "--chat", self.votes == 1 or getattr(self, "chat", False)
