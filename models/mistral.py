"""Mistral: Llama with a sliding window, which the caller's ``attend`` takes from ``config.layers``."""

from .llama import Llama


class Mistral(Llama):
    pass
