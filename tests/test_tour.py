"""tour.py: every number that it prints is what transformers computes on the same weights, in every layer."""

import re
import shutil

import pytest
import torch
from transformers.cache_utils import MtpCache

from data.text.tokenizer import load_tokenizer
from tests import checks, tour
from tests.checks import build, transformers_twin

TOKENIZER = load_tokenizer("plainseek:1024")
NUMBER = r"-?\d+\.\d{3}"


def walk(capsys, *argv) -> str:
    capsys.readouterr()
    tour.main(list(map(str, argv)))
    return capsys.readouterr().out


def rows(text: str) -> dict[str, list[float]]:
    """Symbol -> the first numbers of its line."""
    found = re.findall(rf"^  (\S+) +\(.*?\) +({NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}) \.\.", text, re.M)
    return {symbol: [float(x) for x in numbers.split()] for symbol, numbers in found}


def words_and_shares(line: str) -> list[tuple[str, float]]:
    return [(word, float(share)) for word, share in re.findall(r"('.*?'|\".*?\") (\d+\.\d)%", line)]


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=TOKENIZER.vocab_size, bos_token_id=TOKENIZER.bos_id, eos_token_id=TOKENIZER.eos_id)
    return build(**sizes)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("tour") / "ours"
    model.save_pretrained(path, TOKENIZER)
    return path


