"""From a checkpoint to text: the sampler, batched generation on the latent cache, the command line.

`generate` is also the rollout engine of rl.py. The small tools that every command line program shares
(knobs, flags, errors, devices) live at the end, because train.py and rl.py may import from here.

    python sample.py "Once upon a time"     continue a text with the newest checkpoint below out/
    python sample.py --chat "4-6+3="        ask a question in the template that rl.py trains on
"""

import argparse
import codecs
import math
import os
import sys
import time
import types
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, NoReturn, Sequence, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from data import UserError, nearest, run_main
from data.tasks import prompt_text
from data.tokenizer import load_tokenizer
from model import Cache, Config, Transformer, load_pretrained

COMPACT_BELOW = 0.75  # rows leave the batch, which copies the cache, when this share is still alive

# ---------------------------------------------------------------------------------------------- sampling


class Draw(NamedTuple):
    """One sampled token per row and what rl.py wants to know about the distribution it came from."""

    token: Tensor  # (n,) int64
    logp: Tensor  # (n,) nats, of the token
    entropy: Tensor  # (n,) nats, of the distribution
    support: Tensor  # (n, V) bool, tokens that could have come


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (n, V) with -inf outside the top-k and then outside the nucleus (top-p, arXiv 1904.09751).

    The nucleus is the smallest set of likeliest tokens that holds at least `top_p` of the probability
    left by top-k. Both cut at a value: tokens that tie with the last one kept stay, so that the set does
    not depend on the order of the vocabulary. `top_k` 0 and `top_p` 1 switch the cuts off.

    >>> truncate(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), top_k=2)
    tensor([[3., -inf, 2., 2.]])
    >>> truncate(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.6).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    if 0 < top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]  # (n, 1)
        logits = logits.masked_fill(logits < last, -math.inf)
    if top_p < 1:
        probs = logits.softmax(-1)  # (n, V)
        falling = probs.sort(dim=-1, descending=True).values
        is_kept = falling.cumsum(-1) - falling < top_p  # the mass before a token is not yet enough
        last = falling.gather(-1, is_kept.sum(-1, keepdim=True) - 1)  # (n, 1)
        logits = logits.masked_fill(probs < last, -math.inf)
    return logits


def sample_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, noise: Tensor) -> Draw:
    """Draw one token per row from `softmax(logits / temperature)`, truncated; the only place that draws.

    logits (n, V); noise (n,), uniform in [0, 1), is all the chance there is: the token is the first whose
    cumulative probability exceeds it. Log-prob and entropy are of the distribution drawn from.
    Temperature 0 takes the likeliest token; log-prob and entropy are then those of the whole softmax.
    Raises UserError when a logit is NaN or infinite.

    >>> draw = sample_tokens(torch.tensor([[0.25, 0.75]]).log(), 1.0, 0, 1.0, noise=torch.tensor([0.3]))
    >>> draw.token.item(), round(draw.logp.exp().item(), 4)
    (1, 0.75)
    """
    peak = logits.amax(-1, keepdim=True)  # (n, 1)
    if not peak.isfinite().all():
        raise UserError("sampling: the model's logits are not finite: the training run behind it diverged")
    if temperature > 0:  # behind the subtraction a tiny temperature cannot overflow
        logits = truncate((logits - peak) / temperature, top_k, top_p)
    logps = logits.log_softmax(-1)  # (n, V)
    probs = logps.exp()
    token = invert_cdf(probs, noise) if temperature > 0 else logits.argmax(-1)  # (n,)
    logp = logps.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return Draw(token, logp, torch.special.entr(probs).sum(-1), logps > -math.inf)


