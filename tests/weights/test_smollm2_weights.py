"""SmolLM2 from its GGUF file: ids, values, and the same model exported to a Hugging Face and an Orbax directory."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.models.registry import build
from jaxserve.weights import load_params, load_tokenizer, open_checkpoint
from jaxserve.weights.convert import convert

pytestmark = pytest.mark.real_model
GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "smollm2.json").read_text())
TEXTS = {  # ids by the rule that llama.cpp applies: digits one by one, then GPT-2's words
    "1234 + 5678 = 6912": [33, 34, 35, 36, 1232, 216, 37, 38, 39, 40, 446, 216, 38, 41, 33, 34],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Caf\u00e9 d\u00e9j\u00e0 vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def params(smollm2):
    return load(smollm2)


def load(checkpoint):
    model = build(checkpoint.config, dtype="float32", padded_vocab=checkpoint.config.vocab_size)
    return load_params(checkpoint, model, progress=False)


def test_config(smollm2):
    config = smollm2.config
    assert (config.architecture, config.num_layers, config.model_dim, config.ffn_dim) == ("llama", 30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert (config.layers[0].rope.theta, config.norm_eps, config.max_position) == (1e5, 1e-5, 8192)
    assert config.tie_embeddings
    assert smollm2.eos_token_ids == (2,)
    assert open_checkpoint(str(toml("smollm2-135m")), "dummy").config == config


def toml(name):
    return Path(__file__).resolve().parents[2] / "configs" / "models" / f"{name}.toml"


@pytest.mark.parametrize("name", GOLDEN)
def test_prompt_ids(tokenizer, name):
    golden = GOLDEN[name]
    if golden["chat"]:
        messages = [{"role": "user", "content": golden["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer.encode(golden["prompt"])
    assert ids == golden["input_ids"]
    assert tokenizer.decode(golden["greedy"]) == golden["text"]


@pytest.mark.parametrize("text", TEXTS)
def test_frozen_ids(tokenizer, text):
    assert tokenizer.encode(text) == TEXTS[text]
    assert tokenizer.decode(TEXTS[text]) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert tokenizer.decode([1, 4093, 2], skip_special_tokens=True) == "user"


@pytest.fixture(scope="module")
def raw(smollm2_path):
    """The file's tensors by the gguf package's own reader, in Hugging Face's [out, in]."""
    tensors = gguf.GGUFReader(smollm2_path).tensors
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


def hf_rows(weight):
    """q or k rows as Hugging Face has them: llama.cpp interleaves the halves of each head."""
    heads = weight.reshape(-1, 64, weight.shape[-1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(weight.shape)


def test_dequantised_values(params, raw):
    layer = params["layers"][17]
    q, k, v = hf_rows(raw["blk.17.attn_q.weight"]), hf_rows(raw["blk.17.attn_k.weight"]), raw["blk.17.attn_v.weight"]
    qkv = np.asarray(layer["attn"]["qkv"]["weight"])
    assert qkv.shape == (576, 3, 5, 64)
    np.testing.assert_array_equal(qkv[:, 1, 2], q[(1 * 3 + 2) * 64 :][:64].T)
    np.testing.assert_array_equal(qkv[:, 2, 3], k[2 * 64 :][:64].T)
    np.testing.assert_array_equal(qkv[:, 2, 4], v[2 * 64 :][:64].T)
    np.testing.assert_array_equal(layer["attn"]["o"]["weight"][2, 1], raw["blk.17.attn_output.weight"].T[7 * 64 :][:64])
    np.testing.assert_array_equal(layer["mlp"]["gate_up"]["weight"][:, 1], raw["blk.17.ffn_up.weight"].T)
    np.testing.assert_array_equal(params["embed"]["weight"], raw["token_embd.weight"])


def export_to_hf(raw, directory):
    """An ordinary Hugging Face directory of the file's tensors, names written out here."""
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors = {}
    for name, tensor in raw.items():
        if not name.startswith("blk."):
            top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
            tensors[top] = np.ascontiguousarray(tensor)
            continue
        _, layer, part, _ = name.split(".")
        rows = hf_rows(tensor) if part in ("attn_q", "attn_k") else tensor
        tensors[f"model.layers.{layer}.{names[part]}.weight"] = np.ascontiguousarray(rows)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    (directory / "config.json").write_text(json.dumps(config))


def assert_equal_trees(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_an_exported_hf_directory_is_the_same_model(tmp_path, smollm2, tokenizer, params, raw):
    export_to_hf(raw, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config == smollm2.config
    assert checkpoint.eos_token_ids == (2,)
    assert_equal_trees(load(checkpoint), params)
    again = load_tokenizer(checkpoint)
    assert all(again.encode(text) == ids for text, ids in TEXTS.items())
    assert again.chat_template == tokenizer.chat_template


def test_a_converted_orbax_directory_is_the_same_model(tmp_path, smollm2, params):
    convert(smollm2, tmp_path / "orbax", progress=False)
    checkpoint = open_checkpoint(str(tmp_path / "orbax"))
    assert (checkpoint.config, checkpoint.eos_token_ids) == (smollm2.config, smollm2.eos_token_ids)
    assert_equal_trees(load(checkpoint), params)
    assert all(load_tokenizer(checkpoint).encode(text) == ids for text, ids in TEXTS.items())
