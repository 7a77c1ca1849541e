"""Drafts: looked up (``ngram``) and checked (``verify``). The verifier proper is the sampler itself."""
