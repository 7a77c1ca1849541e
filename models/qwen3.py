"""Qwen3, dense: Llama with an RMS norm on every query and key head before rope (``config.qk_norm``)."""

from .llama import Llama


class Qwen3(Llama):
    pass
