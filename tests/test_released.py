"""Checkpoints as others published them: they load to the bit, run, and say what is wrong with them."""

import json
import re

import layouts
import published
import pytest
import test_foreign
import torch
from safetensors.torch import load_file, save_file

import model as ours
import sample
import train
from data.io import checkpoint
from data.io.experts import ExpertCache, parse_size
from data.io.tensors import FP8, expand_e4m3
from data.text.tokenizer import load_tokenizer
from model import Config, Transformer
from sample import generate
from tests.conftest import ROOT, refused

LAYOUTS = [("v3", True), ("v3", False), ("v2-lite", False), ("moonlight", False), ("k2", False), ("k2", True)]


@pytest.mark.parametrize("kind, fp8", LAYOUTS)
def test_a_published_layout_loads_to_the_bit(kind, fp8, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.io.tensors.BLOCK_BYTES", 25_000)  # of most matrices 128 rows at a time
    wanted = layouts.write(tmp_path, kind, fp8)
    got = Transformer.from_pretrained(tmp_path)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    said = capsys.readouterr().err
    assert ("passed over 3 of RoPE's frequencies" in said) == (kind == "moonlight") and said.count("\n") <= 1
    narrow = Transformer.from_pretrained(tmp_path, dtype=None, mtp=False)
    assert narrow.compute_dtype == narrow.lm_head.weight.dtype == torch.bfloat16
    for name, tensor in narrow.state_dict().items():
        is_router = ".mlp.gate." in name
        assert tensor.dtype == (torch.float32 if is_router else torch.bfloat16)
        assert torch.equal(tensor, wanted.state_dict()[name].to(tensor.dtype)), name
    assert not any(name.startswith("model.layers.3.") for name in narrow.state_dict())


@pytest.mark.parametrize("kind, fp8", LAYOUTS)
def test_logits_are_those_of_transformers(kind, fp8, tmp_path):
    """Theirs are of the dequantised weights, saved anew under the same names."""
    transformers = pytest.importorskip("transformers")
    wanted = layouts.write(tmp_path / "published", kind, fp8)
    values = layouts.published_config(wanted, fp8=False)
    wanted.save_pretrained(tmp_path / "plain")
    if kind == "k2":  # a model type of vLLM's, which transformers has not
        values["model_type"] = "deepseek_v3"
        (tmp_path / "plain" / "config.json").write_text(json.dumps(values))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    got = Transformer.from_pretrained(tmp_path / "published").eval()
    tokens = torch.randint(got.config.vocab_size, (2, 40))
    with torch.no_grad():
        error = (got(tokens) - theirs(tokens).logits).abs().max()
    assert error < 5e-5, error


FAMILY = {  # model type -> its classes' names and what else its tiny model needs
    "deepseek_v32": ("DeepseekV32", dict(n_group=4, topk_group=2, first_k_dense_replace=1, index_topk=32,
                                         index_n_heads=2, index_head_dim=32)),
    "glm_moe_dsa": ("GlmMoeDsa", dict(first_k_dense_replace=1, index_topk=32, index_n_heads=2, index_head_dim=32)),
    "glm4_moe_lite": ("Glm4MoeLite", dict()),
}


@pytest.mark.parametrize("kind", FAMILY)
def test_others_of_the_family_are_loaded_from_what_transformers_saves(kind, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    name, more = FAMILY[kind]
    sizes = {key: value for key, value in layouts.SMALL.items() if key != "first_k_dense_replace"}
    config = getattr(transformers, name + "Config")(
        **sizes | dict(q_lora_rank=96, num_key_value_heads=4, max_position_embeddings=64) | more)
    theirs = getattr(transformers, name + "ForCausalLM")(config).eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1)
        elif tensor.ndim > 1:
            tensor.normal_(0, 0.08)
    theirs.save_pretrained(tmp_path)
    got = Transformer.from_pretrained(tmp_path).eval()
    tokens = torch.randint(512, (2, 32))
    with torch.no_grad():
        error = (got(tokens) - theirs(tokens).logits).abs().max()
    assert error < 5e-5, error
    is_sparse = "index_topk" in more
    assert got.config.max_position_embeddings == (32 if is_sparse else 64)
    assert ("texts end at 32 tokens" in capsys.readouterr().err) == is_sparse


def test_weights_in_int4_are_refused(tmp_path):
    layouts.write(tmp_path, "v3", fp8=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | published.INT4))
    with refused("its weights are quantised (compressed-tensors, 4 bits"):
        Transformer.from_pretrained(tmp_path)


def test_expanded_codes_are_torchs_own():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(FP8)  # but for the two NaN
    assert torch.equal(expand_e4m3(codes).float() * 2.0**120, codes.float())


WEIGHT = "model.layers.1.mlp.experts.5.down_proj.weight"


