"""What the API takes and gives, as DeepSeek's and OpenAI's have it: requests checked, answers as JSON."""

import json
import time
import uuid
from dataclasses import dataclass

from data.io.cli import Knobs, UserError, knob
from data.talk.reply import Reply
from data.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
WITHOUT_EFFECT = {  # parameters that are let through when they ask for what is done anyway
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None),
    "logprobs": (False, None), "top_logprobs": (None,), "tools": ([], None), "tool_choice": ("none", None),
    "response_format": ({"type": "text"}, None), "prompt_cache_key": None, "service_tier": None, "user": None,
    "store": (False, None), "metadata": None, "parallel_tool_calls": None, "safety_identifier": None,
}  # None: whatever they are


@dataclass
class ChatRequest(Knobs):
    """The parameters of /chat/completions that have an effect."""

    model: str = knob("", "one of /models")
    stream: bool | None = knob(False, "token by token, as server-sent events")
    temperature: float | None = knob(None, "0 is greedy", least=0, most=2)
    top_p: float | None = knob(None, "the likeliest that hold this probability", above=0, most=1)
    max_tokens: int | None = knob(None, "most tokens to make, thought included", least=1)
    seed: int | None = knob(None, "the same seed gives the same text", least=-(2**63), most=2**64 - 1)
    n: int | None = knob(1, "answers", least=1)
    stop: list[str] = knob([], "what is said ends before the first of these")
    thinking: bool | None = knob(None, "on or off, as the chat template has it")
    include_usage: bool | None = knob(False, "with stream: the last event has the usage")

    def rules(self):
        yield "stop", "up to 16 texts, none empty", len(self.stop) <= 16 and all(self.stop)


def read_request(body: bytes) -> tuple[ChatRequest, list[dict]]:
    """The request in a body, and its messages. Raises UserError("what: got, wanted")."""
    given = read_object(body)
    messages = read_messages(given.pop("messages", None))
    for name, fine in WITHOUT_EFFECT.items():
        if name in given:
            value = given.pop(name)
            if fine is not None and value not in fine:
                raise UserError(f"{name}: is not supported")
    if "max_completion_tokens" in given:
        given["max_tokens"] = given.pop("max_completion_tokens")
    options = given.pop("stream_options", None) or {}
    given["include_usage"] = options.get("include_usage") if isinstance(options, dict) else options
    mode = given.pop("thinking", None)  # DeepSeek's: {"type": "enabled"}
    if mode is not None:
        kinds = {"enabled": True, "disabled": False}
        kind = mode.get("type") if isinstance(mode, dict) else mode
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError('thinking: wanted {"type": "enabled"} or {"type": "disabled"}')
        given["thinking"] = kinds[kind]
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    known = ChatRequest.__dataclass_fields__
    if strange := [name for name in given if name not in known]:
        raise UserError(f"{strange[0][:60]}: is not a parameter that is known here")
    for name in ("stream", "n", "stop"):
        if given.get(name, ...) is None:
            del given[name]
    return ChatRequest(**given), messages


def read_object(body: bytes) -> dict:
    """The JSON object of a body, without NaN. Raises UserError."""
    def refuse(word: str):
        raise ValueError(f"{word} is no JSON")

    try:
        given = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"body: cannot be read as JSON: {type(error).__name__} {str(error)[:100]}") from None
    if not isinstance(given, dict):
        raise UserError(f"body: got a {type(given).__name__}, wanted a JSON object")
    return given


def read_messages(given) -> list[dict]:
    """Messages with their texts as one string each. Raises UserError for any other form."""
    if not isinstance(given, list) or not given:
        raise UserError('messages: wanted a list, each {"role": "user", "content": "..."}')
    messages = []
    for i, message in enumerate(given):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UserError(f"messages[{i}]: wanted an object with a role out of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                     for part in content]
            content = None if None in parts or not all(isinstance(p, str) for p in parts) else "".join(parts)
        if not isinstance(content, str):
            raise UserError(f"messages[{i}].content: wanted a text")
        content = content.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": content})
    return messages


class Choice:
    """One answer of a request: its tokens become parts of `reasoning_content` and `content`.

    Stop strings end what is said, not the thought; what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: list[str]):
        self.reply, self.stop = Reply(tokenizer, prompt), stop
        self.sent = 0  # characters of what is said that are out
        self.finish_reason: str | None = None

    def add(self, tokens: list[int], has_ended: bool) -> dict[str, str]:
        """What new tokens add to the message; `finish_reason` is set when it is the last."""
        thought = ""
        for token in tokens:
            if self.finish_reason is None:
                thought += self.reply.add(token)[0]
                if any(word in self.reply.said for word in self.stop):
                    self.finish_reason = "stop"
        said = self.reply.said
        if self.finish_reason is None and has_ended:
            self.finish_reason = "stop" if self.reply.has_ended else "length"
        end = min((said.find(word) for word in self.stop if word in said), default=len(said))
        if self.finish_reason is None:
            end -= max((i for word in self.stop for i in range(1, len(word)) if said.endswith(word[:i])), default=0)
        delta = {"reasoning_content": thought, "content": said[self.sent : end]}
        self.sent = max(self.sent, end)
        return {key: text for key, text in delta.items() if text}

    def message(self) -> dict:
        """The whole message."""
        thought = {"reasoning_content": self.reply.thought} if self.reply.thought_tokens else {}
        return {"role": "assistant", "content": self.reply.said[: self.sent], **thought}


def usage(prompt: list[int], choices: list[Choice]) -> dict:
    """How many tokens were read and made, tags and stop tokens among them."""
    made = sum(choice.reply.tokens for choice in choices)
    thought = sum(choice.reply.thought_tokens for choice in choices)
    return {"prompt_tokens": len(prompt), "completion_tokens": made, "total_tokens": len(prompt) + made,
            "completion_tokens_details": {"reasoning_tokens": thought}}


class Answer:
    """The JSON of one request's answers, whole or in chunks."""

    def __init__(self, model: str):
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, prompt: list[int], choices: list[Choice]) -> dict:
        """The answer that is not streamed."""
        rows = [{"index": i, "message": choice.message(), "logprobs": None, "finish_reason": choice.finish_reason}
                for i, choice in enumerate(choices)]
        return {**self.head, "object": "chat.completion", "choices": rows, "usage": usage(prompt, choices)}

    def chunk(self, index: int, delta: dict, finish_reason: str | None = None) -> dict:
        """One event of a stream."""
        row = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.head, "object": "chat.completion.chunk", "choices": [row]}

    def last_chunk(self, prompt: list[int], choices: list[Choice]) -> dict:
        """The event that has the usage and nothing else."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(prompt, choices)}


PARAMETERS = {"messages", *ChatRequest.__dataclass_fields__, *WITHOUT_EFFECT}


def error_body(status: int, message: str, code: str | None = None) -> dict:
    """An error as OpenAI's clients read it; `param` is what stands before the first colon."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    name, colon, _ = message.partition(":")
    param = name if colon and name.split("[")[0] in PARAMETERS else None
    message = message if len(message) < 300 else f"{message[:290]} ..."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
