"""From a checkpoint to text: everything is one distribution and one draw.

`sample_tokens` is the draw, `generate` the loop around it on the latent cache: read the prompts,
draw, write down, step. It is also the rollout engine of rl.py.

    python sample.py "Once upon a time"     continue a text with the newest checkpoint below out/
    python sample.py --chat "4-6+3="        ask a question in the template that rl.py trains on
"""

import codecs
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.io.checkpoint import load_config
from data.io.cli import Knobs, UserError, knob, parse_flags, pick_device, run_main, widest_float
from data.io.experts import ExpertCache, parse_size
from data.io.plot import expert_touch_figure
from data.io.run import newest_run
from data.text.chat import chat_ids
from data.text.tokenizer import Tokenizer, check_belongs, load_tokenizer
from kernels import at_least_float32
from model import Cache, Config, Transformer

COMPACT_BELOW = 0.75  # rows leave the batch, which copies the cache, when this share is still alive


class Draw(NamedTuple):
    """One sampled token per row, and what rl.py wants to know about its distribution."""

    token: Tensor  # (n,) int64
    logp: Tensor  # (n,) nats, of the token
    entropy: Tensor  # (n,) nats, of the distribution
    support: Tensor  # (n, V) bool, tokens that could have come


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (n, V), -inf outside the top-k and then outside the nucleus (top-p, arXiv 1904.09751).

    The nucleus is the smallest set of likeliest tokens that holds at least `top_p` of the
    probability left by top-k. Tokens that tie with the last one kept stay: the set does not depend
    on the order of the vocabulary. `top_k` 0 and `top_p` 1 switch the cuts off.

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
    """One token per row from `softmax(logits / temperature)`, truncated; the only place that draws.

    logits (n, V); noise (n,), uniform in [0, 1), is all the chance there is. Log-prob and entropy
    are of the distribution drawn from; temperature 0 takes the likeliest token out of the whole
    softmax. Raises UserError when a logit is NaN or infinite.

    >>> draw = sample_tokens(torch.tensor([[0.25, 0.75]]).log(), 1.0, 0, 1.0, torch.tensor([0.3]))
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
    """The first token whose cumulative probability exceeds noise: probs (n, V), noise (n,) -> (n,).

    A token of probability 0 never comes; in float64, since the order of a float32 sum would show.
    """
    wide = widest_float(probs.device)
    cdf = probs.cumsum(-1, dtype=wide)  # (n, V)
    total = cdf[:, -1:].contiguous()  # (n, 1), 1 but for rounding
    token = torch.searchsorted(cdf, noise.to(wide).unsqueeze(1) * total, right=True)
    return torch.minimum(token, torch.searchsorted(cdf, total)).squeeze(1)


class Generation(NamedTuple):
    """What `generate` made: N = prompts x num_samples rows, the samples of the first prompt first.

    A value that belongs to a token stands at that token's own position; where `mask` is False,
    `logps` and `entropy` are 0 and `support` is True. Where the model saw no token (the last one of
    a row) `routing` names experts 0 to K-1; model(tokens, replay=routing.unbind(2)) takes it.
    """

    tokens: Tensor  # (N, T) int64: prompt, completion, then padding with the first stop id
    mask: Tensor  # (N, T) bool: the model chose this token; the stop token counts
    prompt_lengths: Tensor  # (N,) int64
    lengths: Tensor  # (N,) int64, of prompt and completion
    logps: Tensor  # (N, T) nats, under the distribution sampled from
    entropy: Tensor  # (N, T) nats, of that distribution
    finished: Tensor  # (N,) bool: ended by a stop token, not by a limit
    routing: Tensor | None = None  # (N, T, MoE layers, K) int64, the experts of each token
    support: Tensor | None = None  # (N, T, V) bool, the tokens that could have come

    def completion(self, row: int) -> list[int]:
        """The sampled ids of one row, without the stop token."""
        end = self.lengths[row] - self.finished[row].long()
        return self.tokens[row, self.prompt_lengths[row] : end].tolist()

    def rows(self, index: Tensor | slice, T: int | None = None) -> "Generation":
        """The rows `index` in that order, cut to T columns."""
        return Generation(*(x if x is None else x[index] if x.ndim == 1 else x[index, :T] for x in self))

    def cat(self, other: "Generation") -> "Generation":
        """The rows of both, the other's last; what is shorter is filled up with zeros."""
        T = max(self.tokens.shape[1], other.tokens.shape[1])

        def widened(x: Tensor) -> Tensor:
            return x if x.ndim == 1 else F.pad(x, (0, 0) * (x.ndim - 2) + (0, T - x.shape[1]))

        return Generation(*(x if x is None else torch.cat((widened(x), widened(y))) for x, y in zip(self, other)))


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *, num_samples: int = 1,
             max_new_tokens: int = 256, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             stop_ids: Sequence[int] = (), seed: int | Sequence[int] | None = None,
             keep_routing: bool = False, keep_sampling_mask: bool = False,
             on_token: Callable[[int, int], None] | None = None) -> Generation:
    """Sample `num_samples` completions of each prompt, all in one batch.

    Every prompt is read once; its latents are then repeated for its samples. A row ends at a stop
    id, after `max_new_tokens`, or at max_position_embeddings, and soon leaves the batch.
    `on_token(row, id)` is called as tokens are made. The chance of a row depends on its prompt's
    seed alone: an int gives each prompt its own, a sequence has one per prompt (so that ranks that
    share the prompts draw what one process would), None is different each time. Raises UserError
    for requests that cannot be met, and when the model's logits are not finite.
    """
    SamplingKnobs(num_samples, max_new_tokens, temperature, top_k, top_p)
    check_prompts(model.config, prompts, stop_ids)
    max_new_tokens = min(max_new_tokens, model.config.max_position_embeddings)
    device = model.lm_head.weight.device
    noise = draw_noise(seed, len(prompts), num_samples, max_new_tokens).to(device)  # (N, steps)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    asked = [prompt for prompt in prompts for _ in range(num_samples)]  # (N,)
    out = _blank(model, asked, max_new_tokens, stop_ids, keep_routing, keep_sampling_mask)
    with evaluating(model):
        h, cache = _prefill(model, out, num_samples)  # (N, 1, C), the state behind each prompt
        limits = (out.prompt_lengths + max_new_tokens).clamp(max=out.tokens.shape[1])  # (N,)
        rows = torch.arange(len(asked), device=device)  # (n,) row of `out` of each row of the batch
        is_alive = torch.ones_like(rows, dtype=torch.bool)  # (n,)
        while True:
            logits = model.lm_head(h[:, 0]).to(at_least_float32(h.dtype))  # (n, V)
            at = cache.length  # (n,) position of the token that each row gets now
            draw = sample_tokens(logits, temperature, top_k, top_p, noise[rows, at - out.prompt_lengths[rows]])
            is_stop = torch.isin(draw.token, stops)
            row, place = rows[is_alive], at[is_alive]
            out.tokens[row, place] = draw.token[is_alive]
            out.mask[row, place] = True
            out.logps[row, place] = draw.logp[is_alive]
            out.entropy[row, place] = draw.entropy[is_alive]
            if keep_sampling_mask:
                out.support[row, place] = draw.support[is_alive]
            out.lengths[row] = place + 1
            out.finished[row] = is_stop[is_alive]
            if on_token is not None:
                for pair in zip(row.tolist(), draw.token[is_alive].tolist()):
                    on_token(*pair)
            is_alive = is_alive & ~is_stop & (at + 1 < limits[rows])
            left, tokens = is_alive.nonzero().squeeze(1), draw.token
            if len(left) == 0:
                break
            if len(left) <= COMPACT_BELOW * len(rows):
                cache, rows, tokens, is_alive = cache.select(left), rows[left], tokens[left], is_alive[left]
            h, routings = model.trunk(tokens.unsqueeze(1), cache)  # (n, 1, C)
            for layer, routing in enumerate(routings if keep_routing else ()):
                out.routing[rows[is_alive], cache.length[is_alive], layer] = routing.topk_idx[is_alive, 0]
            cache.advance(is_alive.long())  # rows that ended stand still until they leave
    return out.rows(slice(None), int(out.lengths.max()))


