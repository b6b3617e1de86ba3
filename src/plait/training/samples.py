"""What the model writes after fixed prompts, now and then: samples/step-00000100.txt in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plait.config.training import TrainingConfig
from plait.inference.chat import ChatEngine, ChatSession
from plait.inference.generate import generate
from plait.models.model import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.files import write_file
from plait.training.distributed import World, gathered
from plait.training.metrics import writing

SAMPLES = "samples"
TEMPERATURE = 0.8


def write_samples(
    model: Model, tokenizer: Tokenizer, config: TrainingConfig, run: Path, step: int, world: World
) -> list[tuple[str, str]]:
    """Continue the prompts, write and return (prompt, continuation); [] on all but the first process.

    The same seed each time, so that samples of different steps compare; none of the run's own random numbers
    is drawn.
    """
    with gathered(model), torch.no_grad():
        if not world.first:
            world.barrier()
            return []
        options: dict[str, Any] = {
            "max_new_tokens": config.sample_tokens,
            "temperature": TEMPERATURE,
            "seed": config.seed,
        }
        if config.objective == "chat":
            texts = [f"\n{_answer(model, tokenizer, prompt, options)}" for prompt in config.sample_prompts]
        else:
            texts = generate(model, list(config.sample_prompts), tokenizer=tokenizer, **options)
        world.barrier()
    samples = list(zip(config.sample_prompts, texts, strict=True))
    path = run / SAMPLES / f"step-{step:08d}.txt"
    with writing(path):
        write_file(path, "\n\n---\n\n".join(prompt + text for prompt, text in samples).encode())
    return samples


def _answer(model: Model, tokenizer: Tokenizer, question: str, options: dict[str, Any]) -> str:
    """What the assistant says to one question, with what it calculates."""
    session = ChatSession(ChatEngine(model, tokenizer))
    return "".join(piece.text for piece in session.say(question, **options))
