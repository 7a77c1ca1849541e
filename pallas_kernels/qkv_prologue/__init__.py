"""The op between the qkv projection and attention: qk-norm, rope, and the KV write."""
