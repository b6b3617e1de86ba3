"""From a config to a trained model: a loop, objectives, optimizers, schedules, checkpoints, many processes."""

from plait.training.trainer import Trainer, TrainResult, train

__all__ = ["TrainResult", "Trainer", "train"]
