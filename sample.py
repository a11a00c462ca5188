"""From a checkpoint to text: everything is one distribution and one draw.

`sample_tokens` is the draw, `Decoder` the step around it on the latent cache, `generate` the loop:
read the prompts, draw, write down, step. It is also the rollout engine of rl.py.

    python sample.py "Once upon a time"     continue a text with the newest checkpoint below out/
    python sample.py --chat "4-6+3="        ask a question in the template that rl.py trains on
    python sample.py --chat                 talk with it, its thoughts before your eyes
    python sample.py --serve                DeepSeek's API and a page at http://127.0.0.1:8000
"""

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data.io.checkpoint import load_config
from data.io.cli import Knobs, UserError, knob, parse_flags, pick_device, run_main, widest_float
from data.io.cores import spare_threads
from data.io.experts import ExpertCache, parse_size
from data.io.run import newest_run
from data.talk.console import Console
from data.talk.continuation import continue_text
from data.talk.engine import Engine
from data.talk.knobs import TalkKnobs, check_server
from data.talk.reply import budget_of, think_within
from data.text.tokenizer import Tokenizer, check_belongs, load_tokenizer
from kernels import at_least_float32
from model import Cache, Config, Transformer

MOVED = {"bench": "python -m tests.bench.draft (drafts) or python -m tests.bench.decode (one token)"}
COMPACT_BELOW = 0.75  # rows leave the batch, which copies the cache, when this share is still alive
LOOK_EVERY = {"cpu": 1, "cuda": 16, "mps": 16}  # steps until the host waits to see what was made


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
    softmax. Where a logit is NaN or +inf, the log-prob is NaN, and nothing waits for the device to
    say so.

    >>> draw = sample_tokens(torch.tensor([[0.25, 0.75]]).log(), 1.0, 0, 1.0, torch.tensor([0.3]))
    >>> draw.token.item(), round(draw.logp.exp().item(), 4)
    (1, 0.75)
    """
    peak = logits.amax(-1, keepdim=True)  # (n, 1)
    if temperature > 0:  # behind the subtraction a tiny temperature cannot overflow
        logits = truncate((logits - peak) / temperature, top_k, top_p)
    logps = logits.log_softmax(-1)  # (n, V)
    probs = logps.exp()
    token = invert_cdf(probs, noise) if temperature > 0 else logits.argmax(-1)  # (n,)
    logp = logps.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    information = -logps.clamp(min=torch.finfo(logps.dtype).min)  # (n, V), finite: 0 times it is 0
    return Draw(token, logp, (probs * information).sum(-1), logps > -math.inf)


def invert_cdf(probs: Tensor, noise: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds noise: probs (n, V), noise (n,) -> (n,).

    A token of probability 0 never comes; in float64, since the order of a float32 sum would show.
    """
    wide = widest_float(probs.device)
    cdf = probs.cumsum(-1, dtype=wide)  # (n, V)
    total = cdf[:, -1:].contiguous()  # (n, 1), 1 but for rounding
    token = torch.searchsorted(cdf, noise.to(wide).unsqueeze(1) * total, right=True)
    last = torch.searchsorted(cdf, total).clamp(max=probs.shape[1] - 1)  # NaN is above everything
    return torch.minimum(token, last).squeeze(1)


class Rows:
    """Base of what is kept of N rows: its tensors have a row for each, and columns or not."""

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}

    def rows(self, index: Tensor | slice, T: int | None = None):
        """The rows `index` in that order, cut to T columns."""
        return replace(self, **{name: x[index] if x.ndim == 1 else x[index, :T]
                                for name, x in self.tensors().items()})

    def cat(self, other):
        """The rows of both, the other's last; what has fewer columns is filled up with zeros."""
        theirs = other.tensors()

        def joined(*pair: Tensor) -> Tensor:
            wide = max(x.shape[1] for x in pair) if pair[0].ndim > 1 else 0
            return torch.cat([F.pad(x, (0, 0) * (x.ndim - 2) + (0, wide - x.shape[1])) if wide else x
                              for x in pair])

        return replace(self, **{name: joined(x, theirs[name]) for name, x in self.tensors().items()})


