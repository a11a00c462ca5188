"""The architecture as one picture, drawn from the model's own modules: data/pictures/architecture.png.

    python -m tests.architecture

Every box names a module of `Transformer` or a function, which must exist; what is cached is blue, the bias is orange.
"""

from dataclasses import asdict
from pkgutil import resolve_name

import torch

from data.io.architecture import Arrow, Box, Panel, draw
from data.io.cli import UserError, run_main
from data.io.portrait import cache_numbers
from model import Config, Transformer
from tests.links import ROOT

PICTURE = ROOT / "data" / "pictures" / "architecture.png"
MODEL = "model"  # where functions are named without their module


class Diagram:
    """Boxes and arrows; each name is looked up in the model before it is drawn. Raises UserError for one that is not there."""

    def __init__(self, model: Transformer):
        self.model, self.block = model, model.model.layers[model.config.first_k_dense_replace]
        self.mtp = model.model.layers[model.config.num_hidden_layers]
        self.boxes, self.arrows, self.names = [], [], []

    def module(self, path: str) -> str:
        """The last part of a module's, weight's or buffer's path, within the model, a block or the MTP module."""
        for root in (self.block, self.mtp, self.model):
            owner, _, name = path.rpartition(".")
            try:
                if hasattr(root.get_submodule(owner), name):
                    self.names.append(path)
                    return name
            except AttributeError:
                continue
        raise UserError(f"the model has no {path}")

    def function(self, name: str) -> str:
        """A function of model.py, or kernels.NAME."""
        try:
            resolve_name(name if name.startswith("kernels.") else f"{MODEL}.{name}")
        except AttributeError:
            raise UserError(f"there is no function {name}") from None
        self.names.append(name)
        return name

    def box(self, x, y, width, height, modules="", function="", equation="", text="", title="", kind="plain") -> None:
        """Modules with what they do, the function that computes it, and its equation."""
        names = [self.module(each) for each in modules.split()]
        lines = [*text.split("\n"), "  ".join(filter(None, (self.function(function) if function else "", equation)))]
        self.boxes.append(Box(x, y, width, height, title or ", ".join(names), tuple(filter(None, lines)), kind))

    def arrow(self, *points, text="", at=(0, 0), kind="plain", head=True) -> None:
        self.arrows.append(Arrow(points, text, at, kind, head))


def the_model(d: Diagram, y=102.5) -> None:
    """Above: embedding, the two halves of a block, norm and head."""
    d.box(8.5, y, 13, 7.6, "model.embed_tokens", text="tokens to\nstates h")
    d.box(33, y, 21, 9.6, "input_layernorm self_attn", "Attention.forward", text="MLA: below, left",
          title="input_layernorm,\nself_attn")
    d.box(59.5, y, 23, 9.6, "post_attention_layernorm mlp", "MoE.forward", text="MoE: below, right",
          title="post_attention_layernorm,\nmlp")
    d.box(81.2, y, 8, 7.6, "model.norm", text="RMSNorm")
    d.box(93, y, 12, 7.6, "lm_head", text="to the next\ntoken, t+1")
    d.arrow((15, y), (22.5, y))
    d.arrow((43.5, y), (48, y))
    d.arrow((71, y), (77.2, y))
    d.arrow((85.2, y), (87, y))
    d.arrow((19, y), (19, y + 6.4), (45.2, y + 6.4), (45.2, y), head=False)
    d.arrow((46.8, y), (46.8, y + 6.4), (73.4, y + 6.4), (73.4, y), head=False)
    d.arrow((18, y - 6.9), (18, y - 6.9), text="one block; L of them, the first ones with a dense FFN for MoE",
            at=(18.2, y - 6.7), head=False)
    d.boxes += [Box(x, y, 1.8, 1.8, "+", (), "small") for x in (45.2, 73.4)]


def ahead(d: Diagram, y=82.5) -> None:
    """In the middle: the MTP module, from the state and the embedding of the next token to the token after it."""
    d.box(13, y + 2.9, 22, 5, "enorm", text="of the embedding of t+1")
    d.box(13, y - 2.9, 22, 5, "hnorm", text="of the state h at t")
    d.box(37, y, 17, 7.6, "eh_proj", "MTP.forward", "eq 21", "joins both")
    d.box(58, y, 15, 7.6, title="one more block", text="MLA and MoE\neq 22")
    d.box(76.3, y, 12, 7.6, "shared_head", text="its own norm")
    d.box(93, y, 12, 7.6, "lm_head", text="the same one\nt+2, eq 23")
    d.function("Transformer._mtp_loss")
    d.arrow((24, y + 2.9), (28.4, y + 1))
    d.arrow((24, y - 2.9), (28.4, y - 1))
    d.arrow((45.5, y), (50.5, y))
    d.arrow((65.5, y), (70.3, y))
    d.arrow((82.3, y), (87, y))


