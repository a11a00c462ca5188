"""Checkpoint directories in the layouts that DeepSeek and Moonshot publish, small and with random weights.

Several shards with their index, bf16, FP8 in blocks with ragged edges, each scale in another shard than its
weight; config.json has the keys of the published one. Tokenizers are written by `tokenizers`."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.io import checkpoint
from model import Config, Transformer
from tests.published import FP8

SMALL = dict(vocab_size=512, hidden_size=160, intermediate_size=288, moe_intermediate_size=144, num_hidden_layers=3,
             num_attention_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
             n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1)
KINDS = {  # what is small of each published model; the rest is its own
    "v3": dict(preset="v3", q_lora_rank=96, n_group=4, topk_group=2),
    "v2-lite": dict(preset="v2-lite"),
    "moonlight": dict(preset="moonlight", vocab_size=768),
    "k2": dict(preset="kimi-k2", q_lora_rank=96, vocab_size=768),
}
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")  # never FP8


def random_model(kind: str, **changes) -> Transformer:
    """A model of random bf16 weights, which are large enough that outputs depend on all of them."""
    sizes = SMALL | KINDS[kind] | changes
    torch.manual_seed(0)
    model = Transformer(Config.preset(sizes.pop("preset"), **sizes, initializer_range=0.05), impl="reference").eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.02)
        elif tensor.ndim == 1:  # norms
            tensor.uniform_(0.5, 1.5)
        if not name.endswith("e_score_correction_bias"):  # which is float32 in files
            tensor.copy_(tensor.bfloat16())
    return model


def quantised(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """E4M3 codes (M, K) and the scale of each block, (ceil(M/128), ceil(K/128)), a ragged one of what there is."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    M, K = weight.shape
    scales = torch.empty(-(-M // block), -(-K // block))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            where = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scales[i, j] = weight[where].abs().max() / 448
            codes[where] = (weight[where].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def dequantised(codes: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """The float32 weight (M, K), element by element."""
    rows, columns = (torch.arange(size) // block for size in codes.shape)
    return codes.float() * scales[rows][:, columns]


def published_config(model: Transformer, fp8: bool) -> dict:
    values = checkpoint.config_to_hf(asdict(model.config)) | {"torch_dtype": "bfloat16", "ep_size": 1}
    return values | (FP8 if fp8 else {})


def write(directory: Path, kind: str, fp8: bool = False, shards: int = 3, **changes) -> Transformer:
    """Write the layout of `kind`; returns the float32 model of what the weights are once dequantised."""
    model = random_model(kind, **changes)
    tensors, is_copy = {}, set()
    for name, view in model.published().items():
        is_copy.add(view.data_ptr())
        if name.endswith("e_score_correction_bias"):
            tensors[name] = view.clone()
        elif fp8 and view.ndim == 2 and not any(word in name for word in KEPT):
            codes, scales = quantised(view)
            tensors[name], tensors[name + "_scale_inv"] = codes, scales
            view.copy_(dequantised(codes, scales))
        else:
            tensors[name] = view.bfloat16().contiguous()
    if kind == "moonlight":
        for layer in range(model.config.num_hidden_layers):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    write_shards(directory, tensors, shards)
    (directory / "config.json").write_text(json.dumps(published_config(model, fp8), indent=2))
    return model


def write_shards(directory: Path, tensors: dict[str, Tensor], count: int) -> None:
    """Tensors one after the other into `count` files, a scale into the next file than its weight, and the index."""
    directory.mkdir(parents=True, exist_ok=True)
    shards, weight_map = [{} for _ in range(count)], {}
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        shards[i % count][name] = tensor
        weight_map[name] = f"model-{i % count + 1:05d}-of-{count:06d}.safetensors"
    for i, shard in enumerate(shards):
        save_file(shard, directory / f"model-{i + 1:05d}-of-{count:06d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
