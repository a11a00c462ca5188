"""What drafts by the MTP module are worth: how many come true, and how much sooner a text is there.

python -m tests.bench.draft [--checkpoint out/base] [--draft 1 2 3] [--batch 1 8 64] [--context 128]
"""

import itertools
import random
import time
import warnings
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from data.io.cli import Knobs, UserError, knob, parse_flags, pick_device, run_main
from data.io.run import newest_run
from data.tasks.task import prompt_text
from data.text.corpus import local_documents
from data.text.tokenizer import load_tokenizer
from model import Transformer
from sample import Generation, evaluating, generate
from tests.bench.kernels import seconds


@dataclass
class DraftConfig(Knobs):
    """What is measured."""

    checkpoint: str | None = knob(None, "directory with config.json and weights [the newest below out/]")
    draft: list[int] = knob([1, 2, 3], "depths that are tried", least=1)
    batch: list[int] = knob([1, 8, 64], "rows that are decoded at once", least=1)
    context: list[int] = knob([128, 1024], "tokens of prompt and answer together", least=16)
    max_new_tokens: int = knob(64, "tokens of an answer", least=8)
    temperature: float = knob(1.0, "of the distribution", least=0)
    rounds: int = knob(5, "runs of each, in turn, whose median counts", least=1)
    device: str = knob("auto", "auto, cpu, cuda or mps")


def prompts_of(tokenizer, config: DraftConfig) -> dict[str, list[list[int]]]:
    """64 texts of every domain of the embedded corpus, cut to 24 tokens, and problems in the template."""
    cut = {}
    for domain, documents in local_documents("", 1, log=lambda line: None).items():
        taken = [text for _, text in itertools.islice(documents, 64)]
        cut[domain] = [tokenizer.encode_trusted(text)[:24] for text in taken]
    rng = random.Random(0)
    sums = [f"{rng.randrange(1, 10)}-{rng.randrange(1, 10)}+{rng.randrange(1, 10)}*2=" for _ in range(64)]
    return cut | {"problems": [tokenizer.encode_trusted(prompt_text(text)) for text in sums]}


@torch.no_grad()
def coupled(model: Transformer, out: Generation, temperature: float) -> dict[str, float]:
    """Share of first drafts that come true, computed from both distributions over the whole text.

    shared: `sum_v |P_v & Q_v|`, the intervals of v on the line of the noise; best: `sum_v min(p_v, q_v)`.
    """
    h, _ = model.trunk(out.tokens)  # (N, T, C)
    module = model.model.layers[model.config.num_hidden_layers]
    behind = out.tokens[:, 1:]  # (N, T-1)
    g, _ = module(h[:, :-1], model.model.embed_tokens(behind), *model.freqs_and_mask(behind))
    scale = max(temperature, 1e-6)
    p = (model.lm_head(h[:, 1:-1]).double() / scale).softmax(-1)  # (N, T-2, V), of token i + 2
    q = (model.lm_head(g[:, :-1]).double() / scale).softmax(-1)
    P, Q = p.cumsum(-1), q.cumsum(-1)
    overlap = torch.minimum(P, Q) - torch.maximum(P - p, Q - q)
    column = torch.arange(out.tokens.shape[1], device=out.tokens.device)
    is_drafted = (out.mask & (column > out.prompt_lengths.unsqueeze(1)))[:, 2:]
    shares = {"shared": overlap.clamp(min=0).sum(-1), "best": torch.minimum(p, q).sum(-1)}
    return {name: float(share[is_drafted].mean()) for name, share in shares.items()}


def show_acceptance(model: Transformer, tokenizer, config: DraftConfig) -> None:
    """A row for every domain: both couplings in theory, and what comes true depth by depth."""
    depth = max(config.draft)
    print(f"{'domain':12}{'best coupling':>14}{'shared noise':>14}   measured, depth 1 to {depth}")
    for domain, prompts in prompts_of(tokenizer, config).items():
        out = generate(model, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                       stop_ids=[tokenizer.eos_id], seed=0, draft=depth)
        found = coupled(model, out, config.temperature)
        shares = " ".join(f"{share:6.3f}" for share in out.acceptance())
        print(f"{domain:12}{found['best']:14.3f}{found['shared']:14.3f}   {shares}", flush=True)


def bandwidth(device: torch.device) -> float:
    """Bytes/s at which this machine reads memory, by a sum over 512 MB."""
    block = torch.zeros(1 << 27, device=device)
    return block.nbytes / seconds(lambda: block.sum())


def bytes_of_pass(model: Transformer, rows: int, tokens: int, length: int, has_draft: bool) -> float:
    """Bytes that a pass over `tokens` of each row reads: weights, of the experts those asked, and latents."""
    config, total = model.config, 0.0
    layers = config.num_hidden_layers + has_draft
    asked = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** (rows * tokens)
    for name, weight in model.named_parameters():
        is_beyond = name.startswith("model.layers.") and int(name.split(".")[2]) >= layers
        if not is_beyond and "embed_tokens" not in name:
            times = 2 if has_draft and "lm_head" in name else 1
            total += weight.nbytes * times * (asked if weight.ndim == 3 else 1)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return total + rows * length * layers * width * model.compute_dtype.itemsize


