"""The logit at or above which top_k and top_p keep the ids of a row."""
