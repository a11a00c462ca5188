"""Checkpoint directories as Hugging Face has them: names, tensors and dicts, never a model.

config.json in both of its forms <-> keyword arguments of model.Config; published tensor names <->
views into a model; safetensors files, written whole or not at all. Nothing is ever unpickled.
"""

import glob
import json
import os
import re
import shutil
import sys
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from data.io.cli import UserError, nearest, progress
from data.io.tensors import (FP8, SCALE, TensorFile, check_codes, dequantise, file_digest, fingerprint, read_scales,
                             write_tensors)

SHARD_BYTES = 5_000_000_000  # one safetensors file holds at most this much
MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{model_type}, plainseek]
---
A {model_type} model with {num_hidden_layers} layers, {n_routed_experts} experts ({num_experts_per_tok} of them for
each token) and {total:,} parameters, trained with plainseek.

    from transformers import pipeline
    pipeline("text-generation", "THIS FOLDER")([{{"role": "user", "content": "4-6+3*7="}}])
"""
VOCABULARIES = ("tokenizer.json", "tiktoken.model")  # what a tokenizer is made of: the first that is there
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
          "chat_template.jinja")  # files that go on with the vocabulary that they lie beside
PRESETS = Path(__file__).parent.parent / "presets"

# ------------------------------------------------------------------------------------- whole files


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well: whole, or not at all.

    It lies in a folder of its own, so that what a library puts beside it goes with it.
    Raises UserError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    folder = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, glob.escape(path.name))
        folder.mkdir(exist_ok=True)
        yield folder / path.name
        with open(folder / path.name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(folder / path.name, 0o666 & ~_umask())  # some libraries write for the owner alone
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; the earlier file is untouched") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_abandoned(folder: Path, names: str = "*") -> None:
    """Remove what processes that were killed have left in a folder of the files of these names."""
    for aside in folder.glob(f"{names}.*.part"):
        pid = aside.name.split(".")[-2]
        if os.name == "posix" and pid.isdecimal():  # elsewhere signal 0 is no question
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, OverflowError):
                shutil.rmtree(aside, ignore_errors=True)
            except PermissionError:  # it runs, as somebody else's
                pass


def write_text(path: str | Path, text: str) -> None:
    """Write a text so that a reader sees the earlier file or this one. Raises UserError."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    """The same for JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError, and UserError for anything else than an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {type(error).__name__} {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a {type(value).__name__}, wanted a JSON object")
    return value


# ------------------------------------------------------------------------------------- config.json

FIELDS = (  # of model.Config that config.json has under the same name; those of RoPE are read apart
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group", "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor", "scoring_func",
    "topk_method", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "num_nextn_predict_layers", "attention_bias", "max_position_embeddings", "rms_norm_eps",
    "initializer_range", "bos_token_id", "eos_token_id",
)
ONLY = {"hidden_act": "silu", "tie_word_embeddings": False, "moe_layer_freq": 1, "mlp_bias": False,
        "rope_interleave": True, "partial_rotary_factor": 1.0}
ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "original_max_position_embeddings"}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
          "num_attention_heads", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "n_group",
          "topk_group", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # they decide shapes or the arithmetic
GLM = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
       "num_nextn_predict_layers": 0, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5}
ASSUMED = {  # per model_type, what holds where the file says nothing
    "deepseek_v3": {},
    "kimi_k2": {},
    "plainseek": {},  # what neither of transformers' classes computes
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
                    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
                    "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0},
    "deepseek_v32": {},
    "glm_moe_dsa": GLM,
    "glm4_moe_lite": GLM | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
}
OTHERS = {  # published by DeepSeek or with their parts, and other architectures
    "qwen2": "R1-Distill-Qwen models are Qwen2.5, fine-tuned on R1's answers: another architecture, which "
             "transformers or llama.cpp run",
    "llama": "R1-Distill-Llama models are Llama 3, fine-tuned on R1's answers: another architecture, which "
             "transformers or llama.cpp run",
    "deepseek": "DeepSeekMoE-16B has the experts, but not the latent attention, of V2 and later",
    "deepseek_v4": "V4 has another attention (compressed and sparse) and other residuals than V3",
    "kimi_k25": "K2.5 and later also see; only a model of text alone is read",
}