def attention(d: Diagram, sizes: str) -> None:
    """Left: queries, the latents, what is cached of them and what comes out of it."""
    q, kv = 11.8, 36
    d.box(q, 15, 18.6, 9.6, "self_attn.q_a_proj self_attn.q_a_layernorm", "Attention.queries", "eq 6", "the low rank $c^Q$",
          title="q_a_proj,\nq_a_layernorm")
    d.box(q, 30, 18.6, 7.6, "self_attn.q_b_proj", "Attention.queries", "eqs 7-9", "$q^C$, and $q^R$ by RoPE")
    d.box(kv, 15, 25, 9.6, "self_attn.kv_a_proj_with_mqa self_attn.kv_a_layernorm", "Attention.latents", "eqs 1, 3",
          "a latent $c^{KV}$, a key $k^R$ by RoPE", title="kv_a_proj_with_mqa,\nkv_a_layernorm")
    d.box(kv, 31, 26, 13.4, title="THE CACHE", text=f"$c^{{KV}}$ and $k^R$, one for all heads:\nall that decoding keeps\n{sizes}",
          function="Cache.write", equation="V2 2.1.4", kind="cached")
    d.box(kv, 47, 25, 7.6, "self_attn.kv_b_proj", "Attention.expanded", "eqs 2, 5", "$k^C$ and $v^C$ per head, not kept")
    d.box(25.5, 58.8, 44, 6.4, title=r"softmax( scale ($q^C k^C + q^R k^R$) ) $v^C$",
          function="kernels.causal_attention_reference", equation="eqs 9-10")
    d.box(32, 67.2, 22, 5, "self_attn.o_proj", "Attention.forward", "eq 11")
    d.arrow((24, 6), (24, 8), (q, 8), (q, 10.2), text="h", at=(23.5, 4.6))
    d.arrow((24, 6), (24, 8), (kv, 8), (kv, 10.2))
    d.arrow((q, 19.8), (q, 26.2))
    d.arrow((q, 33.8), (q, 55.6))
    d.arrow((kv, 19.8), (kv, 24.3))
    d.arrow((kv, 37.7), (kv, 43.2))
    d.arrow((kv, 50.8), (kv, 55.6))
    d.function("Attention.absorbed")
    d.arrow((23, 34), (22.2, 34), (22.2, 55.6), kind="cached", at=(13.2, 46),
            text="decoding\nreads it\nas it lies:\nabsorbed,\nV2 2.1.2")
    d.arrow((32, 62), (32, 64.7))


def experts(d: Diagram, chosen=(4, 6, 9, 10), groups=4, width=4) -> None:
    """Right: the router, its bias, groups and gates; experts and the shared one."""
    x, e = 67.5, 89
    d.box(x, 14, 22, 7.6, "mlp.gate", "Router.forward", "eq 15", r"affinities $s$ = sigmoid($W u$)")
    d.box(x, 27, 22, 9.8, "mlp.gate.e_score_correction_bias", "Router.update_bias", "LF alg. 1",
          "s + bias: it chooses,\nit never weighs", title="THE BIAS", kind="bias")
    d.box(x, 39.5, 22, 7.6, title="groups, then experts", text="the best of s + bias", function="Router.choose",
          equation="eq 16")
    d.box(x, 51, 22, 7.6, title="gates", text="from s alone, sum 1", function="Router.forward", equation="eqs 13-14")
    d.box(e, 51, 16.5, 7.6, "mlp.experts", "Experts.forward", "", "gate × FFN(u)")
    d.box(e, 14, 16.5, 7.6, "mlp.shared_experts", "MLP.forward", "", "sees every token")
    for i in range(groups * width):
        left, low = e - 7.2 + i // width % 2 * 8.1 + i % width * 1.95, 33.5 - i // width // 2 * 3.4
        d.boxes.append(Box(left, low, 1.6, 1.6, "", (), "bias" if i in chosen else "small"))
    d.arrow((x + 11, 39.5), (e - 4.3, 39.5), (e - 4.3, 35.4), kind="bias")
    d.arrow((e + 4, 35.4), (e + 4, 47.2), text="K of E,\nin a few\ngroups", at=(e - 2.8, 41))
    d.box(78, 62.5, 32, 5.4, title=r"$y = \Sigma$ gate FFN(u) + FFN$_{shared}$(u)", function="MoE.forward", equation="eq 12")
    d.arrow((78, 6), (78, 8), (x, 8), (x, 10.2), text="u", at=(77.5, 4.6))
    d.arrow((78, 6), (78, 8), (e, 8), (e, 10.2))
    d.arrow((x, 17.8), (x, 22.1))
    d.arrow((x, 31.9), (x, 35.7), kind="bias")
    d.arrow((x - 11, 14), (x - 13, 14), (x - 13, 51), (x - 11, 51), kind="bypass")
    d.arrow((x - 13, 39), (x - 13, 39), text="s", at=(x - 12.6, 34), kind="bypass", head=False)
    d.arrow((x, 43.3), (x, 47.2))
    d.arrow((x + 11, 51), (e - 8.25, 51))
    d.arrow((e, 54.8), (e, 59.8))
    d.arrow((e + 8.25, 14), (e + 9.6, 14), (e + 9.6, 62.5), (94, 62.5))
    d.function("balance_loss")


def diagram() -> Diagram:
    """Everything of the picture."""
    v3 = Config.preset("v3")
    with torch.device("meta"):
        d = Diagram(Transformer(Config.preset("tiny"), init=False))
    numbers = {kind: count // v3.num_hidden_layers for kind, count in cache_numbers(asdict(v3)).items()}
    the_model(d)
    attention(d, f"V3: {numbers['MLA']:,} numbers a token and layer\n(MHA: {numbers['MHA']:,})")
    experts(d)
    ahead(d)
    return d


PANELS = [Panel(1, 94, 99, 18.5, "The model"), Panel(17.3, 94.8, 57.4, 15.4, ""),
          Panel(1, 76, 99, 16, "MTP: one token further ahead"), Panel(1, 2, 49, 72, "MLA: attention on latents"),
          Panel(52, 2, 48, 72, "MoE: which experts, and how much")]


def main(argv: list[str]) -> None:
    """Draw it."""
    d = diagram()
    path = argv[0] if argv else PICTURE
    draw(path, "DeepSeek-V3, and where it is computed", (101, 118), PANELS, d.boxes, d.arrows)
    print(path)


if __name__ == "__main__":
    run_main(main)
