"""A checkpoint directory is a Hugging Face directory: both ways, whole or not at all, clear when wrong.

test_run.py has what holds of files in general (full disks, read-only folders, interrupted writes).
"""

import json
import weakref
from dataclasses import asdict, replace

import checks
import pytest
import torch
from checks import ARCHITECTURES, YARN, build, close, random_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as ours
from data.io import checkpoint
from data.io.checkpoint import config_from_hf, config_to_hf
from data.io.cli import UserError
from model import Config, Transformer

load_pretrained = Transformer.from_pretrained


@pytest.fixture
def saved(tmp_path):
    """A small model and the directory it was saved to."""
    model = build()
    model.save_pretrained(tmp_path / "run")
    return model, tmp_path / "run"


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def json_of(path):
    return json.loads(path.read_text())


def edit(directory, change):
    """Rewrite the weights with `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# ---------------------------------------------------------------------- both ways with transformers


@pytest.mark.parametrize("name", ["v3", "v3 yarn", "v3 mscale below mscale_all_dim",
                                  "v3 attention bias", "moonlight", "v2", "v2-lite"])
def test_round_trip_with_transformers(name, tmp_path):
    """Ours -> theirs -> ours: no key missing, and after their save the very same bits."""
    model = build(**ARCHITECTURES[name])
    model.save_pretrained(tmp_path / "ours")
    twin = checks.transformers_loads_it(tmp_path / "ours", model)
    twin.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json_of(tmp_path / "theirs" / "config.json")
    again = load_pretrained(tmp_path / "theirs", impl="reference")
    tokens, _ = random_text(model.config)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens), model(tokens))
    mine = again.config
    assert mine.num_nextn_predict_layers == 0  # they drop the MTP layer
    dropped = dict(num_nextn_predict_layers=0, initializer_range=mine.initializer_range)
    assert config_to_hf(asdict(mine)) == config_to_hf(asdict(model.config) | dropped)


def test_transformers_finds_the_mtp_layer_by_its_released_names(saved):
    checks.transformers_loads_the_mtp_layer(saved[1], saved[0])


def test_names_on_disk_are_the_released_ones(saved):
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    layer = "model.layers.3."  # num_hidden_layers is 3: the MTP module
    for name in ("embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight",
                 "shared_head.norm.weight", "shared_head.head.weight", "input_layernorm.weight",
                 "mlp.gate.e_score_correction_bias", "mlp.experts.15.down_proj.weight",
                 "mlp.shared_experts.gate_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"):
        assert layer + name in tensors, name
    dense = "model.layers.0.mlp.gate"
    assert dense + "_proj.weight" in tensors and dense + ".weight" not in tensors
    assert torch.equal(tensors[layer + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[layer + "shared_head.head.weight"], tensors["lm_head.weight"])
    C, F = model.config.hidden_size, model.config.moe_intermediate_size
    assert tensors[layer + "eh_proj.weight"].shape == (C, 2 * C)
    both, expert = model.model.layers[1].mlp.experts.gate_up_proj[5], "model.layers.1.mlp.experts.5."
    assert torch.equal(tensors[expert + "gate_proj.weight"], both[:F])
    assert torch.equal(tensors[expert + "up_proj.weight"], both[F:])


def test_saved_bits_are_the_weights(tmp_path):
    checks.saved_bits_are_the_weights(tmp_path)


def test_bf16_checkpoint_keeps_the_routing_bias_in_float32(tmp_path):
    checks.bf16_checkpoint_keeps_the_bias_wide(tmp_path)


def test_loading_leaves_nothing_as_it_was_in_memory(saved, monkeypatch):
    """Every tensor comes from the file or is set: fresh memory is filled with NaN here."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    again = load_pretrained(saved[1])
    monkeypatch.undo()
    assert all(t.isfinite().all() for t in [*again.parameters(), *again.buffers()])
    for name, tensor in saved[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_checkpoint_without_mtp_gives_a_model_without_it(saved, capsys):
    model, directory = saved
    edit(directory, lambda tensors: [tensors.pop(name) for name in list(tensors)
                                     if name.startswith("model.layers.3.")])
    again = load_pretrained(directory)
    assert again.config.num_nextn_predict_layers == 0 and "no MTP weights" in capsys.readouterr().err
    tokens, targets = random_text(model.config)
    with torch.no_grad():
        close(again.eval()(tokens), model(tokens), checks.TOLERANCE, "main model")
        assert "mtp" not in again(tokens, targets)


# ------------------------------------------------------------------------------------------- shards


def save_sharded(model, directory, shard_bytes):
    checkpoint.save_weights(directory, model.published(), config_to_hf(asdict(model.config)), shard_bytes)


def test_a_big_model_is_sharded_with_an_index(tmp_path):
    model = build()
    save_sharded(model, tmp_path, 500_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json_of(tmp_path / "model.safetensors.index.json")
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    total = 0
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 500_000 and all(index["weight_map"][name] == shard for name in tensors)
        total += size
    assert total == index["metadata"]["total_size"]
    checks.transformers_loads_it(tmp_path, model)
    again = load_pretrained(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_a_later_save_leaves_no_stale_file(tmp_path):
    """One file over shards, shards over one file, fewer shards over more: what loads is the last save."""
    for step, limit in enumerate((500_000, 10**9, 300_000, 800_000)):
        model = build(seed=step)
        save_sharded(model, tmp_path, limit)
        names = {path.name for path in tmp_path.iterdir()}
        shards = {name for name in names if name.endswith(".safetensors")}
        index, used = tmp_path / "model.safetensors.index.json", {"model.safetensors"}
        if limit < 10**9:
            used = set(json_of(index)["weight_map"].values())
        assert shards == used and (len(shards) > 1) == index.exists() == (limit < 10**9)
        assert names == shards | {"config.json"} | ({index.name} if index.exists() else set())
        checks.transformers_loads_it(tmp_path, model)
        assert torch.equal(load_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_loading_streams(saved, monkeypatch):
    """One tensor of the file is alive at a time: memory is the model and one tensor."""
    alive, most = [], [0]

    class Watched:
        def __init__(self, file):
            self.file, self.keys = file, file.keys

        def get_tensor(self, name):
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", lambda *a, **k: Watched(safe_open(*a, **k)))
    load_pretrained(saved[1])
    assert len(alive) > 100 and most[0] <= 2


# -------------------------------------------------------------------------------- config.json forms


V3_JSON = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.33.1", "v_head_dim": 128, "vocab_size": 129280,
}


def read(values: dict) -> Config:
    return Config(**config_from_hf(values))


def test_both_forms_of_config_json_give_the_preset():
    wanted = Config.preset("v3", initializer_range=0.02)
    assert read(V3_JSON) == wanted
    gone = ("rope_scaling", "rope_theta", "torch_dtype", "scoring_func", "topk_method", "moe_layer_freq")
    other_form = {key: value for key, value in V3_JSON.items() if key not in gone}
    rope = {key: value for key, value in V3_JSON["rope_scaling"].items() if key != "type"}
    other_form |= {"rope_parameters": rope | {"rope_type": "yarn", "rope_theta": 10000.0},
                   "dtype": "bfloat16", "rope_interleave": True, "qk_head_dim": 192, "head_dim": 64}
    assert read(other_form) == wanted
    changed = V3_JSON | {"q_lora_rank": None, "rope_scaling": None}
    assert read(changed) == replace(wanted, q_lora_rank=None, rope_factor=1.0)


@pytest.mark.parametrize("name", checkpoint.preset_names())
def test_config_json_of_every_preset_reads_back(name):
    config = Config.preset(name)
    again = read(json.loads(json.dumps(config_to_hf(asdict(config)))))
    plain = {} if config.rope_factor > 1 else dict(  # knobs of YaRN are not written where there is none
        rope_original_max_position_embeddings=again.rope_original_max_position_embeddings)
    assert again == replace(config, **plain)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, "llama"), ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "gelu"), ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"quantization_config": {"fmt": "e4m3", "quant_method": "fp8"}}, "quantization_config"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"), ({"rope_scaling": "yarn"}, "rope"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"), ({"rope_theta": "big"}, "rope_theta"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_factor"), ({"hidden_size": "7168"}, "hidden_size"),
    ({"num_experts_per_tok": 300}, "num_experts_per_tok"), ({"rope_interleave": False}, "rope_interleave"),
])
def test_a_config_json_that_we_cannot_honour_is_one_line(change, words):
    with pytest.raises(UserError, match=words) as caught:
        read(V3_JSON | change)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------- wrong checkpoint directories


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