def invert_cdf(probs: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds noise: probs (n, V), noise (n,) -> (n,) int64.

    A token of probability 0 never comes: it does not raise the sum. float64 keeps that so for large
    vocabularies, where the order of a float32 sum shows.
    """
    wide = torch.float32 if probs.device.type == "mps" else torch.float64
    cdf = probs.cumsum(-1, dtype=wide)  # (n, V)
    total = cdf[:, -1:].contiguous()  # (n, 1), 1 but for rounding
    token = torch.searchsorted(cdf, noise.to(wide).unsqueeze(1) * total, right=True)
    last_possible = torch.searchsorted(cdf, total)
    return torch.minimum(token, last_possible).squeeze(1)


# -------------------------------------------------------------------------------------------- generation


@dataclass
class Generation:
    """What `generate` made: N = prompts x num_samples rows, the samples of the first prompt first.

    A value that belongs to a token stands at that token's own position; where `mask` is False, `logps`
    and `entropy` are 0 and `keep` is True. `routing` is what model(tokens, replay=routing) takes; where
    the model saw no token (the last one of a row, padding) it names experts 0 to K-1.
    """

    tokens: Tensor  # (N, T) int64: prompt, completion, then padding with the first stop id
    mask: Tensor  # (N, T) bool: the model chose this token; the stop token counts
    prompt_lengths: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64, of prompt and completion
    logps: Tensor  # (N, T) nats, under the distribution sampled from
    entropy: Tensor  # (N, T) nats, of that distribution
    finished: Tensor  # (N,) bool: ended by a stop token, not by a limit
    routing: list[Tensor] | None = None  # per MoE layer (N, T, K) int64
    keep: Tensor | None = None  # (N, T, V) bool, the tokens that could have come

    def completion(self, row: int) -> list[int]:
        """The sampled ids of one row, without the stop token."""
        end = self.lengths[row] - self.finished[row].long()
        return self.tokens[row, self.prompt_lengths[row] : end].tolist()


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *, num_samples: int = 1,
             max_new_tokens: int = 256, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             stop_ids: Sequence[int] = (), seed: int | Sequence[int] | None = None, keep_routing: bool = False,
             keep_sampling_mask: bool = False, on_token: Callable[[int, int], None] | None = None) -> Generation:
    """Sample `num_samples` completions of each prompt, all in one batch.

    Every prompt is read once; its latents are then repeated for its samples. A row ends at a stop id,
    after `max_new_tokens`, or at max_position_embeddings, and soon leaves the batch. `on_token(row, id)`
    is called as tokens are made. The chance of a row depends on its prompt's seed alone, never on its
    neighbours: one int gives each prompt its own seed, a sequence has one per prompt (so that ranks that
    share the prompts draw what one process would), None is different each time.
    Raises UserError for requests that cannot be met, and when the model's logits are not finite.
    """
    _check_prompts(model.config, prompts, stop_ids)
    _check_knobs(num_samples, max_new_tokens, temperature, top_k, top_p)
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings)
    device = model.lm_head.weight.device
    noise = draw_noise(seed, len(prompts), num_samples, max_new_tokens).to(device)  # (N, max_new_tokens)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    with evaluating(model):
        out = _blank(model, prompts, num_samples, max_new_tokens, stop_ids)
        if keep_sampling_mask:
            out.keep = torch.ones(*out.mask.shape, model.config.vocab_size, dtype=torch.bool, device=device)
        logits, cache = _prefill(model, out, num_samples, keep_routing)
        limits = (out.prompt_lengths + max_new_tokens).clamp(max=out.tokens.shape[1])  # (N,)
        rows = torch.arange(len(limits), device=device)  # (n,) row of `out` behind each row of the batch
        is_alive = torch.ones_like(rows, dtype=torch.bool)  # (n,)
        while True:
            at = cache.length  # (n,) position of the token that each row gets now
            chance = noise[rows, at - out.prompt_lengths[rows]]
            draw = sample_tokens(logits, temperature, top_k, top_p, chance)
            is_stop = torch.isin(draw.token, stops)
            _record(out, rows[is_alive], at[is_alive], is_stop[is_alive], *(x[is_alive] for x in draw))
            if on_token is not None:
                for row, token in zip(rows[is_alive].tolist(), draw.token[is_alive].tolist()):
                    on_token(row, token)
            is_alive = is_alive & ~is_stop & (at + 1 < limits[rows])
            left, tokens = is_alive.nonzero().squeeze(1), draw.token
            if len(left) == 0:
                return _trim(out)
            if len(left) <= COMPACT_BELOW * len(rows):
                cache, rows, tokens, is_alive = cache.select(left), rows[left], tokens[left], is_alive[left]
            logits = model(tokens.unsqueeze(1), cache=cache).squeeze(1)  # (n, V)
            for kept, chosen in zip(out.routing or [], model.routing):
                kept[rows[is_alive], cache.length[is_alive]] = chosen[is_alive, 0]
            cache.advance(is_alive.long())  # rows that ended stand still until they leave


def draw_noise(seed: int | Sequence[int] | None, prompts: int, num_samples: int, steps: int) -> Tensor:
    """Uniform numbers in [0, 1) for every row and step, (prompts * num_samples, steps) float32.

    A prompt's numbers come from its own seed, on the CPU whatever the device. More steps or more
    prompts leave the earlier numbers as they were.
    """
    if not isinstance(seed, Sequence):
        root = torch.Generator()
        root.seed() if seed is None else root.manual_seed(seed % 2**63)
        seed = torch.randint(2**62, (prompts,), generator=root).tolist()
    if len(seed) != prompts:
        raise UserError(f"seed: got {len(seed)} seeds for {prompts} prompts, wanted one each")
    generators = [torch.Generator().manual_seed(one % 2**63) for one in seed]
    return torch.cat([torch.rand(steps, num_samples, generator=one).t() for one in generators])


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """eval() inside the block, afterwards the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _blank(model: Transformer, prompts, num_samples: int, max_new_tokens: int, stop_ids) -> Generation:
    """A Generation of prompts and padding, as wide as it can become."""
    pad = stop_ids[0] if len(stop_ids) else model.config.eos_token_id
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (prompts,)
    T = min(int(lengths.max()) + max_new_tokens, model.config.max_position_embeddings)
    padded = torch.tensor([[*prompt, *[pad] * (T - len(prompt))] for prompt in prompts])  # (prompts, T)
    device = model.lm_head.weight.device
    tokens, lengths = (x.repeat_interleave(num_samples, dim=0).to(device) for x in (padded, lengths))  # (N, T), (N,)
    blank = torch.zeros_like(tokens, dtype=torch.promote_types(model.compute_dtype, torch.float32))
    return Generation(tokens, blank.bool(), lengths, lengths.clone(), logps=blank, entropy=blank.clone(),
                      finished=torch.zeros_like(lengths, dtype=torch.bool))


def _prefill(model, out: Generation, num_samples: int, keep_routing: bool) -> tuple[Tensor, Cache]:
    """Read each prompt once: the logits behind its last token, and the cache, for all N rows."""
    lengths = out.prompt_lengths[::num_samples]  # (prompts,)
    longest, T = int(lengths.max()), out.tokens.shape[1]
    cache = model.new_cache(len(lengths), T)
    # padding stands right of the prompt, so no prompt token sees it, and decoding overwrites its latents
    logits = model(out.tokens[::num_samples, :longest], cache=cache, last_only=lengths - 1)
    cache.advance(lengths)
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(num_samples)  # (N,)
    if keep_routing:
        out.routing = []
        is_prompt = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)  # (prompts, longest)
        for chosen in model.routing:  # (prompts, longest, K)
            nobody = torch.arange(chosen.shape[-1], device=chosen.device)  # (K,)
            kept = nobody.repeat(len(lengths), T, 1)  # (prompts, T, K)
            kept[:, :longest] = torch.where(is_prompt.unsqueeze(-1), chosen, nobody)
            out.routing.append(kept[rows])
    return logits[rows], cache if num_samples == 1 else cache.select(rows)


