"""Checkpoint directories as Hugging Face has them: names, tensors and dicts, never a model.

config.json in both of its forms <-> keyword arguments of model.Config; published tensor names <->
views into a model; safetensors files, written whole or not at all. Nothing is ever unpickled.
"""

import glob
import json
import os
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.io.cli import UserError, nearest

SHARD_BYTES = 5_000_000_000  # one safetensors file holds at most this much
PRESETS = Path(__file__).parent.parent / "presets"

# ------------------------------------------------------------------------------------- whole files


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well: whole, or not at all.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; the earlier file is untouched") from None
    finally:
        with suppress(OSError):
            aside.unlink()


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed have left beside `path`."""
    for aside in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        pid = aside.name[len(path.name) + 1 : -len(".part")]
        if os.name == "posix" and pid.isdecimal():  # elsewhere signal 0 is no question
            try:
                os.kill(int(pid), 0)
            except (ProcessLookupError, OverflowError):
                aside.unlink(missing_ok=True)
            except PermissionError:  # it runs, as somebody else's
                pass


def write_json(path: str | Path, value) -> None:
    """Write JSON so that a reader sees the earlier file or this one. Raises UserError."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
        "rope_interleave": True, "quantization_config": None, "index_topk": None}
ASSUMED = {  # per model_type, what holds where the file says nothing
    "deepseek_v3": {},
    "kimi_k2": {},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
                    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
                    "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0},
}


def config_from_hf(values: dict) -> dict:
    """Keyword arguments of model.Config from a `config.json`, in both of its forms.

    The public form has `rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters`.
    Keys that do not touch the arithmetic are passed over; a value that would change it is a UserError.
    """
    kind = values.get("model_type")
    if kind not in ASSUMED:
        raise UserError(f"config.json: model_type is {kind!r}, wanted one of {', '.join(ASSUMED)}")
    for key, only in ONLY.items():
        if values.get(key, only) not in (only, None):
            raise UserError(f"config.json: {key} is {values[key]!r}, only {only!r} is supported")
    if values.get("num_key_value_heads") not in (None, values.get("num_attention_heads")):
        raise UserError("config.json: num_key_value_heads differs from num_attention_heads, "
                        "MLA has one latent")
    given = {key: value for key, value in values.items()
             if key in FIELDS and (value is not None or key == "q_lora_rank")}
    return ASSUMED[kind] | given | _rope_from_hf(values)


def _rope_from_hf(values: dict) -> dict:
    """The `rope_*` fields out of either form of config.json."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope settings are {rope!r}, wanted an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rope type is {kind!r}, wanted 'default' or 'yarn'")
    out = {"rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10000.0}
    if kind == "yarn":
        assumed = {"factor": None, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0,
                   "original_max_position_embeddings": values.get("max_position_embeddings")}
        out |= {f"rope_{key}": rope.get(key) or value for key, value in assumed.items()}
        if not out["rope_mscale_all_dim"]:
            out["rope_mscale"] = 1.0  # transformers looks at mscale only where both are given
    return out


def config_to_hf(fields: dict) -> dict:
    """The fields of model.Config as a `config.json` in its public form, which transformers loads."""
    rope = {name.removeprefix("rope_"): value for name, value in fields.items()
            if name.startswith("rope_") and name != "rope_theta"}
    is_v3 = fields["topk_method"] == "noaux_tc"
    others = {name: value for name, value in fields.items() if name.removeprefix("rope_") not in rope}
    return others | {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "num_key_value_heads": fields["num_attention_heads"],
        "rope_scaling": rope | {"type": "yarn"} if fields["rope_factor"] > 1 else None,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "tie_word_embeddings": False,
    }


def load_config(directory: str | Path) -> dict:
    """Keyword arguments of model.Config from a checkpoint directory.

    Raises UserError when there is no config.json or it is another model's.
    """
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no checkpoint in {directory}: {path.name} is missing "
                        "(python train.py makes one)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a {type(values).__name__}, wanted a JSON object")
    return config_from_hf(values)


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
    return config_from_hf(json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8")))


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
                 shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and model.safetensors, or shards of `shard_bytes` with their index.

    All files are complete on disk before the first one takes its place. Raises UserError.
    """
    directory = Path(directory)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    files, contents = ["model.safetensors"], {"config.json": config}
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        contents["model.safetensors.index.json"] = index
    with ExitStack() as stack:
        for name, value in contents.items():
            aside = stack.enter_context(written_aside(directory / name))
            aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for name, shard in zip(files, shards):
            aside = stack.enter_context(written_aside(directory / name))
            own = {key: view.clone().contiguous() for key, view in shard.items()}  # views share memory
            save_file(own, aside, metadata={"format": "pt"})
    for stale in directory.glob("model*.safetensors*"):  # of a save with another number of shards
        if stale.name not in (*files, *contents):
            stale.unlink()


def open_weights(directory: str | Path) -> dict[str, safe_open]:
    """Tensor name -> the open safetensors file that holds it.

    Raises UserError when there are no weights or they cannot be read.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    try:
        names = ["model.safetensors"]
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        files = [safe_open(directory / Path(name).name, framework="pt") for name in names]
        return {name: file for file in files for name in file.keys()}
    except FileNotFoundError as error:
        raise UserError(f"no weights in {directory}: {error}") from None
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}: weights cannot be read ({error}): "
                        "the file is truncated or foreign") from None


def has_mtp(directory: str | Path, num_hidden_layers: int, num_nextn_predict_layers: int) -> bool:
    """Whether there are weights of MTP modules, where the config has any."""
    prefixes = mtp_prefixes(num_hidden_layers, num_nextn_predict_layers)
    return not prefixes or any(name.startswith(prefixes) for name in open_weights(directory))


def copy_weights(directory: str | Path, views: dict[str, Tensor]) -> None:
    """Fill the views of `published_names` from a directory, one tensor in memory at a time.

    A second name of one and the same view, as MTP's copies have it, is passed over wherever it is.
    Raises UserError naming missing or unexpected tensors, or the first of another shape.
    """
    files = open_weights(directory)
    first = {id(view): name for name, view in reversed(views.items())}
    copies = {name for name, view in views.items() if first[id(view)] != name}
    wanted, found = views.keys() - copies, files.keys() - copies
    for what, odd in (("missing", wanted - found), ("unexpected", found - wanted)):
        if odd:
            shown = sorted(odd)[:5] + ["..."] * (len(odd) > 5)
            raise UserError(f"{directory}: {len(odd)} {what} tensors: {', '.join(shown)}")
    for name in sorted(wanted):
        tensor, view = files[name].get_tensor(name), views[name]
        if tensor.shape != view.shape:
            raise UserError(f"{directory}: {name} has shape {tuple(tensor.shape)}, "
                            f"config.json wants {tuple(view.shape)}")
        view.copy_(tensor)