LAYER = "model.layers.1.mlp."
WRONG = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "truncated or foreign"),
    "half the weights": (lambda d: truncate(d / "model.safetensors"), "truncated or foreign"),
    "a pickle": (lambda d: torch.save({"a": 1}, d / "model.safetensors"), "truncated or foreign"),
    "broken config": (lambda d: truncate(d / "config.json"), "JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), "JSON object"),
    "foreign config": (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "llama"),
    "index is a list": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "foreign"),
    "index names a lost shard": (lambda d: (d / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), "no weights"),
    "missing tensor": (lambda d: edit(d, lambda t: t.pop(f"{LAYER}experts.7.up_proj.weight")),
                       f"1 missing tensors: {LAYER}experts.7.up_proj.weight"),
    "missing bias": (lambda d: edit(d, lambda t: t.pop(f"{LAYER}gate.e_score_correction_bias")),
                     "e_score_correction_bias"),
    "unexpected tensor": (lambda d: edit(d, lambda t: t.update(stranger=torch.ones(1))),
                          "1 unexpected tensors: stranger"),
    "wrong shape": (lambda d: edit(d, lambda t: t.update({"lm_head.weight": torch.ones(5, 96)})),
                    r"lm_head.weight has shape \(5, 96\).*\(256, 96\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_one_line_that_names_what(name, saved):
    damage, words = WRONG[name]
    damage(saved[1])
    with pytest.raises(UserError, match=words) as caught:
        load_pretrained(saved[1])
    message = str(caught.value)
    assert "\n" not in message and (str(saved[1]) in message or "config.json" in message)


def test_the_command_line_shows_a_checkpoint_and_refuses_a_broken_one(saved, capsys, exit_code):
    assert exit_code(ours.main, saved[1]) == 0
    assert f"{ours.count_parameters(saved[0].config)['main']:,}" in capsys.readouterr().out
    (saved[1] / "config.json").write_text("{")
    assert exit_code(ours.main, saved[1]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


# ------------------------------------------------------------------ nothing lost when writing fails


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_earlier_checkpoint_whole(saved, monkeypatch, call):
    model, directory = saved
    before = files_of(directory)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(UserError, match="No space left on device"):
        build(seed=9).save_pretrained(directory)
    monkeypatch.undo()
    assert files_of(directory) == before, "the earlier checkpoint changed"
    assert torch.equal(load_pretrained(directory).lm_head.weight, model.lm_head.weight)


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    """torch.load is never called while loading a directory that also holds a .bin of another project."""
    build(**YARN).save_pretrained(tmp_path)
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    assert load_pretrained(tmp_path).config.rope_factor == 40
