"""A checkpoint directory is a Hugging Face directory: both ways, whole or not at all, clear when wrong.

test_run.py has what holds of files in general (full disks, read-only folders, interrupted writes)."""

import json
from dataclasses import asdict, replace

import checks
import pytest
import torch
from checks import ARCHITECTURES, YARN, build, close, random_text
from safetensors.torch import load_file, save_file

import model as ours
from data.io import checkpoint
from data.io.checkpoint import config_from_hf, config_to_hf
from data.io.cli import UserError
from data.io.tensors import TensorFile
from model import Config, Transformer
from tests.conftest import refused

load_pretrained = Transformer.from_pretrained


@pytest.fixture
def saved(tmp_path):
    """A small model and the directory it was saved to."""
    model = build()
    model.save_pretrained(tmp_path / "run")
    return model, tmp_path / "run"


def json_of(path):
    return json.loads(path.read_text())


def edit(directory, change):
    """Rewrite the weights with `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


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


def test_loading_leaves_nothing_as_it_was_in_memory(saved, monkeypatch):
    """Every tensor comes from the file or is set: fresh memory is filled with NaN here."""
    empty, filled = torch.empty, []

    def fill(*sizes, **options):
        tensor = empty(*sizes, **options)
        if tensor.is_floating_point() and not tensor.is_meta:
            filled.append(tensor.fill_(float("nan")))
        return tensor

    monkeypatch.setattr(torch, "empty", fill)
    again = load_pretrained(saved[1])
    assert len(filled) >= len(again.state_dict())
    monkeypatch.undo()
    assert all(t.isfinite().all() for t in [*again.parameters(), *again.buffers()])
    for name, tensor in saved[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_checkpoint_without_mtp_gives_a_model_without_it(saved, capsys):
    model, directory = saved
    edit(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("model.layers.3.")])
    again = load_pretrained(directory)
    assert again.config.num_nextn_predict_layers == 0 and "no MTP weights" in capsys.readouterr().err
    tokens, targets = random_text(model.config)
    with torch.no_grad():
        close(again.eval()(tokens), model(tokens), checks.TOLERANCE, "main model")
        assert "mtp" not in again(tokens, targets)


def test_a_big_model_is_sharded_with_an_index(tmp_path):
    model = build()
    checkpoint.save_weights(tmp_path, model.published(), config_to_hf(asdict(model.config)), 500_000)
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


def test_loading_streams(saved, monkeypatch):
    """A few rows of a tensor are in memory at a time, and its checksum is that of all of them."""
    monkeypatch.setattr("data.io.tensors.BLOCK_BYTES", 300)
    read, most = TensorFile.read_into, [0]
    monkeypatch.setattr(TensorFile, "read_into", lambda self, name, out, skip=0: (
        most.append(len(out)), read(self, name, out, skip)))
    again = load_pretrained(saved[1])
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in saved[0].state_dict().items())
    assert len(most) > 1000 and max(most) <= 1024  # the longest row


V3_JSON = json_of(checkpoint.PRESETS / "v3.json") | {
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "use_cache": True, "transformers_version": "4.33.1", "attention_dropout": 0.0}  # which ours leaves out


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
    ({"model_type": "qwen2"}, "R1-Distill-Qwen models are Qwen2.5"), ({"partial_rotary_factor": 0.5}, "partial_rotary"),
    ({"mlp_layer_types": ["sparse", "dense"]}, "a dense layer behind"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"), ({"rope_scaling": "yarn"}, "rope"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"), ({"rope_theta": "big"}, "rope_theta"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_factor"), ({"hidden_size": "7168"}, "hidden_size"),
    ({"num_experts_per_tok": 300}, "num_experts_per_tok"), ({"rope_interleave": False}, "rope_interleave")])
def test_a_config_json_that_we_cannot_honour_is_one_line(change, words):
    with refused(words):
        read(V3_JSON | change)


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


WRONG = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged or foreign"),
    "half the weights": (lambda d: truncate(d / "model.safetensors"), "damaged or foreign"),
    "a pickle": (lambda d: torch.save({"a": 1}, d / "model.safetensors"), "damaged or foreign"),
    "broken config": (lambda d: truncate(d / "config.json"), "JSON"),
    "deep config": (lambda d: (d / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), "JSON object"),
    "foreign config": (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "llama"),
    "index is a list": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "JSON object"),
    "index names a lost shard": (lambda d: (d / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), "no weights"),
    "missing bias": (lambda d: edit(d, lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias")),
                     "1 missing tensors: model.layers.1.mlp.gate.e_score_correction_bias"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_one_line_that_names_what(name, saved):
    damage, words = WRONG[name]
    damage(saved[1])
    with pytest.raises(UserError, match=words) as caught:
        load_pretrained(saved[1])
    message = str(caught.value)
    assert "\n" not in message and (str(saved[1]) in message or "config.json" in message)


def test_the_command_line_shows_a_checkpoint_and_refuses_a_broken_one(saved, capsys, exit_code, refuses):
    assert exit_code(ours.main, saved[1]) == 0
    assert f"{ours.count_parameters(saved[0].config)['main']:,}" in capsys.readouterr().out
    (saved[1] / "config.json").write_text("{")
    refuses(ours.main, "config.json", saved[1])


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    """torch.load is never called while loading a directory that also holds a .bin of another project."""
    build(**YARN).save_pretrained(tmp_path)
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    assert load_pretrained(tmp_path).config.rope_factor == 40