@dataclass
class Generation(Rows):
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
    depth: Tensor | None = None  # (N, T) int64, drafts of its pass that came true before it

    def completion(self, row: int) -> list[int]:
        """The sampled ids of one row, without the stop token."""
        end = self.lengths[row] - self.finished[row].long()
        return self.tokens[row, self.prompt_lengths[row] : end].tolist()

    def acceptance(self) -> list[float]:
        """Of the drafts at depth 1, 2, ... behind others that came true, the share that did, too."""
        column = torch.arange(self.tokens.shape[1], device=self.mask.device)
        has_drafts = self.mask & (column > self.prompt_lengths.unsqueeze(1))  # all but the first
        came = self.depth[has_drafts].bincount().tolist()  # tokens at each depth
        is_tried = has_drafts & (column + 1 < self.lengths.unsqueeze(1))  # behind the last: no token
        tried = self.depth[is_tried].bincount(minlength=len(came)).tolist()
        return [hits / max(1, drafts) for hits, drafts in zip(came[1:], tried)]


@dataclass
class Batch(Rows):
    """The rows that a Decoder has at present, n of them, and what their next step needs."""

    cache: Cache
    sampling: list[tuple[float, int, float]]  # (n,) temperature, top_k, top_p, on the host
    row: Tensor  # (n,) int64, of `Decoder.out`
    last: Tensor  # (n,) int64, the last position that it may fill
    noise: Tensor  # (n, > W) float32, the chance of the token at each position
    is_alive: Tensor  # (n,) bool, it has not ended
    logp: Tensor  # (n,) of all that was drawn: NaN as soon as a logit is
    made: Tensor  # (n, .) int64, each token drawn since the last look, plus 1; 0 is none
    h: Tensor | None = None  # (n, T, C), states of the T tokens of the last pass
    tokens: Tensor | None = None  # (n, T) int64, drawn behind each of them
    count: Tensor | None = None  # (n,) int64, how many of those stand

    @cached_property
    def ways(self) -> dict[tuple, Tensor]:
        """The rows that are drawn in each way, (.,) int64."""
        found = {way: [] for way in self.sampling}
        for place, way in enumerate(self.sampling):
            found[way].append(place)
        return {way: self.row.new_tensor(places) for way, places in found.items()}

    def select(self, places: list[int]) -> "Batch":
        """The rows at these places."""
        index = self.row.new_tensor(places)
        return replace(self.rows(index), cache=self.cache.select(index, self.cache.longest),
                       sampling=[self.sampling[i] for i in places])

    def cat(self, other: "Batch") -> "Batch":
        """The rows of both, the other's last."""
        return replace(super().cat(other), cache=self.cache.cat(other.cache),
                       sampling=self.sampling + other.sampling)


