"""What a model costs, from its configuration and the shapes of its tensors; nothing is built here."""

import os
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor

from data.io.checkpoint import mtp_prefixes
from data.io.cli import Knobs, UserError, knob


@dataclass
class PortraitConfig(Knobs):
    """The knobs of `python model.py`."""

    name: str = knob("tiny", "a preset or a checkpoint directory", positional=True)
    ranks: int = knob(0, "print what training costs each of so many processes instead", least=0)
    expert_parallel: int = knob(1, "of which so many share the experts of a layer", least=1)

    def rules(self):
        yield "expert_parallel", f"a divisor of ranks = {self.ranks}", self.ranks % self.expert_parallel == 0


def parameter_counts(state: dict[str, Tensor], config: dict) -> dict[str, int]:
    """Parameters by the hub's convention: the routing bias counts, copies inside MTP modules do not.

    state: of the model, on the meta device for one that fits in no memory. Keys: `main` (without
    MTP), `experts` (of these the routed ones), `mtp`, `total`, `embedding`, `active` (used per token,
    without the input embedding, which is a lookup, but with the head; MTP not included).
    """
    size = {name: tensor.numel() for name, tensor in state.items()}
    extra = mtp_prefixes(config["num_hidden_layers"], config["num_nextn_predict_layers"])
    mtp = sum(n for name, n in size.items() if name.startswith(extra))
    experts = sum(n for name, n in size.items()
                  if ".experts." in name and not name.startswith(extra))
    total, embedding = sum(size.values()), size["model.embed_tokens.weight"]
    E, K = config["n_routed_experts"], config["num_experts_per_tok"]
    active = total - mtp - embedding - experts * (E - K) // E
    return {"main": total - mtp, "experts": experts, "mtp": mtp, "total": total, "embedding": embedding,
            "active": active}