def _record(out: Generation, rows, at, is_stop, token, logp, entropy, support) -> None:
    """Write what the given rows drew at their positions `at`."""
    out.tokens[rows, at], out.mask[rows, at] = token, True
    out.logps[rows, at], out.entropy[rows, at] = logp, entropy
    out.lengths[rows], out.finished[rows] = at + 1, is_stop
    if out.keep is not None:
        out.keep[rows, at] = support


def _trim(out: Generation) -> Generation:
    """Cut every (N, T, ...) field to the longest row."""
    T = int(out.lengths.max())
    names = ("tokens", "mask", "logps", "entropy") + ("keep",) * (out.keep is not None)
    routing = out.routing and [kept[:, :T] for kept in out.routing]
    return replace(out, routing=routing, **{name: getattr(out, name)[:, :T] for name in names})


def _check_knobs(num_samples: int, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    for name, value, wanted, is_met in (
        ("num_samples", num_samples, "at least 1", num_samples >= 1),
        ("max_new_tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
        ("temperature", temperature, "0 (greedy) or a positive number", 0 <= temperature < math.inf),
        ("top_k", top_k, "0 (off) or more", top_k >= 0),
        ("top_p", top_p, "above 0 and at most 1 (off)", 0 < top_p <= 1),
    ):
        if not is_met:
            raise UserError(f"{name}: got {value}, wanted {wanted}")


def _check_prompts(config: Config, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> None:
    if len(prompts) == 0:
        raise UserError("prompts: got none, wanted at least one")
    context, vocab = config.max_position_embeddings, config.vocab_size
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise UserError(f"prompt {i}: got {len(prompt)} tokens, wanted 1 to {context - 1}, so that the "
                            f"context of {context} has room for an answer")
        low, high = min(*prompt, *stop_ids, 0), max(*prompt, *stop_ids, 0)
        if low < 0 or high >= vocab:
            raise UserError(f"prompt {i}: got token id {low if low < 0 else high}, wanted 0 to {vocab - 1}: is "
                            "this the tokenizer that the model was trained with?")


# ------------------------------------------------------------------------- tools of the command line programs


def knob(default, help: str, **extra):
    """A dataclass field that `parse_flags` shows with `help`; extra: `choices=(...)`, `positional=True`."""
    metadata = {"help": help} | extra
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse_flags(cls, argv: Sequence[str], description: str):
    """An instance of the dataclass `cls` from command line flags, one per field.

    Types: int, float, str, bool (`--flag`, `--no-flag`), any of them or None (`--flag none`), and
    list[str] (`--flag a b`, repeatable). `--micro-batch` and `--micro_batch` are the same.
    Raises UserError for an unknown flag, naming the nearest, and for values of the wrong type.

    >>> @dataclass
    ... class Knobs:
    ...     micro_batch: int = knob(8, "sequences per forward pass")
    >>> parse_flags(Knobs, ["--micro-batch", "4"], "example")
    Knobs(micro_batch=4)
    """
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(cls)
    for each in fields(cls):
        _add_flag(parser, each, hints[each.name])
    values, rest = parser.parse_known_args(list(argv))
    for word in rest:
        if word.startswith("-"):
            name = word.partition("=")[0]
            close = nearest(name.replace("-", "_"), ["__" + each.name for each in fields(cls)])
            raise UserError(f"unknown flag {name}{close.replace('__', '--', 1)}; --help lists all")
        raise UserError(f"unexpected argument {word!r}: a text with spaces goes in quotes")
    return cls(**vars(values))


def _add_flag(parser: argparse.ArgumentParser, each, kind) -> None:
    meta, is_list, allows_none = each.metadata, get_origin(kind) is list, types.NoneType in get_args(kind)
    kind = get_args(kind)[0] if is_list or allows_none else kind
    default = each.default_factory() if is_list else each.default
    shown = "" if default in (None, [], "") else f" [{default}]"
    help = (meta["help"] + shown).replace("%", "%%")
    options = {"default": default}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = _converter(kind, allows_none)
        options |= {"choices": meta["choices"]} if "choices" in meta else {"metavar": kind.__name__}
    if is_list:
        options |= {"nargs": "+", "action": "extend"}
    if meta.get("positional"):
        parser.add_argument(each.name, nargs="?", help=help, **options | {"metavar": each.name})
        return
    spellings = {each.name.replace("_", "-"): argparse.SUPPRESS, each.name: help}  # --help shows one
    for name, text in spellings.items():
        parser.add_argument("--" + name, dest=each.name, help=text, **options)


def _converter(kind, allows_none: bool) -> Callable[[str], object]:
    def convert(text: str):
        if allows_none and text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {kind.__name__}") from None

    return convert


def pick_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "mps"; "auto" is cuda where there is one, else cpu.

    Raises UserError for a name that is not known or a device that this machine does not have.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "cpu"
    if name not in has:
        raise UserError(f"device: got {name!r}, wanted auto, cpu, cuda or mps{nearest(name, has)}")
    if not has[name]:
        raise UserError(f"device: got {name}, this machine has {', '.join(k for k in has if has[k])} only")
    return torch.device(name)


def newest_run(root: str | Path = "out") -> Path:
    """The checkpoint directory below `root` that was written last. Raises UserError when there is none."""
    weights = [path for path in Path(root).rglob("model*.safetensors") if (path.parent / "config.json").exists()]
    if not weights:
        raise UserError(f"no checkpoint below {root}/: python train.py makes one, --checkpoint names another")
    return max(weights, key=lambda path: path.stat().st_mtime_ns).parent


# -------------------------------------------------------------------------------------------------- program


@dataclass
class SampleConfig:
    """The knobs of `python sample.py`."""

    prompt: str = knob("", "the text to continue", positional=True)
    checkpoint: str | None = knob(None, "directory with config.json and weights [the newest below out/]")
    chat: bool = knob(False, "put the prompt as a question into the chat template")
    max_new_tokens: int = knob(200, "most tokens to make")
    num_samples: int = knob(1, "number of continuations")
    temperature: float = knob(0.8, "flattens (above 1) or sharpens the distribution; 0 is greedy")
    top_k: int = knob(0, "only the k likeliest tokens; 0 is all")
    top_p: float = knob(0.95, "only the likeliest tokens that hold this share of the probability; 1 is all")
    seed: int = knob(0, "the same seed gives the same text")
    device: str = knob("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))


def encode_prompt(tokenizer, text: str, chat: bool) -> list[int]:
    """Ids of a user's text behind the begin token, or within the chat template.

    The text is always ordinary: "<think>" typed by a user is seven characters, never the special.
    """
    if not chat:
        return [tokenizer.bos_id] + tokenizer.encode(text)
    before, after = prompt_text("\0").split("\0")
    return tokenizer.encode_trusted(before) + tokenizer.encode(text) + tokenizer.encode_trusted(after)


def printer(tokenizer) -> Callable[[int, int], None]:
    """An `on_token` that prints row 0 as it is made, whole characters only."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character

    def show(row: int, token: int) -> None:
        if row == 0 and token != tokenizer.eos_id:
            print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    return show


def main(argv: list[str]) -> None:
    """Continue a prompt: the first sample streams, the others follow."""
    knobs = parse_flags(SampleConfig, argv, "Continue a text with a checkpoint.")
    if not knobs.prompt:
        raise UserError('the prompt is empty: python sample.py "Once upon a time"')
    device = pick_device(knobs.device)
    directory = Path(knobs.checkpoint) if knobs.checkpoint else newest_run()
    model, tokenizer = load_pretrained(directory, device=device), load_tokenizer(directory)
    prompt = os.fsencode(knobs.prompt).decode(errors="replace")  # bytes that are no UTF-8
    ids = encode_prompt(tokenizer, prompt, knobs.chat)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    lead = "" if knobs.chat else prompt
    started = time.perf_counter()
    print(lead, end="", flush=True)
    out = generate(model, [ids], num_samples=knobs.num_samples, max_new_tokens=knobs.max_new_tokens,
                   temperature=knobs.temperature, top_k=knobs.top_k, top_p=knobs.top_p,
                   stop_ids=[tokenizer.eos_id], seed=knobs.seed, on_token=printer(tokenizer))
    print()
    seconds = time.perf_counter() - started
    for row in range(1, knobs.num_samples):
        print(f"--- {row + 1}\n{lead}{tokenizer.decode(out.completion(row))}")
    made = int(out.mask.sum())
    print(f"[{directory} on {device}: {made} tokens, {made / seconds:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