def draw_noise(seed: int | Sequence[int] | None, prompts: int, num_samples: int, steps: int) -> Tensor:
    """Uniform numbers in [0, 1) for every row and step, (prompts * num_samples, steps) float32.

    Each prompt's come from its own seed, on the CPU; more steps or prompts leave the others alone.
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


def _blank(model, prompts, max_new_tokens, stop_ids, keep_routing, keep_support) -> Generation:
    """A Generation of N prompts and padding, as wide as it can become."""
    config, device = model.config, model.lm_head.weight.device
    pad = stop_ids[0] if len(stop_ids) else config.eos_token_id
    T = min(max(map(len, prompts)) + max_new_tokens, config.max_position_embeddings)
    padded = [[*prompt, *[pad] * (T - len(prompt))] for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # (N, T)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (N,)
    zeros = torch.zeros_like(tokens, dtype=at_least_float32(model.compute_dtype))
    layers = sum(map(config.is_moe, range(config.num_hidden_layers)))
    experts = torch.arange(config.num_experts_per_tok, device=device)  # (K,)
    everything = torch.ones(config.vocab_size, dtype=torch.bool, device=device)  # (V,)
    return Generation(tokens, zeros.bool(), lengths, lengths.clone(), zeros, zeros.clone(),
                      finished=torch.zeros_like(lengths, dtype=torch.bool),
                      routing=experts.repeat(*tokens.shape, layers, 1) if keep_routing else None,
                      support=everything.repeat(*tokens.shape, 1) if keep_support else None)


def _prefill(model: Transformer, out: Generation, num_samples: int) -> tuple[Tensor, Cache]:
    """Read each prompt once: the state behind its last token, (N, 1, C), and a cache of N rows."""
    lengths = out.prompt_lengths[::num_samples]  # (prompts,)
    tokens = out.tokens[::num_samples, : int(lengths.max())]  # (prompts, longest)
    cache = model.new_cache(len(tokens), out.tokens.shape[1])
    # padding stands right of the prompt, so no prompt token sees it, and decoding overwrites it
    h, routings = model.trunk(tokens, cache)  # (prompts, longest, C)
    cache.advance(lengths)
    rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(num_samples)  # (N,)
    for layer, routing in enumerate(routings if out.routing is not None else ()):
        out.routing[:, : tokens.shape[1], layer] = routing.topk_idx[rows]
    return h[rows, out.prompt_lengths - 1].unsqueeze(1), cache if num_samples == 1 else cache.select(rows)


@dataclass
class SamplingKnobs(Knobs):
    """What can be asked of `generate`."""

    num_samples: int = knob(1, "number of continuations", least=1)
    max_new_tokens: int = knob(200, "most tokens to make", least=1)
    temperature: float = knob(0.8, "above 1 flattens the distribution; 0 is greedy", least=0)
    top_k: int = knob(0, "only the k likeliest tokens; 0 is all", least=0)
    top_p: float = knob(0.95, "only the likeliest that hold this probability; 1 is all", above=0, most=1)


def check_prompts(config, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> None:
    """Raises UserError for the first prompt that does not fit or has ids outside the vocabulary."""
    context, vocab = config.max_position_embeddings, config.vocab_size
    if len(prompts) == 0:
        raise UserError("prompts: got none, wanted at least one")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise UserError(f"prompt {i}: got {len(prompt)} tokens, wanted 1 to {context - 1} and room for an answer")
        for token in (*prompt, *stop_ids):
            if not 0 <= token < vocab:
                raise UserError(f"prompt {i}: got token id {token}, wanted 0 to {vocab - 1}: is this the "
                                "tokenizer that the model was trained with?")


# ------------------------------------------------------------------------------------ the program


@dataclass
class SampleConfig(SamplingKnobs):
    """The knobs of `python sample.py`."""

    prompt: str = knob("", "the text to continue", positional=True)
    checkpoint: str | None = knob(None, "directory with config.json and weights [the newest below out/]")
    chat: bool = knob(False, "put the prompt as a question into the chat template")
    seed: int = knob(0, "the same seed gives the same text")
    device: str = knob("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str | None = knob(None, "of weights and activations [the file's]",
                             choices=("float32", "bfloat16", "float16"))
    thinking: bool | None = knob(None, "with --chat: think aloud, or not [as the model's template has it]")
    experts: str = knob("memory", "where routed experts are: of a disk, only those chosen are read",
                        choices=("memory", "disk"))
    expert_cache: str = knob("8GB", "with --experts disk: how much of them memory holds")
    stats: bool = knob(False, "with --experts disk: print what was read, draw experts.png")

    def rules(self):
        yield "thinking", "--chat, whose template it is for", self.chat or self.thinking is None
        yield "stats", "--experts disk", self.experts == "disk" or not self.stats


def encode_prompt(tokenizer, text: str, chat: bool, thinking: bool | None = None) -> list[int]:
    """Ids of a user's text, which holds no specials, behind the begin token or in the template."""
    if chat:
        return chat_ids(tokenizer, [{"role": "user", "content": text}], thinking)
    return tokenizer.opening + tokenizer.encode(text)