def show_speed(model: Transformer, tokenizer, config: DraftConfig) -> None:
    """Tokens/s without and with drafts, in turn, for each batch: problems to their end, then stories.

    Of stories the prompt fills the context but for the answer, which goes on over their ends.
    """
    device = model.lm_head.weight.device
    fastest = bandwidth(device)
    print(f"\nmemory is read at {fastest / 1e9:.1f} GB/s\n{'batch':>5}{'context':>8}{'draft':>6}"
          f"{'tokens/s':>10}{'speed-up':>9}{'tokens a pass':>14}{'kB a token':>11}{'% of bandwidth':>15}")
    problems = prompts_of(tokenizer, config)["problems"]
    stories = itertools.islice(local_documents("", 1, log=lambda line: None)["stories"], 400)
    endless = list(itertools.chain(*(tokenizer.encode_trusted(text) for _, text in stories)))
    for batch, context in itertools.product(config.batch, (0, *config.context)):
        lead = min(context, model.config.max_position_embeddings) - config.max_new_tokens
        prompts = [endless[300 * i :][: max(1, lead)] for i in range(batch)]
        if context == 0:
            prompts = [problems[i % len(problems)] for i in range(batch)]
        stop_ids = [] if context else [tokenizer.eos_id]
        times = {draft: [] for draft in (0, *config.draft)}
        for _, draft in itertools.product(range(config.rounds + 1), times):  # the first warms up
            start = time.perf_counter()
            out = generate(model, prompts, max_new_tokens=config.max_new_tokens, seed=0, draft=draft,
                           stop_ids=stop_ids, temperature=config.temperature)
            int(out.lengths.max())
            first = time.perf_counter()
            generate(model, prompts, max_new_tokens=1, seed=0, draft=draft, temperature=config.temperature)
            took = first - start - (time.perf_counter() - first)  # without the prompt
            times[draft].append((max(took, 1e-9), out))
        plain = None
        for draft, found in times.items():
            took, out = sorted(found[1:], key=lambda pair: pair[0])[len(found[1:]) // 2]
            made = int(out.mask.sum()) - batch
            passes = made if draft == 0 else int((out.mask & (out.depth == 0)).sum()) - batch
            plain = plain or took
            length = context or int(out.lengths.max())
            read = bytes_of_pass(model, batch, 1 + draft, length, draft > 0) / (batch * made / passes)
            print(f"{batch:5}{context or 'problem':>8}{draft:6}{made / took:10.0f}{plain / took:9.2f}{made / passes:14.2f}"
                  f"{read / 1e3:11.0f}{100 * read * made / took / fastest:15.1f}", flush=True)


def show_transformers(directory: Path, tokenizer, model: Transformer, config: DraftConfig) -> None:
    """One greedy text by transformers, without and with its own `use_mtp`, beside ours."""
    if not find_spec("transformers"):
        print("transformers is not installed: pip install transformers compares with it")
        return
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    module = model.config.num_hidden_layers  # it finds the weights of layer 61 alone
    other._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{module}\..*"]
    prompt, new = prompts_of(tokenizer, config)["stories"][0], config.max_new_tokens
    texts = {}

    def ours(tokens: int, draft: int):
        texts["ours", draft] = generate(model, [prompt], max_new_tokens=tokens, temperature=0, draft=draft).tokens[0]

    def theirs(tokens: int, draft: int):
        given, more = torch.tensor([prompt]), {"use_mtp": True} if draft else {}
        texts["theirs", draft] = other.generate(given, max_new_tokens=tokens, min_new_tokens=tokens,
                                                do_sample=False, **more)[0]

    print(f"\none greedy text of {new} tokens, without its prompt and what is loaded first")
    for (name, make), draft in itertools.product({"ours": ours, "theirs": theirs}.items(), (0, 1)):
        took = seconds(partial(make, new, draft)) - seconds(partial(make, 2, draft))
        who = "plainseek" if name == "ours" else "transformers"
        print(f"  {who:14}draft {draft}{(new - 2) / took:10.0f} tokens/s")
    same = {tuple(text.tolist()) for text in texts.values()}
    print("  all four texts are the same" if len(same) == 1 else f"  {len(same)} different texts")


def main(argv: list[str]) -> None:
    """Acceptance by domain, speed by batch and context, and transformers' speed."""
    config = parse_flags(DraftConfig, argv, __doc__)
    directory = Path(config.checkpoint) if config.checkpoint else newest_run()
    model = Transformer.from_pretrained(directory, device=pick_device(config.device))
    if not model.config.num_nextn_predict_layers:
        raise UserError(f"{directory}: it has no MTP module, so there is nothing to draft with")
    tokenizer = load_tokenizer(directory)
    print(f"{directory}, {torch.get_num_threads()} threads, temperature {config.temperature}")
    with evaluating(model):
        show_acceptance(model, tokenizer, config)
        show_speed(model, tokenizer, config)
    show_transformers(directory, tokenizer, model, config)


if __name__ == "__main__":
    run_main(main)
