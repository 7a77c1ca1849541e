"""The device side of a step: KV cache, plans -> padded arrays, the jitted step, the closed set of executables."""