@torch.no_grad()
def by_transformers(model, ids, layer: int) -> dict:
    """What its modules give, by our symbols, and what its router must choose, by the rule in plain Python."""
    twin, seen = transformers_twin(model), {}
    twin.set_attn_implementation("eager")
    block = twin.model.layers[layer]
    for path, module in [*block.named_modules(), ("embedding", twin.model.embed_tokens)]:
        module.register_forward_hook(lambda _m, inputs, out, path=path: seen.update({path: out, path + "<": inputs[:1]}))
    out = twin(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    c = model.config
    kv = seen["self_attn.kv_b_proj"].view(1, len(ids), c.num_attention_heads, -1)
    k_nope, v = kv.split((c.qk_nope_head_dim, c.v_head_dim), -1)
    q = seen["self_attn.q_b_proj"].unflatten(-1, (c.num_attention_heads, -1))
    first = lambda module: seen[module][0] if isinstance(seen[module], tuple) else seen[module]
    rows = {"h": seen["embedding"], "c^Q": seen["self_attn.q_a_layernorm"], "q^C": q, "c^KV": seen["self_attn.kv_a_layernorm"],
            "k^C": k_nope, "v^C": v, "o": seen["self_attn.o_proj<"][0], "u": first("self_attn"),
            "u'": seen["post_attention_layernorm"], "h'": first(""), "h^0": out.hidden_states[-1]}
    if c.is_moe(layer):
        rows["shared"] = seen["mlp.shared_experts"]
        rows["experts"] = first("mlp") - seen["mlp.shared_experts"]
    return {"rows": rows, "attention": out.attentions[layer], "logits": out.logits, "h": out.hidden_states[-1],
            "twin": twin, "u": seen["post_attention_layernorm"]}


@pytest.mark.parametrize("layer, token", [(0, 4), (1, 8), (2, 2)])
def test_every_number_is_that_of_transformers(layer, token, model, checkpoint, capsys):
    text = walk(capsys, "4-6+3*7=", "--checkpoint", checkpoint, "--layer", layer, "--token", token)
    ids = tour.encode_prompt(TOKENIZER, "4-6+3*7=", True)
    wanted, config = by_transformers(model, ids, layer), model.config
    shown = rows(text)
    positions = {"q^R", "k^R", "h^1", "s"}  # halves in its order; MTP and the router are below
    assert shown.keys() - positions == wanted["rows"].keys()
    for symbol, tensor in wanted["rows"].items():
        assert shown[symbol] == pytest.approx(tensor[0, token].flatten()[:4].tolist(), abs=6e-4), symbol
    for head, line in enumerate(re.findall(r"head \d+ \|.*", text)):
        share = wanted["attention"][0, head, token, : token + 1]
        blocks = line.split("|")[1]
        assert [" ▁▂▃▄▅▆▇█".index(block) for block in blocks] == pytest.approx((8 * share).tolist(), abs=0.51)
        top = share.topk(3)
        best = [(repr(TOKENIZER.decode([ids[i]])), 100 * p) for p, i in zip(top.values.tolist(), top.indices.tolist())]
        check_shares(line, best)
    check_shares(re.search("next token: .*", text)[0], likeliest(wanted["logits"][0, token]))
    check_mtp(text, model, wanted, ids, token)
    if config.is_moe(layer):
        check_router(text, shown, model, wanted["u"][0, token], layer)


def likeliest(logits):
    top = logits.softmax(-1).topk(5)
    return [(repr(TOKENIZER.decode([i])), 100 * p) for p, i in zip(top.values.tolist(), top.indices.tolist())]


def check_shares(line: str, wanted: list[tuple[str, float]]) -> None:
    shown = words_and_shares(line)
    assert [word for word, _ in shown] == [word for word, _ in wanted]
    assert [share for _, share in shown] == pytest.approx([share for _, share in wanted], abs=0.06)


@torch.no_grad()
def check_mtp(text, model, wanted, ids, token) -> None:
    mtp = checks.transformers_mtp(model, wanted["twin"])
    following = torch.tensor([[*ids[1:], int(wanted["logits"][0, -1].argmax())]])
    places = torch.arange(1, len(ids) + 1).unsqueeze(0)
    h = mtp.forward_layer(0, wanted["h"], places, MtpCache(config=mtp.config), input_ids=following)
    assert rows(text)["h^1"] == pytest.approx(h[0, token, :4].tolist(), abs=6e-4)
    check_shares(re.search("  MTP, .*", text)[0].partition(": ")[2], likeliest(mtp._project_to_logits(h)[0, token]))


def check_router(text, shown, model, u, layer) -> None:
    router, config = model.model.layers[layer].mlp.gate, model.config
    s = (router.weight @ u).sigmoid().tolist()
    bias = router.e_score_correction_bias.tolist()
    assert shown["s"] == pytest.approx(s[:4], abs=6e-4)
    chosen = checks.official_choice(config, s, bias)
    lines = re.findall(rf"expert +(\d+) of group (\d+): s ({NUMBER}), bias ([+-]\d\.\d+), gate ({NUMBER})", text)
    total = sum(s[i] for i in chosen)
    assert {int(line[0]) for line in lines} == chosen
    for expert, group, affinity, b, gate in lines:
        e = int(expert)
        assert int(group) == e // 4
        assert (float(affinity), float(b), float(gate)) == pytest.approx(
            (s[e], bias[e], 2.5 * s[e] / total), abs=6e-4)
    scores = [x + b for x, b in zip(s, bias)]
    worth = [sum(sorted(scores[g : g + 4])[-2:]) for g in range(0, 16, 4)]
    line = re.search(r"best 2 of s \+ bias: (.*?)  ", text)[1]
    assert [float(x) for x in line.split()] == pytest.approx(worth, abs=6e-4)


def test_the_rotated_parts_are_the_models_own_and_the_cache_is_counted(model, checkpoint, capsys):
    text = walk(capsys, "9*9=", "--checkpoint", checkpoint, "--layer", 1)
    ids = torch.tensor([tour.encode_prompt(TOKENIZER, "9*9=", True)])
    seen, cache, attention = {}, model.new_cache(1, ids.shape[1]), model.model.layers[1].self_attn
    hook = attention.register_forward_pre_hook(lambda _m, inputs: seen.update(h=inputs[0]))
    with torch.no_grad():
        model.trunk(ids, cache)
        q_pe = attention.queries(seen["h"], model.freqs_and_mask(ids)[0])[1]
    hook.remove()
    assert rows(text)["k^R"] == pytest.approx(cache.buffer[1, 0, -1, model.config.kv_lora_rank :][:4].tolist(), abs=6e-4)
    assert rows(text)["q^R"] == pytest.approx(q_pe[0, -1].flatten()[:4].tolist(), abs=6e-4)
    assert "its latents, 192 numbers in all layers, 768 bytes" in text and "MHA of these heads: 384 numbers, 2.0" in text


def test_a_checkpoint_saved_by_transformers_has_no_mtp_and_the_same_numbers(model, checkpoint, tmp_path, capsys):
    transformers_twin(model).save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "theirs" / name)
    ours = walk(capsys, "--checkpoint", checkpoint).splitlines()[1:]
    theirs = walk(capsys, "--checkpoint", tmp_path / "theirs").splitlines()
    assert [line for line in ours if "MTP" not in line] == theirs[-len(ours) + 2 :]


def test_every_line_number_leads_to_its_function(checkpoint, capsys):
    text = walk(capsys, "--checkpoint", checkpoint)
    named = re.findall(r"(\w+)\.(\w+)  (\w+\.py):(\d+)", text)
    assert len(named) > 12
    for _, function, file, line in named:
        source = (checks.ours.__file__ if file == "model.py" else file)
        assert f"def {function}(" in open(source).read().splitlines()[int(line) - 1]


def test_without_a_base_the_weights_are_random_and_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert walk(capsys).startswith("RANDOM weights")


@pytest.mark.parametrize("argv, words", [
    (["--layer", "3"], "layer: got 3, wanted 0 to 2"), (["--token", "99"], "token: got 99, wanted 0 to 10"),
    (["--lyer", "1"], "did you mean '--layer'"), (["1+1=" * 2000], "context: ")])
def test_bad_input_is_one_line(argv, words, checkpoint, refuses):
    refuses(tour.main, words, "--checkpoint", checkpoint, *argv)
