"""Threads, determinism and TensorFloat-32 of torch for the length of a run; as before afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plait.config.training import TrainingConfig

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def torch_settings(config: TrainingConfig) -> Iterator[None]:
    """Set what the config says, and take it back at the end of the block."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    products = torch.get_float32_matmul_precision()
    try:
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            os.environ.setdefault(_WORKSPACE, ":4096:8")  # cuBLAS asks for it; read when its handle is made
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(products)
