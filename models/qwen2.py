"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v (``config.qkv_bias``)."""

from .llama import Llama


class Qwen2(Llama):
    pass