def cache_numbers(config: dict) -> dict[str, int]:
    """Numbers cached per token: MLA, and what GQA (8 groups at most) and MHA of these heads need."""
    L, H = config["num_hidden_layers"], config["num_attention_heads"]
    D, groups = config["qk_nope_head_dim"], max(1, min(8, H // 2))
    return {"MLA": (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * L,
            f"GQA, {groups} groups": 2 * groups * D * L, "MHA": 2 * H * D * L}


def portrait(name: str, config: dict, state: dict[str, Tensor], flops: float, stored: str = "") -> str:
    """The printed self-portrait: tensors with shapes, parameters, FLOPs, cache, memory.

    flops: per token, in a text of 4096 tokens or of the whole context where that is shorter.
    stored: of a checkpoint, how its weights are quantised.
    """
    counts = parameter_counts(state, config)
    L, T = config["num_hidden_layers"], min(4096, config["max_position_embeddings"])
    lines = [f"{name}: {L} layers, {config['n_routed_experts']} experts, "
             f"{config['num_experts_per_tok']} per token", "",
             f"{'tensor':58}{'shape':>22}{'parameters':>18}"]
    shown = {0, config["first_k_dense_replace"], L}  # one layer of each kind
    for key, tensor in state.items():
        layer = key.split(".")[2] if ".layers." in key else None
        if layer is None or int(layer) in shown:
            lines.append(f"{key:58}{str(tuple(tensor.shape)):>22}{tensor.numel():>18,}")
    lines += [
        "",
        f"parameters            {counts['main']:,}  (main model, routing bias counted)",
        f"  MTP modules         {counts['mtp']:,}  (more, without their copies of embedding and head)",
        f"  active per token    {counts['active']:,}  (head counted, input embedding not, MTP not)",
        f"FLOPs per token       {si(flops)}FLOP  (forward + backward, T = {T}, causal)",
    ]
    for kind, numbers in cache_numbers(config).items():
        lines.append(f"cache per token       {2 * numbers:,} bytes in bf16 with {kind}")
    lines.append(f"memory to run         {si(2 * counts['main'])}B in bf16  (with --experts disk "
                 f"{si(2 * (counts['main'] - counts['experts']))}B and the cache; activations come on top)")
    lines.append(f"memory to train       {si(16 * counts['total'])}B  (float32 weight, gradient, "
                 "two AdamW moments; activations come on top)")
    lines += [f"quantisation          {stored}"] * bool(stored)
    return "\n".join(lines)


def shared_out(name: str, config: dict, state: dict[str, Tensor], ranks: int, expert_parallel: int) -> str:
    """What training costs each of so many ranks, on paper (see data/io/ranks.py); activations come on top.

    Weights, gradients and moments are split over all ranks. A block is gathered in float32 while it runs, and the
    next one on its way; of its experts a rank gathers those that it shares out with the ranks of its kind. Each
    pair (token, expert) crosses four times in bf16: there, back, and the gradients of both.
    """
    C, K = config["hidden_size"], config["num_experts_per_tok"]
    total = sum(tensor.numel() for tensor in state.values())
    experts, rest = Counter(), Counter()  # layer -> parameters of its routed experts, and of all else
    for key, tensor in state.items():
        if ".layers." in key:
            (experts if ".experts." in key else rest)[key.split(".")[2]] += tensor.numel()
    block, plain = (max(rest[layer] + experts[layer] // parts for layer in rest) for parts in (expert_parallel, 1))
    sent = 4 * 2 * C * K * len(experts) * (expert_parallel - 1) / expert_parallel
    lines = [
        f"{name} on {ranks:,} ranks, the experts of a layer on {expert_parallel} of them",
        f"states per rank       {si(16 * total / ranks)}B  ({si(total)} parameters: weight, gradient, 2 moments)",
        f"gathered per rank     {si(2 * 4 * block)}B  (two blocks in float32)"]
    if expert_parallel > 1:
        lines += [f"  without experts'    {si(2 * 4 * plain)}B  (--expert_parallel 1)",
                  f"all-to-all per token  {si(sent)}B  ({len(experts)} layers x {K} experts x {C} numbers, four times)"]
    return "\n".join(lines)


def si(value: float) -> str:
    """Three digits and the unit's prefix.

    >>> si(70_272), si(2.5e11) + "FLOP", si(999_700)
    ('70.3 K', '250 GFLOP', '1 M')
    """
    for prefix in ("", "K", "M", "G", "T", "P", "E", "Z"):
        if value < 999.5:  # three digits of more are 1000
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Y"


def parameters_on_paper(config: dict) -> int:
    """The number of parameters by a formula, without a single tensor (V2 section 2.1, V3 section 2.1).

    config: the fields of model.Config. Equal to the `total` of `parameter_counts`.
    """
    c = SimpleNamespace(**config)
    C, H, R, P = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    q_width, kv_width, o_width = (H * (c.qk_nope_head_dim + P), H * (c.qk_nope_head_dim + c.v_head_dim),
                                  H * c.v_head_dim)
    queries = C * q_width if c.q_lora_rank is None else c.q_lora_rank * (C + 1 + q_width)
    attention = queries + C * (R + P) + R + R * kv_width + o_width * C + 2 * C  # with the block's norms
    if c.attention_bias:
        attention += (R + P) + C + (c.q_lora_rank or 0)
    bias = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    experts = 3 * C * c.moe_intermediate_size * (c.n_routed_experts + c.n_shared_experts)
    moe = experts + C * c.n_routed_experts + bias
    dense = min(c.first_k_dense_replace, c.num_hidden_layers)
    main = (2 * c.vocab_size * C + C + c.num_hidden_layers * attention
            + dense * 3 * C * c.intermediate_size + (c.num_hidden_layers - dense) * moe)
    return main + c.num_nextn_predict_layers * (attention + moe + 2 * C * C + 3 * C)


def check_memory(config: dict, bytes_each: int = 4, expert_cache: int | None = None, copies: int = 1) -> None:
    """Raises UserError when weights of these sizes are more than this machine's memory.

    expert_cache: routed experts stay on disk but for so many bytes; copies: processes that hold the whole model.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return
    wanted, hint = copies * bytes_each * parameters_on_paper(config), "a smaller preset, or other sizes"
    if expert_cache is None:
        hint += "; of a checkpoint, sample.py --experts disk leaves experts where they are"
    else:
        c = SimpleNamespace(**config)
        layers = max(0, c.num_hidden_layers - c.first_k_dense_replace) + c.num_nextn_predict_layers
        experts = 3 * c.hidden_size * c.moe_intermediate_size * c.n_routed_experts * layers
        wanted -= max(0, bytes_each * experts - expert_cache)
        hint = "a smaller --expert_cache"
    if copies > 1:
        hint = "--processes 1, or a smaller preset"
    if wanted > memory:
        times = f", {copies} times," if copies > 1 else ""
        raise UserError(f"config: its weights{times} are {si(wanted)}B, this machine has {si(memory)}B: {hint}")
