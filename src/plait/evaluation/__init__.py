"""Evaluation: how well a model predicts text, in bits per byte, beside what file compressors reach."""
