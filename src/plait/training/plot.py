"""The loss curve of a run as a PNG, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.config.errors import TrainingError
from plait.training.metrics import METRICS, read_metrics, writing

CURVE = "loss.png"
WINDOWS = 40  # the smoothed curve is a mean over about this share of the run


def plot_run(run: str | Path, path: str | Path | None = None) -> Path:
    """Draw the training curve (as logged, and smoothed) and the held-out points; returns the PNG's path.

    In bits per byte where the run has them, else in nats a target. TrainingError if matplotlib is not
    installed, if nothing was logged, or if the file cannot be written.
    """
    folder = Path(run)
    out = Path(path) if path is not None else folder / CURVE
    records = read_metrics(folder)
    train = [record for record in records if record.get("kind") == "train"]
    held_out = [record for record in records if record.get("kind") == "evaluation"]
    if not train:
        raise TrainingError(f"{folder / METRICS} holds no logged step to plot")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainingError("a plot needs matplotlib: pip install 'plait[plots]'") from None
    per_byte = all(record.get("bits_per_byte") is not None for record in (*train, *held_out))
    key = "bits_per_byte" if per_byte else "loss"
    steps, values = _series(train, key)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, values, color="C0", alpha=0.25, linewidth=1)
    axes.plot(steps, smoothed(values), color="C0", linewidth=2, label="training (smoothed)")
    if held_out:
        places, losses = _series(held_out, key)
        axes.plot(places, losses, color="C1", marker="o", markersize=4, linewidth=1.5, label="held out")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (places[-1], losses[-1]),
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
        )
    # The first steps fall from the loss of a guess; they would flatten everything that follows.
    later = values[len(values) // 20 :]
    shown = [*later, *(record[key] for record in held_out)]
    margin = 0.05 * (max(shown) - min(shown)) + 0.01
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_title(folder.resolve().name)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if per_byte else "loss (nats a target)")
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    return out


def smoothed(values: list[float]) -> list[float]:
    """Exponential means without the bias towards the first value."""
    keep = max(0.0, 1.0 - WINDOWS / max(1, len(values)))
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1.0
        means.append(total / weight)
    return means


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[key] for record in records]