def config_from_hf(values: dict) -> dict:
    """Keyword arguments of model.Config from a `config.json`, in both of its forms.

    The public form has `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`.
    Keys that do not touch the arithmetic are passed over; a value that would change it is a UserError.
    """
    kind = values.get("model_type")
    if kind not in ASSUMED:
        why = f" ({OTHERS[kind]})" if isinstance(kind, str) and kind in OTHERS else ""
        raise UserError(f"config.json: model_type is {kind!r}, wanted one of {', '.join(ASSUMED)}{why}")
    for key, only in ONLY.items():
        if values.get(key, only) not in (only, None):
            raise UserError(f"config.json: {key} is {values[key]!r}, only {only!r} is supported")
    if values.get("num_key_value_heads") not in (None, values.get("num_attention_heads")):
        raise UserError("config.json: num_key_value_heads differs from num_attention_heads, "
                        "MLA has one latent")
    for key in NEEDED:
        if values.get(key) is None and key not in ASSUMED[kind]:
            raise UserError(f"config.json: {key} is missing, wanted a number: no size is guessed")
    if values.get("mlp_layer_types") is not None:  # the form of transformers 5
        dense = values["mlp_layer_types"].count("dense")
        values = values | {"first_k_dense_replace": dense}
        if values["mlp_layer_types"] != ["dense"] * dense + ["sparse"] * (values["num_hidden_layers"] - dense):
            raise UserError("config.json: mlp_layer_types has a dense layer behind one with experts")
    given = {key: value for key, value in values.items()
             if key in FIELDS and (value is not None or key == "q_lora_rank")}
    if isinstance(given.get("eos_token_id"), list) and given["eos_token_id"]:
        given["eos_token_id"] = given["eos_token_id"][0]  # all of them end an answer: see Tokenizer.stop_ids
    context, shown = given.get("max_position_embeddings"), values.get("index_topk")
    if isinstance(shown, int) and isinstance(context, int):  # up to so many keys sparse attention sees all
        given["max_position_embeddings"] = min(context, shown)
    return ASSUMED[kind] | given | _rope_from_hf(values)


def _rope_from_hf(values: dict) -> dict:
    """The `rope_*` fields out of either form of config.json."""
    rope = next((values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None), {})
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope settings are {rope!r}, wanted an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rope type is {kind!r}, wanted 'default' or 'yarn'")
    for key, value in rope.items():
        if key not in ROPE_KEYS and value is not None:
            raise UserError(f"config.json: rope setting {key} = {value!r} is not known here, and may change "
                            "the arithmetic")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    out = {"rope_theta": 10000.0 if theta is None else theta}
    if kind == "yarn":
        assumed = {"factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0,
                   "original_max_position_embeddings": values.get("max_position_embeddings")}
        out |= {f"rope_{key}": value if rope.get(key) is None else rope[key] for key, value in assumed.items()}
        if not out["rope_mscale_all_dim"]:
            out["rope_mscale"] = 1.0  # transformers looks at mscale only where both are given
    return out


