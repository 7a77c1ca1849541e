"""Writes tiny GGUF files the way llama.cpp's converter lays them out."""

import gguf
import numpy as np
from tokenizers import pre_tokenizers

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name, arch):
    stem, kind = name.rsplit(".", 1)
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = LAYER_NAMES | (
        {
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
        if arch == "gemma3"
        else {"post_attention_layernorm": "ffn_norm"}
    )
    return f"blk.{layer}.{names[part]}.{kind}"


def permuted(weight, num_heads):
    """Rows of each head interleaved: first, middle, second, middle + 1, ... as llama.cpp's rotation wants them."""
    rows = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(path, config, tensors, *, metadata=None, extra=None, dtype=np.float32):
    """A GGUF file of ``tensors`` (Hugging Face names and layout).

    ``metadata`` adds keys, or with None removes them; ``extra`` adds tensors.
    """
    arch = "llama" if config.architecture == "mistral" else config.architecture
    window = next((layer.sliding_window for layer in config.layers if layer.sliding_window), None)
    values = {
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_position,
        f"{arch}.embedding_length": config.model_dim,
        f"{arch}.feed_forward_length": config.ffn_dim,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": max(layer.rope.theta for layer in config.layers),
        f"{arch}.attention.sliding_window": window,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    for name, tensor in tensors.items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permuted(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1.0
        kind = np.float32 if tensor.ndim == 1 else dtype
        writer.add_tensor(gguf_name(name, arch), np.ascontiguousarray(tensor, kind))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    close(writer)
    return path


def write_metadata(path, values):
    """A file with metadata only, such as a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add_value(writer, key, value)
    close(writer)
    return path


def add_value(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_vocabulary(merges, specials=()):
    """``tokenizer.ggml.*`` of a byte-level BPE: the 256 bytes, a token per merge, then control tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge.split(" ")) for merge in merges]
    types = [1] * len(tokens) + [3] * len(specials)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens + list(specials),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
    }