def load(knobs: SampleConfig) -> tuple[Path, Transformer, Tokenizer, ExpertCache | None]:
    """What is sampled from. Whether tokenizer and model fit is seen before weights are read."""
    directory = Path(knobs.checkpoint) if knobs.checkpoint else newest_run()
    config, tokenizer = load_config(directory, Config), load_tokenizer(directory)
    check_belongs(tokenizer, config)
    cache = ExpertCache(parse_size(knobs.expert_cache)) if knobs.experts == "disk" else None
    dtype = getattr(torch, knobs.dtype) if knobs.dtype else None
    device = pick_device(knobs.device)
    model = Transformer.from_pretrained(directory, "fused", device, dtype, mtp=False, experts=cache)
    return directory, model, tokenizer, cache


def printer(tokenizer) -> Callable[[int, int], None]:
    """An `on_token` that prints row 0 as it is made, whole characters only."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character

    def show(row: int, token: int) -> None:
        if row == 0 and token not in tokenizer.stop_ids:
            print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    return show


def main(argv: list[str]) -> None:
    """Continue a prompt: the first sample streams, the others follow."""
    knobs = parse_flags(SampleConfig, argv, "Continue a text with a checkpoint.")
    if not knobs.prompt:
        raise UserError('the prompt is empty: python sample.py "Once upon a time"')
    directory, model, tokenizer, cache = load(knobs)
    prompt = os.fsencode(knobs.prompt).decode(errors="replace")  # bytes that are no UTF-8
    ids = encode_prompt(tokenizer, prompt, knobs.chat, knobs.thinking)
    lead = "" if knobs.chat else prompt
    started = time.perf_counter()
    print(lead, end="", flush=True)
    out = generate(model, [ids], num_samples=knobs.num_samples, max_new_tokens=knobs.max_new_tokens,
                   temperature=knobs.temperature, top_k=knobs.top_k, top_p=knobs.top_p,
                   stop_ids=tokenizer.stop_ids, seed=knobs.seed, on_token=printer(tokenizer))
    print()
    seconds = time.perf_counter() - started
    for row in range(1, knobs.num_samples):
        print(f"--- {row + 1}\n{lead}{tokenizer.decode(out.completion(row))}")
    made = int(out.mask.sum())
    if knobs.stats:
        print(cache.report(len(ids) + made), file=sys.stderr)
        expert_touch_figure("experts.png", cache.counts())
    device = model.lm_head.weight.device
    print(f"[{directory} on {device}: {made} tokens, {made / seconds:.3g} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