class Decoder:
    """Rows that are decoded together: they join between two steps and leave when they have ended.

    `admit` reads prompts and `step` gives every row its next tokens, both without a wait for the
    device; `look` waits, tells what was made, and lets go what has ended. It all stands in `out`,
    but for `mask` and `finished`; behind the longest text, W tokens, `out` has one column more,
    into which goes what is not to be kept. With `draft` see `generate`.
    """

    def __init__(self, model: Transformer, rows: int, width: int, stop_ids: Sequence[int] = (),
                 keep_routing: bool = False, keep_support: bool = False, draft: int = 0):
        if draft and not model.config.num_nextn_predict_layers:
            draft = 0
            print("draft: the model has no MTP module, it decodes without", file=sys.stderr)
        self.model, self.width, self.draft = model, width, draft
        self.batch: Batch | None = None
        self.blank = _blank(model, width + 1, stop_ids, keep_routing, keep_support, draft > 0)
        self.out = self.blank.rows(self.blank.lengths.new_zeros(rows))
        self.stops = self.blank.lengths.new_tensor(list(stop_ids))
        self.behind = torch.arange(1, draft + 2, device=self.stops.device)

    @torch.no_grad()
    def admit(self, prompts: Sequence[Sequence[int]], rows: Sequence[int], limits: Sequence[int],
              noise: Tensor, *sampling) -> None:
        """Read prompts, each once for its share of `rows`, and draw the token behind each row.

        rows: free ones of `out`, as many for each prompt; limits: the lengths at which they end;
        noise (n, steps): their chance; sampling: temperature, top_k, top_p.
        """
        out, device = self.out, self.stops.device
        is_prompt, tokens, h, cache, routings = self._prefill(prompts)
        source = torch.arange(len(prompts), device=device).repeat_interleave(len(rows) // len(prompts))
        if len(rows) > len(prompts):
            cache = cache.select(source, cache.longest)
        row, lengths = torch.tensor(rows, device=device), is_prompt.sum(1)[source]  # (n,)
        for name, empty in self.blank.tensors().items():
            getattr(out, name)[row] = empty
        out.prompt_lengths[row] = lengths
        out.tokens[row, : tokens.shape[1]] = tokens[source]
        for layer, routing in enumerate(routings if out.routing is not None else ()):
            read = routing.topk_idx.where(is_prompt.unsqueeze(-1), self.blank.routing[0, 0, layer])
            out.routing[row, : tokens.shape[1], layer] = read[source]
        place = lengths.unsqueeze(1) + torch.arange(noise.shape[1], device=device)  # (n, steps)
        chance = torch.zeros(len(row), self.width + noise.shape[1] + self.draft, device=device)
        new = Batch(cache, [sampling] * len(row), row, torch.tensor(limits, device=device) - 1,
                    noise=chance.scatter(1, place, noise.to(device)), is_alive=row >= 0,
                    logp=chance[:, 0], made=row.new_empty(len(row), 0))
        self._draw(new, h[source, lengths - 1].unsqueeze(1), tokens[source, lengths - 1].unsqueeze(1))
        self.batch = self.batch.cat(new) if self.batch else new

    def _prefill(self, prompts):
        """Where Q padded prompts are no padding, (Q, T), their tokens, states (Q, T, C), cache, experts.

        Padding stands right of a prompt, so no token of it sees any, and decoding overwrites it.
        """
        pad, longest = self.blank.tokens[0, 0], max(map(len, prompts))
        padded = [[*prompt, *[-1] * (longest - len(prompt))] for prompt in prompts]
        tokens = self.stops.new_tensor(padded)  # (Q, T)
        is_prompt = tokens >= 0
        tokens = tokens.where(is_prompt, pad)
        cache = self.model.new_cache(len(prompts), self.width + self.draft, modules=min(self.draft, 1))
        h, routings = self.model.trunk(tokens, cache)  # (Q, T, C)
        if self.draft and longest > 1:
            self._module(cache, h[:, :-1], tokens[:, 1:])
        cache.advance(is_prompt.sum(1) - 1, longest - 1)  # `_draw` counts the one behind which it draws
        return is_prompt, tokens, h, cache, routings

    @torch.no_grad()
    def step(self) -> None:
        """Read the last token of every row, with drafts behind it, and draw what follows."""
        tokens = self._with_drafts(self.batch) if self.draft else self.batch.tokens  # (n, T)
        h, routings = self.model.trunk(tokens, self.batch.cache)  # (n, T, C)
        self._draw(self.batch, h, tokens, routings)

    def _draw(self, batch: Batch, h: Tensor, tokens: Tensor, routings=()) -> None:
        """What comes behind tokens (n, T), with the states h (n, T, C), goes into `out`.

        All but the first of these are drafts. What is drawn behind them stands if they are what was
        drawn in their place, and did not end the row.
        """
        out, row, T = self.out, batch.row.unsqueeze(1), h.shape[1]
        place = batch.cache.length.unsqueeze(1) + self.behind[:T]  # (n, T)
        draw = self._sample(batch, h, place)
        is_end = torch.isin(draw.token, self.stops) | (place >= batch.last.unsqueeze(1))  # (n, T)
        stands = batch.is_alive.unsqueeze(1)  # (n, T) in the end
        if T > 1:
            goes_on = (draw.token[:, :-1] == tokens[:, 1:]) & ~is_end[:, :-1]  # (n, T-1)
            stands = torch.cat((stands, goes_on), 1).cumprod(1).bool()
        column = place.where(stands, self.width)
        out.tokens[row, column] = draw.token
        out.logps[row, column] = draw.logp
        out.entropy[row, column] = draw.entropy
        if out.support is not None:
            out.support[row, column] = draw.support
        if out.depth is not None:
            out.depth[row, column] = torch.arange(T, device=h.device)
        for layer, routing in enumerate(routings if out.routing is not None else ()):
            out.routing[row, (place - 1).where(stands, self.width), layer] = routing.topk_idx
        batch.h, batch.tokens, batch.count = h, draw.token, stands.sum(1)
        batch.made = torch.cat((batch.made, (draw.token + 1) * stands), 1)
        batch.logp = batch.logp + draw.logp.sum(1)
        batch.is_alive = batch.is_alive & ~(is_end & stands).any(1)
        batch.cache.advance(batch.count, min(batch.cache.longest + T, self.width - 1))

    def _sample(self, batch: Batch, h: Tensor, place: Tensor) -> Draw:
        """A draw behind each of the states h (n, T, C), with the chance of its `place` (n, T)."""
        logits = self.model.lm_head(h.flatten(0, 1)).to(at_least_float32(h.dtype))  # (n*T, V)
        noise = batch.noise.gather(1, place).flatten()  # (n*T,)
        if len(batch.ways) == 1:
            draw = sample_tokens(logits, *batch.sampling[0], noise)
        else:  # those that are drawn in one way together
            index = torch.arange(len(noise), device=h.device).view_as(place)  # (n, T)
            parts = [index[rows].flatten() for rows in batch.ways.values()]
            draws = [sample_tokens(logits[part], *way, noise[part]) for way, part in zip(batch.ways, parts)]
            back = torch.cat(parts).argsort()  # (n*T,)
            draw = Draw(*(torch.cat(each)[back] for each in zip(*draws)))
        return Draw(*(each.unflatten(0, place.shape) for each in draw))

    def _with_drafts(self, batch: Batch) -> Tensor:
        """The last token of each row, and what the first MTP module expects behind it: (n, T).

        First it reads the last pass again: the states are the model's now, and the tokens those
        drawn. To look further it takes its own state for the model's that is not there yet.
        """
        cache, longest = batch.cache, batch.cache.longest
        latest = (batch.count - 1).clamp(min=0).unsqueeze(1)  # (n, 1), in the last pass
        tokens = [batch.tokens.gather(1, latest)]  # (n, 1)
        cache.advance(-batch.count, longest)
        h = self._module(cache, batch.h, batch.tokens)  # (n, T, C)
        cache.advance(batch.count, longest)
        h = h.gather(1, latest.unsqueeze(-1).expand(-1, -1, h.shape[-1]))  # (n, 1, C)
        for depth in range(self.draft):
            if depth > 0:
                h = self._module(cache, h, tokens[-1])
                cache.advance(1)
            place = cache.length.unsqueeze(1) + 1  # (n, 1)
            tokens.append(self._sample(batch, h, place).token)
        cache.advance(1 - self.draft)
        return torch.cat(tokens, 1)

    def _module(self, cache: Cache, h: Tensor, tokens: Tensor) -> Tensor:
        """States (n, T, C) of the first MTP module, from states h and the tokens (n, T) behind them."""
        model = self.model
        module = model.model.layers[model.config.num_hidden_layers]
        ahead = model.model.embed_tokens(tokens).to(h.dtype)  # (n, T, C)
        return module(h, ahead, *model.freqs_and_mask(tokens, cache), cache)[0]

    def look(self) -> Iterator[tuple[int, list[int], bool]]:
        """Row of `out`, its tokens since the last look, whether it has ended; rows without are left out.

        The one wait for the device. Raises UserError when a logit was NaN or infinite.
        """
        batch = self.batch
        state = torch.stack((batch.row, batch.is_alive, batch.logp.isnan(), batch.cache.length), 1)
        found = torch.cat((state, batch.made), 1).tolist()  # (n, 4 + made)
        if any(is_nan for _, _, is_nan, *_ in found):
            raise UserError("sampling: the model's logits are not finite: the training run behind it diverged")
        batch.made = batch.made[:, :0]
        batch.cache.longest = max(length for _, _, _, length, *_ in found)
        left = [i for i, (_, is_alive, *_) in enumerate(found) if is_alive]
        if len(left) < len(found):
            self.out.lengths[batch.row] = batch.cache.length + 1
        if len(left) <= COMPACT_BELOW * len(found):
            self.batch = batch.select(left) if left else None
        return ((row, [token - 1 for token in made if token], not is_alive)
                for row, is_alive, _, _, *made in found if any(made))

    def drop(self, rows: set[int]) -> None:
        """Rows of `out` leave the batch unfinished."""
        left = [i for i, row in enumerate(self.batch.row.tolist()) if row not in rows]
        self.batch = self.batch.select(left) if left else None


@torch.no_grad()
def generate(model: Transformer, prompts: Sequence[Sequence[int]], *, num_samples: int = 1,
             max_new_tokens: int = 256, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             stop_ids: Sequence[int] = (), seed: int | Sequence[int] | None = None,
             keep_routing: bool = False, keep_sampling_mask: bool = False, draft: int = 0,
             on_token: Callable[[int, int], None] | None = None) -> Generation:
    """Sample `num_samples` completions of each prompt, all in one batch.

    Every prompt is read once; its latents are then repeated for its samples. A row ends at a stop
    id, after `max_new_tokens`, or at max_position_embeddings, and soon leaves the batch.
    `on_token(row, id)` is called as tokens are made, which costs a wait for the device each time.
    The chance of a row depends on its prompt's seed alone: an int gives each prompt its own, a
    sequence has one per prompt (so that ranks that share the prompts draw what one process would),
    None is different each time. Raises UserError for requests that cannot be met, and when the
    model's logits are not finite.

    With `draft` the first MTP module guesses so many tokens ahead, with the noise that will be
    theirs, and one pass of the model reads them all (speculative decoding; V3 section 5.4.3). A
    guess is right if the model draws the same token from the same noise, so that no text changes,
    greedy or sampled (but where rounding decides between two tokens). Sharing the noise gives
    something away: it keeps `sum_v |P_v & Q_v|`, the overlap of both intervals of each token on
    the line of the noise, against at most `sum_v min(p_v, q_v)` by the best coupling, whose text
    would depend on the drafts. `python -m tests.bench.draft` prints both.
    """
    SamplingKnobs(num_samples, max_new_tokens, temperature, top_k, top_p, draft)
    check_prompts(model.config, prompts, stop_ids)
    context = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, context)
    limits = [min(len(prompt) + max_new_tokens, context)
              for prompt in prompts for _ in range(num_samples)]
    noise = draw_noise(seed, len(prompts), num_samples, max_new_tokens)  # (N, steps)
    decoder = Decoder(model, len(limits), max(limits), stop_ids, keep_routing, keep_sampling_mask, draft)
    look_every = 1 if on_token else LOOK_EVERY[decoder.stops.device.type]
    with evaluating(model):
        decoder.admit(prompts, range(len(limits)), limits, noise, temperature, top_k, top_p)
        while decoder.batch:
            if decoder.batch.made.shape[1] >= look_every:
                made = decoder.look()
                for row, tokens, _ in made if on_token else ():
                    for token in tokens:
                        on_token(row, token)
            if decoder.batch:
                decoder.step()
    out = decoder.out.rows(slice(None), int(decoder.out.lengths.max()))
    column, end = torch.arange(out.tokens.shape[1], device=out.tokens.device), out.lengths.unsqueeze(1)
    is_last_a_stop = torch.isin(out.tokens.gather(1, end - 1).squeeze(1), decoder.stops)  # (N,)
    mask = (column >= out.prompt_lengths.unsqueeze(1)) & (column < end)  # (N, T)
    return replace(out, mask=mask, finished=is_last_a_stop)


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