def config_to_hf(fields: dict) -> dict:
    """The fields of model.Config as a `config.json` in its public form, which transformers loads."""
    rope = {name.removeprefix("rope_"): value for name, value in fields.items()
            if name.startswith("rope_") and name != "rope_theta"}
    is_v3 = fields["topk_method"] == "noaux_tc" and fields["scoring_func"] == "sigmoid"
    is_v2 = (fields["topk_method"] != "noaux_tc" and fields["scoring_func"] == "softmax"
             and not fields["norm_topk_prob"])
    name, kind = ("DeepseekV3", "deepseek_v3") if is_v3 else ("DeepseekV2", "deepseek_v2")
    if not (is_v3 or is_v2):  # transformers would load it and compute something else
        name, kind = "Plainseek", "plainseek"
    others = {name: value for name, value in fields.items() if name.removeprefix("rope_") not in rope}
    return others | {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "num_key_value_heads": fields["num_attention_heads"],
        "rope_scaling": rope | {"type": "yarn"} if fields["rope_factor"] > 1 else None,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "tie_word_embeddings": False,
    }


def config_file(directory: str | Path) -> dict:
    """The config.json of a checkpoint directory, as it is. Raises UserError when there is none."""
    try:
        return read_json(Path(directory) / "config.json")
    except FileNotFoundError:
        raise UserError(f"no checkpoint in {directory}: config.json is missing "
                        "(python train.py makes one)") from None


