"""Ragged paged attention over a block-table KV pool, for GPU, TPU and plain XLA."""
