"""One small config a family, with sizes that fill no tile."""

from dataclasses import replace

from jaxserve.models.config import LayerConfig, ModelConfig, RopeConfig

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=131,
    model_dim=48,
    ffn_dim=76,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    layers=(LayerConfig(RopeConfig(1e4)),) * 3,
    max_position=64,
    norm_eps=1e-6,
    tie_embeddings=False,
    attention_scale=12**-0.5,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, architecture="mistral"),
    "qwen2": replace(LLAMA, architecture="qwen2", qkv_bias=True),
    "qwen3": replace(LLAMA, architecture="qwen3", qk_norm=True),
    "gemma3": replace(LLAMA, architecture="gemma3", qk_norm=True),
}
