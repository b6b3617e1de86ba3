"""Hugging Face's model families: their names of weights and settings, and ours."""