def _blank(model, width: int, stop_ids, keep_routing, keep_support, keep_depth) -> Generation:
    """One row of nothing but padding."""
    config, device = model.config, model.lm_head.weight.device
    pad = stop_ids[0] if len(stop_ids) else config.eos_token_id
    tokens = torch.full((1, width), pad, device=device)
    none = torch.zeros(1, dtype=torch.int64, device=device)
    zeros = torch.zeros_like(tokens, dtype=at_least_float32(model.compute_dtype))
    layers = sum(map(config.is_moe, range(config.num_hidden_layers)))
    experts = torch.arange(config.num_experts_per_tok, device=device)  # (K,)
    everything = torch.ones(config.vocab_size, dtype=torch.bool, device=device)  # (V,)
    return Generation(tokens, zeros.bool(), none, none, zeros, zeros, finished=none.bool(),
                      routing=experts.repeat(1, width, layers, 1) if keep_routing else None,
                      support=everything.repeat(1, width, 1) if keep_support else None,
                      depth=torch.zeros_like(tokens) if keep_depth else None)


@dataclass
class SamplingKnobs(Knobs):
    """What can be asked of `generate`."""

    num_samples: int = knob(1, "number of continuations", least=1)
    max_new_tokens: int = knob(200, "most tokens to make", least=1)
    temperature: float = knob(0.8, "above 1 flattens the distribution; 0 is greedy", least=0)
    top_k: int = knob(0, "only the k likeliest tokens; 0 is all", least=0)
    top_p: float = knob(0.95, "only the likeliest that hold this probability; 1 is all", above=0, most=1)
    draft: int = knob(0, "tokens that the MTP module guesses ahead: the same text, perhaps sooner", least=0)


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
class SampleConfig(SamplingKnobs, TalkKnobs):
    """The knobs of `python sample.py`."""

    checkpoint: str | None = knob(None, "directory with config.json and weights [the newest below out/]")
    seed: int = knob(0, "the same seed gives the same text")
    device: str = knob("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str | None = knob(None, "of weights and activations [the file's]",
                             choices=("float32", "bfloat16", "float16"))
    experts: str = knob("memory", "where routed experts are: of a disk, only those chosen are read",
                        choices=("memory", "disk"))
    expert_cache: str = knob("8GB", "with --experts disk: how much of them memory holds")
    stats: bool = knob(False, "with --experts disk: print what was read, draw experts.png")

    def rules(self):
        yield from TalkKnobs.rules(self)
        is_one_text = bool(self.prompt) and self.votes == 1 and self.budget is None
        yield from self.only("--experts disk", self.experts == "disk", "expert_cache", "stats")
        yield from self.only("no --serve: each request has its own", not self.serve,
                             "max_new_tokens", "seed")
        yield from self.only("a prompt, without --votes and --budget", is_one_text,
                             "num_samples", "stats")
        yield "budget", "less than max_new_tokens", (self.budget or 0) < self.max_new_tokens


def load(knobs: SampleConfig) -> tuple[Path, Transformer, Tokenizer, ExpertCache | None]:
    """What is sampled from. Whether tokenizer and model fit is seen before weights are read."""
    directory = Path(knobs.checkpoint) if knobs.checkpoint else newest_run()
    config, tokenizer = load_config(directory, Config), load_tokenizer(directory)
    check_belongs(tokenizer, config)
    cache = ExpertCache(parse_size(knobs.expert_cache)) if knobs.experts == "disk" else None
    dtype = getattr(torch, knobs.dtype) if knobs.dtype else None
    device = pick_device(knobs.device)
    model = Transformer.from_pretrained(directory, "fused", device, dtype, mtp=knobs.draft > 0, experts=cache)
    spare_threads(sum(parameter.numel() for parameter in model.parameters()), device)
    return directory, model, tokenizer, cache


def main(argv: list[str]) -> None:
    """Continue a prompt, talk, or serve."""
    knobs = parse_flags(SampleConfig, argv, "Continue a text with a checkpoint.", moved=MOVED)
    if not (knobs.prompt or knobs.chat or knobs.serve):
        raise UserError('the prompt is empty: python sample.py "Once upon a time"; --chat without one talks')
    if knobs.serve:
        check_server(knobs)
    directory, model, tokenizer, cache = load(knobs)
    talker = partial(answer, model, tokenizer)
    where = f"{directory} on {model.lm_head.weight.device}"
    if knobs.serve:
        service_of(knobs, directory, model, tokenizer).run()
    elif not knobs.prompt:
        Console(knobs, tokenizer, talker).run(f"{where}; /help lists what there is")
    elif knobs.votes > 1 or knobs.budget is not None:
        Console(replace(knobs, prompt=""), tokenizer, talker).turn(knobs.prompt)
    else:
        continue_text(knobs, tokenizer, talker, where, cache)


def answer(model: Transformer, tokenizer: Tokenizer, prompt: list[int], on_token,
           knobs: SampleConfig) -> Generation | list[list[int]]:
    """`votes` answers or `num_samples` continuations, with thoughts within the budget."""
    budget = budget_of(tokenizer, knobs.budget)
    complete = generate if budget is None else partial(think_within, generate, budget=budget)
    rows = max(knobs.votes, knobs.num_samples)  # one of them is 1
    return complete(model, [prompt], num_samples=rows, max_new_tokens=knobs.max_new_tokens,
                    temperature=knobs.temperature, top_k=knobs.top_k, top_p=knobs.top_p,
                    stop_ids=tokenizer.stop_ids, seed=knobs.seed, draft=knobs.draft, on_token=on_token)


def service_of(knobs: SampleConfig, directory: Path, model: Transformer, tokenizer: Tokenizer):
    """The engine as data/talk/serve.py offers it, for which `check_server` has looked."""
    from data.talk.serve import Service
    width = min(knobs.longest, model.config.max_position_embeddings)
    decoder = Decoder(model.eval(), knobs.rows, width, tokenizer.stop_ids, draft=knobs.draft)
    engine = Engine(decoder, knobs.rows, knobs.queue)
    noise_of = partial(draw_noise, prompts=1)
    return Service(directory.resolve().name, tokenizer, engine, noise_of, width, knobs)


if __name__ == "__main__":
    run_main(main)
