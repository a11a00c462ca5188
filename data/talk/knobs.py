"""What can be asked of a conversation, in a terminal or over HTTP."""

from dataclasses import dataclass

from data.io.cli import Knobs, UserError, knob


@dataclass
class TalkKnobs(Knobs):
    """The knobs of `python sample.py` that say how it talks; each is refused where it has no effect."""

    prompt: str = knob("", "the text to continue", positional=True)
    chat: bool = knob(False, "put the prompt as a question into the chat template; without one, talk")
    thinking: bool | None = knob(None, "with --chat or --serve: think aloud, or not [as the model's template has it]")
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
        yield from self.only("no --serve", not self.serve, "prompt", "chat")
        yield from self.only("--serve", self.serve, "host", "port", "rows", "queue", "longest")
        yield from self.only("--chat", self.chat, "votes", "budget")
        yield from self.only("--chat or --serve", self.chat or self.serve, "thinking")
        yield from self.only("--chat without a question", self.chat and not self.prompt, "history")


def check_server(knobs: TalkKnobs) -> None:
    """Raises UserError where data/talk/serve.py misses a library, or cannot listen: before weights are read."""
    try:
        from data.talk.serve import listen
    except ImportError as error:
        raise UserError(f"--serve wants {error.name}: pip install -r requirements-serve.txt") from None
    listen(knobs.host, knobs.port).close()
