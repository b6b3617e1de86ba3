"""Inference: prefill, decode, sample as small functions, and generation composed of them."""
