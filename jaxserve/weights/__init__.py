"""Checkpoints: opening them, loading their parameters and their tokenizers."""

from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.load import load_params
from jaxserve.weights.tokenizer import eos_token_ids, load_tokenizer

__all__ = ["Checkpoint", "eos_token_ids", "load_params", "load_tokenizer", "open_checkpoint"]