def load_config(directory: str | Path, make: Callable = dict):
    """What `make` (model.Config) makes of a checkpoint directory's config.json: make(**values).

    Raises UserError when there is none, it is another model's, or sizes do not fit together.
    """
    path = Path(directory) / "config.json"
    values = config_from_hf(config_file(directory))
    try:
        return make(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class Quantisation(NamedTuple):
    """How the weights beside a config.json are stored."""

    words: str  # "none" for plain numbers
    block: tuple[int, int] | None = None  # of the weights that share a scale
    is_read: bool = True

    def __str__(self) -> str:
        return self.words + " (not read)" * (not self.is_read)


def quantisation(values: dict) -> Quantisation:
    """What a config.json says of it. What is read is V3's FP8 and plain numbers.

    >>> quantisation({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    Quantisation(words='FP8 (E4M3), a scale for each 128 x 128', block=(128, 128), is_read=True)
    """
    given = values.get("quantization_config")
    if given is None:
        return Quantisation("none")
    given = given if isinstance(given, dict) else {"quant_method": given}
    block = given.get("weight_block_size")
    is_block = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if given.get("quant_method") == "fp8" and given.get("fmt", "e4m3") == "e4m3" and is_block:
        return Quantisation(f"FP8 (E4M3), a scale for each {block[0]} x {block[1]}", (block[0], block[1]))
    bits = set(re.findall(r"'(?:num_)?bits': (\d+)", str(given)))
    width = f", {' and '.join(sorted(bits))} bits" if bits else ""
    return Quantisation(f"{given.get('quant_method')}{width}, weight_block_size {block}", is_read=False)


def preset_names() -> tuple[str, ...]:
    """What `load_preset` knows."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.json")))


def load_preset(name: str) -> dict:
    """Keyword arguments of model.Config for a file of data/presets/. Raises UserError without one.

    Files of released models leave out the ids of their tokenizers, and `initializer_range`, where the
    hub's 0.02 is not the 0.006 of V3 section 4.2.
    """
    names = preset_names()
    if name not in names:
        raise UserError(f"preset: got {name!r}, wanted one of {', '.join(names)}{nearest(name, names)}")
    return config_from_hf(read_json(PRESETS / f"{name}.json"))


def find_config(name: str, make: Callable) -> tuple:
    """What `make` makes of a checkpoint directory or a preset; of a directory also how its weights are stored."""
    if not Path(name).is_dir():
        return make(**load_preset(name)), ""
    return load_config(name, make), str(quantisation(config_file(name)))


# ---------------------------------------------------------------------------------- published names


def mtp_prefixes(num_hidden_layers: int, num_nextn_predict_layers: int) -> tuple[str, ...]:
    """What the names of each MTP module begin with.

    >>> mtp_prefixes(61, 1)
    ('model.layers.61.',)
    """
    return tuple(f"model.layers.{num_hidden_layers + i}." for i in range(num_nextn_predict_layers))


def published_names(state: dict[str, Tensor], num_hidden_layers: int,
                    num_nextn_predict_layers: int) -> dict[str, Tensor]:
    """Published tensor name -> view into the tensors of a state dict, for saving and for loading.

    Stacked experts, gate_up_proj (E, 2F, C) and down_proj (E, C, F), appear as one name per expert
    and matrix; MTP modules bring their copies of embedding and head. Who writes into a view writes
    into the model.
    """
    views = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for i, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1))):  # (F, C) each
                views[f"{prefix}.{i}.gate_proj.weight"] = gate
                views[f"{prefix}.{i}.up_proj.weight"] = up
        elif last == "down_proj":
            views |= {f"{prefix}.{i}.down_proj.weight": down for i, down in enumerate(tensor)}  # (C, F)
        else:
            views[name] = tensor
    for prefix in mtp_prefixes(num_hidden_layers, num_nextn_predict_layers):
        views[prefix + "embed_tokens.weight"] = views["model.embed_tokens.weight"]
        views[prefix + "shared_head.head.weight"] = views["lm_head.weight"]
    return views


# ------------------------------------------------------------------------------------------ weights


def save_weights(directory: str | Path, tensors: dict[str, Tensor], config: dict,
                 shard_bytes: int = SHARD_BYTES, tokenizer=None) -> None:
    """Write config.json, model.safetensors or shards of `shard_bytes` with their index, and the tokenizer.

    All files are complete on disk before the first one takes its place. The weights note which tokenizer
    they were saved with. Raises UserError.
    """
    directory = Path(directory)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files, contents, one_of = ["model.safetensors"], {"config.json": config}, ""
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        one_of = uuid.uuid4().hex  # shards of two saves are not one model
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total, "set": one_of}, "weight_map": weight_map}
        contents["model.safetensors.index.json"] = index
    texts = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in contents.items()}
    if "model_type" in config and not (directory / "README.md").exists():  # a card of the user's own stays
        card = MODEL_CARD.format(**config, total=sum(tensor.numel() for tensor in tensors.values()))
        texts["README.md"] = card.encode()
    notes = {}
    if tokenizer is not None:
        texts |= tokenizer.files(config.get("max_position_embeddings"))
        notes["tokenizer"] = fingerprint(next(texts[name] for name in VOCABULARIES if name in texts))
    with ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(written_aside(directory / name)).write_bytes(text)
        for name, shard in zip(files, shards):
            write_tensors(stack.enter_context(written_aside(directory / name)), shard, notes, one_of)
    for stale in directory.glob("model*.safetensors*"):  # of a save with another number of shards
        if stale.name not in (*files, *contents) and stale.is_file():
            stale.unlink()
    if tokenizer is not None:  # and of another tokenizer
        for name in {*BESIDE, *VOCABULARIES} - set(texts):
            (directory / name).unlink(missing_ok=True)


def open_weights(directory: str | Path) -> dict[str, TensorFile]:
    """Tensor name -> the open file that holds it.

    Raises UserError when there are no weights, they cannot be read, or they are of several saves.
    """
    directory = Path(directory)
    index, names, one_of = directory / "model.safetensors.index.json", ["model.safetensors"], ""
    try:
        if index.exists():
            values = read_json(index)
            names = sorted(set(values["weight_map"].values()))
            one_of = values.get("metadata", {}).get("set", "")
        files = [TensorFile(directory / Path(name).name) for name in names]
    except FileNotFoundError as error:
        raise UserError(f"no weights in {directory}: {error}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: is no index of weights ({type(error).__name__} {error})") from None
    for file in files:
        if file.one_of != one_of:
            raise UserError(f"{file.path}: is of another save than {index.name}")
    return {name: file for file in files for name in file.keys()}


def note_of(directory: str | Path, key: str) -> str | None:
    """What the weights of a directory have noted under a key; None where they have not, or are not there."""
    for path in sorted(Path(directory).glob("model*.safetensors")):
        return TensorFile(path).notes.get(key)
    return None


def identity(directory: str | Path) -> str:
    """16 hexadecimal digits that change with the weights, the config or the tokenizer of a checkpoint."""
    directory = Path(directory)
    files = [*directory.glob("model*.safetensors"), *(directory / name for name in ("config.json", *VOCABULARIES))]
    return fingerprint(*(f"{path.name} {file_digest(path)}".encode() for path in sorted(files) if path.exists()))


def has_mtp(names: Iterable[str], num_hidden_layers: int, num_nextn_predict_layers: int) -> bool:
    """Whether there are weights of MTP modules among the names, where the config has any.

    >>> has_mtp(["model.layers.61.enorm.weight"], 61, 1), has_mtp(["lm_head.weight"], 61, 1)
    (True, False)
    """
    prefixes = mtp_prefixes(num_hidden_layers, num_nextn_predict_layers)
    return not prefixes or any(name.startswith(prefixes) for name in names)


def open_checkpoint(directory: str | Path, make: Callable, with_mtp: bool = True, dtype: torch.dtype | None = None):
    """What `load_config` gives, `open_weights`, the blocks of FP8 scales (see `quantisation`), and the
    dtype asked for, or else that of the embedding in the file, which is never FP8.

    Without MTP modules where the weights have none or `with_mtp` is not asked for: those of the
    weights are not read. What no model has, as `passed_over` knows it, is left out, and a line on
    stderr says so. Raises UserError also where config and weights do not belong together.
    """
    config, values = load_config(directory, make), config_file(directory)
    stored = quantisation(values)
    if not stored.is_read:
        raise UserError(f"{directory}: its weights are quantised ({stored.words}); what is read is bf16, float32 "
                        "and V3's FP8 in blocks: take a copy of the model in one of these")
    files = open_weights(directory)
    if with_mtp and not has_mtp(files, config.num_hidden_layers, config.num_nextn_predict_layers):
        print(f"{directory}: no MTP weights, loading the main model only", file=sys.stderr)
        with_mtp = False
    modules = config.num_nextn_predict_layers
    if not with_mtp:
        config = replace(config, num_nextn_predict_layers=0)
    left_out, why = passed_over(files, config.num_hidden_layers, config.num_nextn_predict_layers, modules)
    if isinstance(values.get("index_topk"), int):
        why.append(f"texts end at {config.max_position_embeddings} tokens, where sparse attention is still dense")
    if why:
        print(f"{directory}: passed over {', '.join(why)}", file=sys.stderr)
    files = {name: file for name, file in files.items() if name not in left_out}
    _check_sizes(directory, files, vars(config))
    first = "model.embed_tokens.weight"
    return config, files, stored.block, dtype or (files[first].dtype(first) if first in files else torch.float32)


def passed_over(names: Iterable[str], layers: int, modules: int, known: int) -> tuple[set[str], list[str]]:
    """Of the names of tensors those that a model does not want, and in words what they are.

    layers, modules: of the main model and of MTP; known: modules that the config has besides, which
    are left on disk without a word.

    >>> passed_over(["model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight"], 2, 0, 0)
    ({'model.layers.0.self_attn.rotary_emb.inv_freq'}, ["1 of RoPE's frequencies (computed here)"])
    """
    kinds = {"of RoPE's frequencies (computed here)": [], "of sparse attention's indexer": [],
             "of MTP beyond num_nextn_predict_layers": []}
    rope, indexer, beyond = kinds.values()
    silent = set()
    for name in names:
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("model.layers.") and parts[2].isdecimal() else 0
        if layer >= layers + modules:
            (beyond.append if layer >= layers + known else silent.add)(name)
        elif name.endswith("rotary_emb.inv_freq"):
            rope.append(name)
        elif ".indexer." in name:
            indexer.append(name)
    return silent.union(*kinds.values()), [f"{len(some)} {kind}" for kind, some in kinds.items() if some]


def _check_sizes(directory: str | Path, names: dict[str, TensorFile], config: dict) -> None:
    """What config.json says of layers, experts and vocabulary against the weights, before memory is touched.

    Raises UserError when they do not belong together.
    """
    layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    experts = {name.split(".experts.")[1].split(".")[0] for name in names if ".mlp.experts." in name}
    main, mtp = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    if len(layers) != main + mtp:
        raise UserError(f"{directory}: config.json has {main} layers and {mtp} of MTP, the weights {len(layers)}")
    if experts and len(experts) != config["n_routed_experts"]:
        raise UserError(f"{directory}: config.json has {config['n_routed_experts']} experts, the weights "
                        f"{len(experts)}")
    name, wanted = "model.embed_tokens.weight", [config["vocab_size"], config["hidden_size"]]
    if name in names and names[name].shape(name) != wanted:
        raise UserError(f"{directory}: {name} has shape {names[name].shape(name)}, config.json wants {wanted}")


def copy_weights(directory: str | Path, files: dict[str, TensorFile], views: dict[str, Tensor],
                 block: tuple[int, int] | None = None) -> None:
    """Fill the views of `published_names` from `open_weights`, a few rows in memory at a time.

    FP8 weights are dequantised by their scales, one for each `block`. A second name of one and the
    same view, as MTP's copies have it, is passed over wherever it is. A terminal sees a bar. Raises
    UserError naming missing or unexpected tensors, or the first of another shape.
    """
    first = {id(view): name for name, view in reversed(views.items())}
    copies = {name for name, view in views.items() if first[id(view)] != name}
    scales = {name for name in files if name.endswith(SCALE)} if block else set()
    if stray := sorted(name for name in scales if name.removesuffix(SCALE) not in files):
        raise UserError(f"{directory}: {stray[0]} has no {stray[0].removesuffix(SCALE)}: a file of the checkpoint "
                        "is missing")
    wanted, found = views.keys() - copies, files.keys() - copies - scales
    for what, odd in (("missing", wanted - found), ("unexpected", found - wanted)):
        if odd:
            shown = sorted(odd)[:5] + ["..."] * (len(odd) > 5)
            raise UserError(f"{directory}: {len(odd)} {what} tensors: {', '.join(shown)}")
    for name in wanted:
        if files[name].shape(name) != list(views[name].shape):
            raise UserError(f"{directory}: {name} has shape {tuple(files[name].shape(name))}, "
                            f"config.json wants {tuple(views[name].shape)}")
    total = sum(files[name].nbytes(name) for name in wanted)
    with progress(total=total, desc="weights", unit="B", unit_scale=True, delay=1, leave=False,
              disable=not (sys.stderr and sys.stderr.isatty())) as bar:
        for name in sorted(wanted, key=lambda name: (str(files[name].path), files[name].place(name))):
            copy_tensor(files, name, views[name], block, bar.update)


def copy_tensor(files: dict[str, TensorFile], name: str, view: Tensor, block: tuple[int, int] | None,
                tell: Callable[[int], None]) -> None:
    """Fill one view, which may be elsewhere than on the CPU; `tell(bytes)` hears of each part."""
    file = files[name]
    is_fp8 = file.dtype(name) == FP8
    if is_fp8 and block is None:
        raise UserError(f"{file.path}: {name} is FP8, and config.json has no quantization_config for it")
    scales = read_scales(files, name, block) if is_fp8 else None  # (., .)
    for rows, values in file.blocks(name, block[0] if is_fp8 else 1):
        tell(values.nbytes)
        out = view[rows] if view.ndim else view
        if is_fp8:
            check_codes(f"{file.path}: {name}", values)
            dequantise(values, scales[rows.start // block[0] : -(-rows.stop // block[0])], block, out)
        else:
            out.copy_(values if view.ndim else values.squeeze(0))
