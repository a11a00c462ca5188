"""A checkpoint directory is a Hugging Face directory: both ways, whole or not at all, and clear when it is wrong."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import checks
import pytest
import torch
from checks import ARCHITECTURES, YARN, build, close, random_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as ours
from data import UserError
from model import Config, Transformer, load_config, load_pretrained, save_pretrained, written_aside


@pytest.fixture
def saved(tmp_path):
    """A small model and the directory it was saved to."""
    model = build()
    save_pretrained(model, tmp_path / "run")
    return model, tmp_path / "run"


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# ------------------------------------------------------------------------------ both ways with transformers


@pytest.mark.parametrize("name", ["v3", "v3 yarn", "v3 mscale below mscale_all_dim", "v3 attention bias", "moonlight",
                                  "v2", "v2-lite"])
def test_round_trip_with_transformers(name, tmp_path):
    """Ours -> theirs -> ours: no key missing, and after their save the very same bits."""
    model = build(**ARCHITECTURES[name])
    save_pretrained(model, tmp_path / "ours")
    twin = checks.transformers_loads_it(tmp_path / "ours", model)
    twin.save_pretrained(tmp_path / "theirs")
    assert ("rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text()))
    again = load_pretrained(tmp_path / "theirs", impl="reference")
    tokens, _ = random_text(model.config)
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens), model(tokens))
    mine = again.config.to_dict() | {"num_nextn_predict_layers": 0}  # they drop the MTP layer
    theirs = model.config.to_dict() | {"num_nextn_predict_layers": 0, "initializer_range": mine["initializer_range"]}
    assert again.config.num_nextn_predict_layers == 0 and mine == theirs


def test_transformers_finds_the_mtp_layer_by_its_released_names(saved):
    checks.transformers_loads_the_mtp_layer(saved[1], saved[0])


def test_names_on_disk_are_the_released_ones(saved):
    model, directory = saved
    names = set(load_file(directory / "model.safetensors"))
    layer = "model.layers.3."  # num_hidden_layers is 3: the MTP module
    for name in ("embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
                 "shared_head.head.weight", "mlp.gate.e_score_correction_bias", "mlp.experts.15.down_proj.weight",
                 "mlp.shared_experts.gate_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "input_layernorm.weight"):
        assert layer + name in names, name
    assert "model.layers.0.mlp.gate_proj.weight" in names and "model.layers.0.mlp.gate.weight" not in names
    tensors = load_file(directory / "model.safetensors")
    assert torch.equal(tensors[layer + "embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[layer + "shared_head.head.weight"], tensors["lm_head.weight"])
    C, F = model.config.hidden_size, model.config.moe_intermediate_size
    assert tensors[layer + "eh_proj.weight"].shape == (C, 2 * C)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.gate_proj.weight"], experts.gate_up_proj[5, :F])
    assert torch.equal(tensors["model.layers.1.mlp.experts.5.up_proj.weight"], experts.gate_up_proj[5, F:])


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
    buffers = dict(again.named_buffers())
    assert all(t.isfinite().all() for t in [*again.parameters(), *buffers.values()])
    assert all(not t.any() for name, t in buffers.items() if name.endswith("counts"))
    for name, tensor in saved[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_checkpoint_without_mtp_gives_a_model_without_it(saved, capsys):
    model, directory = saved
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("model.layers.3.")}, directory / "model.safetensors")
    again = load_pretrained(directory)
    assert again.config.num_nextn_predict_layers == 0 and "no MTP weights" in capsys.readouterr().err
    tokens, targets = random_text(model.config)
    with torch.no_grad():
        close(again.eval()(tokens), model(tokens), checks.TOLERANCE, "main model")
        assert "mtp" not in again(tokens, targets)


# ------------------------------------------------------------------------------------------------ shards


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(ours, "SHARD_BYTES", 500_000)


def test_a_big_model_is_sharded_with_an_index(tmp_path, small_shards):
    model = build()
    save_pretrained(model, tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
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


def test_a_later_save_leaves_no_stale_file(tmp_path, monkeypatch):
    """One file over shards, shards over one file, fewer shards over more: what loads is what was saved last."""
    for step, limit in enumerate((500_000, 10**9, 300_000, 800_000)):
        monkeypatch.setattr(ours, "SHARD_BYTES", limit)
        model = build(seed=step)
        save_pretrained(model, tmp_path)
        names = {path.name for path in tmp_path.iterdir()}
        shards = {name for name in names if name.endswith(".safetensors")}
        index = tmp_path / "model.safetensors.index.json"
        used = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
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
            import weakref

            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            return tensor

    monkeypatch.setattr(ours, "safe_open", lambda *a, **k: Watched(safe_open(*a, **k)))
    load_pretrained(saved[1])
    assert len(alive) > 100 and most[0] <= 2


# -------------------------------------------------------------------------------------- config.json forms


V3_JSON = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}


def test_both_forms_of_config_json_give_the_preset():
    wanted = Config.preset("v3", initializer_range=0.02)
    assert Config.from_dict(V3_JSON) == wanted
    new = {k: v for k, v in V3_JSON.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype", "scoring_func",
                                                         "topk_method", "moe_layer_freq")}
    rope = {k: v for k, v in V3_JSON["rope_scaling"].items() if k != "type"}
    new |= {"rope_parameters": rope | {"rope_type": "yarn", "rope_theta": 10000.0}, "dtype": "bfloat16",
            "rope_interleave": True, "qk_head_dim": 192, "head_dim": 64}
    assert Config.from_dict(new) == wanted
    assert Config.from_dict(V3_JSON | {"q_lora_rank": None, "rope_scaling": None}) == Config.preset(
        "v3", initializer_range=0.02, q_lora_rank=None, rope_factor=1.0)


@pytest.mark.parametrize("name", ours.PRESETS)
def test_config_json_of_every_preset_reads_back(name):
    config = Config.preset(name)
    read = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    plain = {} if config.rope_factor > 1 else dict(  # knobs of YaRN are not written where there is none
        rope_original_max_position_embeddings=read.rope_original_max_position_embeddings)
    assert read == ours.replace(config, **plain)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llama"}, "llama"), ({"model_type": None}, "model_type"), ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"fmt": "e4m3", "quant_method": "fp8"}}, "quantization_config"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"), ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"), ({"rope_scaling": {"type": "yarn"}}, "rope_factor"),
    ({"rope_scaling": "yarn"}, "rope"), ({"hidden_size": "7168"}, "hidden_size"), ({"rope_theta": "big"}, "rope_theta"),
    ({"num_experts_per_tok": 300}, "num_experts_per_tok"), ({"rope_interleave": False}, "rope_interleave"),
])
def test_a_config_json_that_we_cannot_honour_is_one_line(change, words):
    with pytest.raises(UserError, match=words) as caught:
        Config.from_dict(V3_JSON | change)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------- wrong checkpoint directories


def edit(directory, change):
    """Rewrite the weights with `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


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
    "missing tensor": (lambda d: edit(d, lambda t: t.pop("model.layers.1.mlp.experts.7.up_proj.weight")),
                       r"1 missing tensors: model.layers.1.mlp.experts.7.up_proj.weight"),
    "missing bias": (lambda d: edit(d, lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias")),
                     "e_score_correction_bias"),
    "unexpected tensor": (lambda d: edit(d, lambda t: t.update(stranger=torch.ones(1))), "1 unexpected tensors: stranger"),
    "wrong shape": (lambda d: edit(d, lambda t: t.update({"lm_head.weight": torch.ones(5, 96)})),
                    r"lm_head.weight has shape \(5, 96\).*\(256, 96\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_one_line_that_names_what(name, saved):
    damage, words = WRONG[name]
    damage(saved[1])
    with pytest.raises(UserError, match=words) as caught:
        load_pretrained(saved[1])
    assert "\n" not in str(caught.value) and str(saved[1]) in str(caught.value) or "config.json" in str(caught.value)


def test_an_unfinished_file_of_another_save_does_no_harm(saved):
    model, directory = saved
    (directory / "model.safetensors.part").write_bytes(b"half")
    assert torch.equal(load_pretrained(directory).lm_head.weight, model.lm_head.weight)
    save_pretrained(model, directory)
    assert not list(directory.glob("*.part"))


def test_the_command_line_shows_a_checkpoint_and_refuses_a_broken_one(saved, capsys, exit_code):
    assert exit_code(ours.main, saved[1]) == 0
    assert f"{ours.count_parameters(saved[0].config)['main']:,}" in capsys.readouterr().out
    (saved[1] / "config.json").write_text("{")
    assert exit_code(ours.main, saved[1]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


# ---------------------------------------------------------------------------------- nothing lost when writing fails


def assert_untouched(directory, before, model):
    assert files_of(directory) == before, "the earlier checkpoint changed"
    assert torch.equal(load_pretrained(directory).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_earlier_checkpoint_whole(saved, monkeypatch, call):
    model, directory = saved
    before = files_of(directory)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ours.os, call, full)
    with pytest.raises(UserError, match="No space left on device"):
        save_pretrained(build(seed=9), directory)
    monkeypatch.undo()
    assert_untouched(directory, before, model)


def test_a_disk_that_fills_while_a_late_shard_is_written(tmp_path, small_shards, monkeypatch):
    model = build()
    save_pretrained(model, tmp_path)
    before, calls, real = files_of(tmp_path), [], ours.save_file

    def fills(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(ours, "save_file", fills)
    with pytest.raises(UserError, match="No space left"):
        save_pretrained(build(seed=9), tmp_path)
    monkeypatch.undo()
    assert_untouched(tmp_path, before, model)


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from checks import build
from model import save_pretrained
other = build(seed=9)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # no file grows beyond this: as on a full disk
save_pretrained(other, {directory!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_a_really_full_disk(saved):
    model, directory = saved
    before = files_of(directory)
    code = FULL_DISK.format(root=str(checks.ROOT), tests=str(checks.ROOT / "tests"), directory=str(directory))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "UserError: cannot write" in done.stderr, done.stderr
    assert_untouched(directory, before, model)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_writing_to_a_full_device_is_one_line(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("old")
    (tmp_path / "log.json.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        ours.write_json(path, {"a": 1})
    assert path.read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_read_only_folder():
    model, other = build(), build(seed=9)
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        directory = Path(place) / "run"
        save_pretrained(model, directory)
        before = files_of(directory)
        directory.chmod(0o555)
        is_root = os.geteuid() == 0  # who may write everywhere, so somebody else tries
        try:
            os.seteuid(65534) if is_root else None
            with pytest.raises(UserError, match="Permission denied"):
                save_pretrained(other, directory)
        finally:
            os.seteuid(0) if is_root else None
            directory.chmod(0o755)
        assert_untouched(directory, before, model)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_pretrained(build(), tmp_path / "file" / "run")


def test_an_interrupted_write_leaves_old_and_no_rest(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with written_aside(path) as aside:
            aside.write_text("ne")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"
    with written_aside(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_nothing_is_ever_unpickled(tmp_path, monkeypatch):
    """torch.load is never called while loading a directory that also holds a .bin of another project."""
    save_pretrained(build(**YARN), tmp_path)
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    assert isinstance(load_pretrained(tmp_path), Transformer) and load_config(tmp_path).rope_factor == 40
