"""A conversation as ids, in a model's own chat template; what a user writes is never a special token.

A template is a program in jinja that came with a model. It runs in jinja's sandbox, as in
transformers: it sees the messages and nothing of this machine.
"""

import json
from datetime import datetime
from typing import NoReturn

import jinja2
import regex
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.io.cli import UserError
from data.text.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"


def render(template: str, messages: list[dict], **variables) -> str:
    """The text that a chat template makes of messages, `{"role": ..., "content": ...}` each.

    Raises UserError when the template refuses them or is faulty.

    >>> render("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}", [{"role": "user", "content": "hi"}])
    '[user] hi'
    """
    def refuse(words) -> NoReturn:
        raise jinja2.TemplateError(words)

    def to_json(value, ensure_ascii=False, **options) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = to_json  # jinja's own escapes for HTML
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return sandbox.from_string(template).render(messages=messages, **variables)
    except Exception as error:  # whatever a foreign program may raise
        raise UserError(f"chat template: {type(error).__name__} {' '.join(str(error).split())[:200]}") from None


def chat_ids(tokenizer: Tokenizer, messages: list[dict], thinking: bool | None = None,
             tools: list[dict] | None = None) -> list[int]:
    """Ids of a conversation up to where the model answers, begin token included.

    messages: `{"role": "system" | "user" | "assistant" | "tool", "content": ...}`; thinking: on, off,
    or None, as the template has it. Special tokens are the template's own, and the thinking tags of
    earlier answers; anything else that spells one is ordinary text. Raises UserError for a model
    without a template, and for what the template refuses.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UserError(f"tokenizer {tokenizer.name}: no chat template lies beside it (chat_template.jinja, or in "
                        "tokenizer_config.json): this is a base model, go without --chat")
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise UserError('messages: wanted a list, each {"role": "user", "content": "..."}')
    mark = _free_letter(template + json.dumps([messages, tools], ensure_ascii=False, default=str))
    forged: list[str] = []
    marked = [_hide(m, tokenizer, mark, forged, m["role"] == "assistant") for m in messages]
    variables = {"bos_token": tokenizer.begin or "", "eos_token": tokenizer.end, "add_generation_prompt": True}
    if tools:
        variables["tools"] = _hide(tools, tokenizer, mark, forged)
    if thinking is not None:  # the names of DeepSeek and Kimi, and of GLM and Qwen
        variables |= {"thinking": thinking, "enable_thinking": thinking}
    text = render(template, marked, **variables)
    if thinking is not None and not regex.search(r"\b(enable_)?thinking\b", template):
        text = _asked_to_think(text, thinking, tokenizer)
    ids = []
    for part in tokenizer.spelled(text):
        if part in tokenizer.specials:
            ids.append(tokenizer.specials[part])
        else:
            ids += tokenizer.encode(regex.sub(f"{mark}([0-9]+){mark}", lambda found: forged[int(found[1])], part))
    return ids


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool, thinking: bool | None = None) -> list[int]:
    """Ids of a user's text, which holds no specials, behind the begin token or in the template."""
    if chat:
        return chat_ids(tokenizer, [{"role": "user", "content": text}], thinking)
    return tokenizer.opening + tokenizer.encode(text)


def _free_letter(text: str) -> str:
    """A letter of the private use area that a text does not have."""
    return next(chr(i) for i in range(0xE000, 0xF900) if chr(i) not in text)


def _hide(value, tokenizer: Tokenizer, mark: str, forged: list[str], may_think: bool = False):
    """A value of a message in which each special that is spelled is a number between marks, a place in `forged`."""
    if isinstance(value, list):
        return [_hide(each, tokenizer, mark, forged, may_think) for each in value]
    if isinstance(value, dict):
        pairs = [[_hide(each, tokenizer, mark, forged, may_think) for each in pair] for pair in value.items()]
        return dict(pairs)
    if not isinstance(value, str):
        return value
    out = []
    for part in tokenizer.spelled(value):
        if part in tokenizer.specials and not (may_think and part in (THINK, END_THINK)):
            forged.append(part)
            part = f"{mark}{len(forged) - 1}{mark}"
        out.append(part)
    return "".join(out)


def _asked_to_think(text: str, thinking: bool, tokenizer: Tokenizer) -> str:
    """Where a template has no switch: R1 is made to think by the tag behind its role, and not to by an empty pair."""
    if THINK not in tokenizer.specials:
        if thinking:
            raise UserError(f"tokenizer {tokenizer.name}: this model has no {THINK}: it does not think aloud")
        return text
    is_open = text.rstrip().endswith(THINK)
    if thinking:
        return text if is_open else f"{text}{THINK}\n"
    return (text.rstrip() if is_open else f"{text}{THINK}") + f"\n\n{END_THINK}\n\n"
