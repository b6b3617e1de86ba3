"""Where nanochat keeps things: which checkpoint a path means, its meta file, the tokenizer beside it.

    <base>/tokenizer/
    <base>/{base,mid,chatsft,chatrl}_checkpoints/d<depth>/model_<step>.pt, meta_<step>.json, optim_<step>*.pt

<base> is the environment's NANOCHAT_BASE_DIR, else .cache/nanochat in the home folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from plait.config.errors import CheckpointError, nearest

_MODEL = re.compile(r"model_(\d+)\.pt")
_STAGES = "_checkpoints"


def base_folder() -> Path:
    """nanochat's own folder of this user."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")


def find_weights(path: Path) -> Path:
    """The file that a path means: itself, or the last step of the largest d<depth> below it.

    ``path`` may be a file, a model's folder, a stage's (``base_checkpoints``), or nanochat's own if it holds one
    stage. CheckpointError if there is none, or the choice is not clear.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"there is no {path}{nearest(path.name, beside)}")
    steps = {int(match[1]): p for p in path.iterdir() if (match := _MODEL.fullmatch(p.name))}
    if steps:
        return steps[max(steps)]
    folders = [p for p in path.iterdir() if p.is_dir()]
    stages = sorted(p.name for p in folders if p.name.endswith(_STAGES))
    if len(stages) > 1:
        raise CheckpointError(f"{path} holds {', '.join(stages)}; give one of these folders")
    if stages:
        return find_weights(path / stages[0])
    depths = {int(match[1]): p for p in folders if (match := re.fullmatch(r"d(\d+)", p.name))}
    if depths:
        return find_weights(depths[max(depths)])
    tags = sorted(p.name for p in folders if any(_MODEL.fullmatch(inside.name) for inside in p.iterdir()))
    if len(tags) == 1:
        return find_weights(path / tags[0])
    raise CheckpointError(
        f"{path} holds several models, {', '.join(tags)}; give one of these folders"
        if tags
        else f"{path} holds no checkpoint of nanochat's: looked for model_<step>.pt, d<depth>, *{_STAGES}"
    )


def step_of(weights: Path) -> int | None:
    """The step in the name of a file of weights, or None if it is no name of nanochat's."""
    match = _MODEL.fullmatch(weights.name)
    return int(match[1]) if match else None


def weights_file(folder: Path, step: int) -> Path:
    """The file of a step's weights."""
    return folder / f"model_{step:06d}.pt"


def meta_file(folder: Path, step: int) -> Path:
    """The file that describes a step."""
    return folder / f"meta_{step:06d}.json"


def optimizer_file(folder: Path, step: int, rank: int | None = None) -> Path:
    """The file of the optimizers' state after a step; ``rank``: of one process, as nanochat wrote it since November."""
    return folder / (f"optim_{step:06d}.pt" if rank is None else f"optim_{step:06d}_rank{rank}.pt")


def optimizer_files(folder: Path, step: int) -> list[Path]:
    """The files of the optimizers' state after a step, those of several processes by rank; none if there are none.

    CheckpointError if a rank is missing among them, or two kinds lie side by side.
    """
    single = optimizer_file(folder, step)
    ranked = re.compile(rf"{single.stem}_rank(\d+)\.pt")
    ranks = {int(match[1]): p for p in folder.iterdir() if (match := ranked.fullmatch(p.name))}
    if not ranks:
        return [single] if single.is_file() else []
    if single.is_file():
        raise CheckpointError(
            f"{folder} holds both {single.name} and {ranks[min(ranks)].name}; keep one of them"
        )
    for rank in range(max(ranks)):
        if rank not in ranks:
            missing = optimizer_file(folder, step, rank).name
            raise CheckpointError(f"{folder}: {missing} is missing beside {ranks[max(ranks)].name}")
    return [ranks[rank] for rank in sorted(ranks)]


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model's folder is: below nanochat's own folder, or beside the weights."""
    above = folder.absolute().parent
    return (above.parent if above.name.endswith(_STAGES) else folder) / "tokenizer"