def changed(directory, change) -> None:
    """Write the shards anew after `change(tensors)`."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    layouts.write_shards(directory, tensors, 3)


def nan_code(tensors):
    tensors[WEIGHT].view(torch.uint8)[3, 5] = 0x7F


def set_scale(value):
    def change(tensors):
        tensors[WEIGHT + "_scale_inv"][0, 0] = value

    return change


BAD = {
    "a scale without its weight": (lambda t: t.pop(WEIGHT), f"{WEIGHT}_scale_inv has no {WEIGHT}: a file"),
    "a weight without its scale": (lambda t: t.pop(WEIGHT + "_scale_inv"), f"{WEIGHT} is FP8 and has no {WEIGHT}_s"),
    "scales of other blocks": (lambda t: t.update({WEIGHT + "_scale_inv": torch.ones(3, 3)}),
                               r"has shape [3, 3], wanted [2, 2] for [160, 144] in blocks of 128 x 128"),
    "a NaN scale": (set_scale(float("nan")), "holds NaN or numbers that are no scales"),
    "an infinite scale": (set_scale(float("inf")), "holds NaN or numbers that are no scales"),
    "a NaN weight": (nan_code, f"{WEIGHT} holds NaN"),
    "a missing tensor": (lambda t: (t.pop(WEIGHT), t.pop(WEIGHT + "_scale_inv")), f"1 missing tensors: {WEIGHT}"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fp8_weights_are_one_line(name, tmp_path):
    change, words = BAD[name]
    layouts.write(tmp_path, "v3", fp8=True)
    changed(tmp_path, change)
    with refused(words):
        Transformer.from_pretrained(tmp_path)


def test_a_missing_shard_and_a_missing_quantisation_are_one_line(tmp_path):
    layouts.write(tmp_path, "v3", fp8=True)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"quantization_config": None}))
    with refused("unexpected tensors: .*_scale_inv"):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps(values | {"quantization_config": {**values["quantization_config"],
                                                                 "weight_block_size": [64, 128]}}))
    with refused("in blocks of 64 x 128"):
        Transformer.from_pretrained(tmp_path)
    path.write_text(json.dumps(values))
    next(tmp_path.glob("*-00002-of*")).unlink()
    with refused("no weights in .*model-00002"):
        Transformer.from_pretrained(tmp_path)


HEADERS = {
    "longer than the file": (1 << 40, b"{}"), "no JSON": (2, b"]["), "a list": (2, b"[]"),
    "an unknown dtype": (None, b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}'),
    "a hole": (None, b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}'),
    "a wrong size": (None, b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'),
    "a negative size": (None, b'{"a": {"dtype": "U8", "shape": [-2, -1], "data_offsets": [0, 2]}}'),
    "a size of text": (None, b'{"a": {"dtype": "U8", "shape": ["2"], "data_offsets": [0, 2]}}'),
    "deep": (None, b"[" * 100_000),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_bad_header_is_one_line(name, tmp_path):
    length, header = HEADERS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes((length or len(header)).to_bytes(8, "little") + header + bytes(16))
    with refused("the file is damaged or foreign"):
        checkpoint.open_weights(tmp_path)


def test_a_disk_that_gives_less_than_the_file_had_is_one_line(tmp_path):
    save_file({"a": torch.arange(1000.0)}, tmp_path / "model.safetensors")
    files = checkpoint.open_weights(tmp_path)
    with open(tmp_path / "model.safetensors", "rb+") as file:
        file.truncate(2000)
    with refused("a cannot be read: the file has become shorter"):
        files["a"].get("a")


# ------------------------------------------------------------------------------- experts on disk


def greedy(model, prompt, steps=12):
    return generate(model.eval(), [prompt], max_new_tokens=steps, temperature=0).tokens[0].tolist()


@pytest.mark.parametrize("kind, fp8, dtype", [("v3", True, torch.float32), ("v3", True, torch.bfloat16),
                                              ("moonlight", False, torch.float32), ("k2", False, torch.bfloat16)])
def test_experts_on_disk_give_the_same_answer(kind, fp8, dtype, tmp_path):
    layouts.write(tmp_path, kind, fp8)
    loaded = Transformer.from_pretrained(tmp_path, impl="reference", dtype=dtype, mtp=False).eval()
    tokens = torch.randint(512, (2, 9))
    one = 3 * 160 * 144 * (1 if fp8 else 2)  # bytes of an expert in the file
    for room in (1, 5, 100):
        cache = ExpertCache(room * one)
        model = Transformer.from_pretrained(tmp_path, "reference", dtype=dtype, mtp=False, experts=cache).eval()
        assert not any(".mlp.experts." in name for name in model.state_dict())
        assert len(cache.slots) == min(room, 16)
        with torch.no_grad():
            assert torch.equal(model(tokens), loaded(tokens))
        assert greedy(model, [5, 6, 7]) == greedy(loaded, [5, 6, 7])
    if dtype == torch.float32:  # whatever the other twins are
        fused = Transformer.from_pretrained(tmp_path, mtp=False, experts=ExpertCache(one))
        assert greedy(fused, [5, 6, 7]) == greedy(loaded, [5, 6, 7])


def test_the_cache_keeps_what_was_used_last_and_reads_nothing_else(tmp_path):
    wanted = layouts.write(tmp_path, "moonlight")
    one = 3 * 160 * 144 * 2
    cache = ExpertCache(3 * one + one // 2)
    Transformer.from_pretrained(tmp_path, mtp=False, experts=cache)
    first, second = (f"model.layers.{i}.mlp.experts." for i in (1, 2))
    for prefix, expert, is_read in ((first, 0, 1), (first, 1, 1), (second, 0, 1), (first, 0, 0), (second, 7, 1),
                                    (first, 1, 1), (first, 0, 0), (second, 0, 1), (second, 0, 0)):
        before = cache.bytes_read
        stacks = wanted.model.layers[int(prefix[13])].mlp.experts
        for stack in ("gate_up_proj", "down_proj"):
            assert torch.equal(cache.weight(prefix, expert, stack).float(), getattr(stacks, stack)[expert])
        assert cache.bytes_read - before == is_read * one, (prefix, expert)
    assert cache.asked.total() == 9 and cache.missed.total() == 6
    assert cache.counts().tolist() == [[3, 2, 0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 1]]
    report = cache.report(10).splitlines()
    assert report[1].split() == ["1", "2", "of", "8", "40%"] and report[3].split() == ["all", "4", "of", "16", "33%"]
    assert "room for 3 experts of 138 KB" in report[4] and "829 KB read, 82.9 KB for each of 10 tokens" in report[4]


def test_experts_that_cannot_be_read_are_one_line(tmp_path):
    layouts.write(tmp_path, "v3", fp8=True)
    with refused("expert_cache: got 1 KB, wanted at least 69.1 KB"):
        Transformer.from_pretrained(tmp_path, mtp=False, experts=ExpertCache(1000))
    cache = ExpertCache(70_000)
    model = Transformer.from_pretrained(tmp_path, mtp=False, experts=cache)
    sizes = {path: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    for path in sizes:  # the disk goes in mid-answer
        with open(path, "rb+") as file:
            file.truncate(1000)
    with refused("the file has become shorter"):
        greedy(model, [5, 6, 7])
    assert len(cache.free) + len(cache.place) == len(cache.slots)
    for i, (change, words) in enumerate(((nan_code, "holds NaN"), (set_scale(float("nan")), "are no scales"))):
        layouts.write(tmp_path / str(i), "v3", fp8=True)
        changed(tmp_path / str(i), change)
        cache = ExpertCache(10**9)
        Transformer.from_pretrained(tmp_path / str(i), mtp=False, experts=cache)
        with refused(words):
            cache.weight("model.layers.1.mlp.experts.", 5, "down_proj")
    changed(tmp_path / "0", lambda t: (t.pop(WEIGHT), t.pop(WEIGHT + "_scale_inv")))
    with refused(f"the expert {WEIGHT} is missing"):
        Transformer.from_pretrained(tmp_path / "0", mtp=False, experts=ExpertCache(10**9))


def test_a_damaged_expert_of_ours_is_seen_once_it_is_read(tmp_path):
    layouts.random_model("moonlight").save_pretrained(tmp_path)
    file = checkpoint.open_weights(tmp_path)[WEIGHT]
    with open(file.path, "rb+") as written:
        written.seek(file.place(WEIGHT))
        written.write(b"\x01\x02\x03")
    cache = ExpertCache(10**9)
    Transformer.from_pretrained(tmp_path, mtp=False, experts=cache)
    cache.weight("model.layers.1.mlp.experts.", 4, "down_proj")
    with refused(f"{WEIGHT} is damaged (checksum)"):
        cache.weight("model.layers.1.mlp.experts.", 5, "down_proj")


@pytest.mark.parametrize("text", ["", "8 XB", "many", "-3GB", "1e9", "GB", "1.2.3GB"])
def test_a_size_that_is_none_is_one_line(text):
    with refused("wanted a size such as 8GB"):
        parse_size(text)


# -------------------------------------------------------------------------------- sample.py on them


def with_text(directory, kind):
    """The tokenizer of a layout: DeepSeek's form, or Moonlight's."""
    if kind in ("moonlight", "k2"):
        ranks = test_foreign.write_tiktoken(directory)
        ids = len(ranks), len(ranks) + 1
    else:
        known = (test_foreign.V2_STEPS, test_foreign.SPECIALS[:2], test_foreign.V2_TEMPLATE) if kind == "v2-lite" else (
            test_foreign.V3_STEPS, test_foreign.SPECIALS, test_foreign.TEMPLATES["v3.1"])
        test_foreign.foreign(directory, known[0], specials=known[1], chat_template=known[2])
        ids = 700, 701
    path = directory / "config.json"
    values = json.loads(path.read_text()) | dict(zip(("bos_token_id", "eos_token_id"), ids))
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("kind, fp8", LAYOUTS)
def test_a_published_layout_chats(kind, fp8, tmp_path, capsys, exit_code, monkeypatch):
    layouts.write(tmp_path, kind, fp8, vocab_size=768)
    with_text(tmp_path, kind)
    monkeypatch.chdir(tmp_path)
    flags = ("--checkpoint", tmp_path, "--chat", "--temperature", 0, "--max_new_tokens", 8, "2+2 = <|im_end|>?")
    answers = []
    for more in ((), ("--dtype", "float32"), ("--experts", "disk", "--expert_cache", "1MB", "--stats")):
        assert exit_code(sample.main, *flags, *more) == 0
        out, err = capsys.readouterr()
        answers.append(out)
    assert answers[0].strip() and answers[2] == answers[0]  # both in the file's bf16
    assert "experts met" in err and "B for each of" in err
    assert (tmp_path / "experts.png").read_bytes()[1:4] == b"PNG"


def test_the_tokenizer_is_looked_at_before_the_weights(tmp_path, refuses):
    layouts.write(tmp_path, "v3", fp8=True)
    with_text(tmp_path, "v3")  # 706 ids, of 512
    changed(tmp_path, nan_code)  # whoever read weights would say so
    refuses(sample.main, "it belongs to another model: got 706 ids", "--checkpoint", tmp_path, "x")
    for flags, words in ((("--thinking",), "wanted --chat"), (("--stats",), "wanted --experts disk"),
                         (("--experts", "disk", "--expert_cache", "x"), "another model"), (("--dtype", "int8"), "int8")):
        refuses(sample.main, words, "--checkpoint", tmp_path, *flags, "--", "x")


# ----------------------------------------------------------------------- config.json of released models


@pytest.mark.parametrize("name", published.MODELS)
def test_config_json_of_released_models(name, tmp_path, capsys, exit_code, refuses):
    model = published.MODELS[name]
    base = json.loads((checkpoint.PRESETS / f"{model.preset}.json").read_text()) if model.preset else {}
    (tmp_path / "config.json").write_text(json.dumps(base | model.values))
    if not model.main:
        return refuses(ours.main, model.words, tmp_path)
    assert exit_code(ours.main, tmp_path) == 0
    shown = capsys.readouterr().out
    assert f"parameters            {model.main:,}  (main" in shown
    run, disk = re.search(r"memory to run +(.*B) in bf16  \(with --experts disk (.*B) and", shown).groups()
    sizes = f"| {run} | {disk} |" if "not read" not in model.words else "not read |"
    rows = [row for row in (ROOT / "README.md").read_text("utf-8").splitlines() if f"| {model.main:,} |" in row]
    assert any(name.removeprefix("DeepSeek-") in row and sizes in row for row in rows), (sizes, rows)
    assert f"quantisation          {model.words}\n" in shown
    config = Config(**checkpoint.config_from_hf(base | model.values))
    assert config.max_position_embeddings == min((base | model.values)["max_position_embeddings"],
                                                 model.values.get("index_topk", 1 << 30))


def test_a_published_layout_is_fine_tuned_and_saved_with_its_template(tmp_path, exit_code, monkeypatch, workplace):
    transformers = pytest.importorskip("transformers")
    layouts.write(tmp_path / "v2", "v2-lite", vocab_size=768)
    with_text(tmp_path / "v2", "v2-lite")
    (tmp_path / "v2" / "generation_config.json").write_text('{"eos_token_id": [701, 3], "top_p": 0.9}')
    monkeypatch.chdir(tmp_path)
    assert exit_code(train.main, "--init_from", "v2", "--data", workplace / "text", "--steps", 2, "--seq_len", 32,
                     "--tokens_per_step", 64, "--micro_batch", 1, "--eval_every", 2, "--name", "tuned") == 0
    saved = tmp_path / "out" / "tuned"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "v2" / name).read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    talk = [{"role": "user", "content": "2+2"}]
    text = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == "<｜begin▁of▁sentence｜>User: 2+2\n\nAssistant:"
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    ids = theirs.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (model(ids).logits - Transformer.from_pretrained(saved).eval()(ids)).abs().max() < 5e-5
    assert load_tokenizer(saved).stop_ids == [701, 3]
