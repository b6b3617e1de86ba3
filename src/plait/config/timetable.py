"""What happens when in a run, as data: which steps are saved and kept, how long the sequences are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from plait.config.errors import ConfigError
from plait.config.section import Section

Spacing = Literal["none", "linear", "log"]


class CheckpointSchedule(Section):
    """Steps whose checkpoints are written and never removed; shorthand: a list of steps.

    The forms add up: explicit steps, steps spaced over the whole run, and steps by epoch. Any form but the
    explicit one also keeps the last step.
    """

    steps: list[int] = Field(default_factory=list, description="these steps; 0: before the first update")
    spacing: Spacing = Field(
        "none", description="over the run: every `interval` steps, or at 1, base, base^2, ..."
    )
    first_epoch: int = Field(
        0, ge=0, description="so many evenly over the first epoch, its beginning (step 0) and end included"
    )
    later_epochs: Spacing = Field(
        "none",
        description="in each later epoch: every `interval` steps, or base, base^2, ... after its begin",
    )
    interval: int | None = Field(
        None, gt=0, description="linear: steps between; null: a tenth of the run or of the epoch"
    )
    base: float = Field(2.0, gt=1, description="log: the base")
    min_interval: int = Field(1, gt=0, description="spaced steps closer to the one before are left out")
    min_per_epoch: int = Field(
        0, ge=0, description="later epochs: where spacing gives fewer, so many evenly instead"
    )

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """A list to ``{"steps": list}``."""
        if isinstance(data, Sequence) and not isinstance(data, str):
            return {"steps": list(data)}
        return data

    @model_validator(mode="after")
    def _steps_are_steps(self) -> CheckpointSchedule:
        wrong = [step for step in self.steps if step < 0]
        if wrong:
            raise ConfigError(f"a step is 0 or more; got {wrong[0]}", ("steps",))
        return self

    @property
    def by_epoch(self) -> bool:
        """Whether the steps of an epoch must be known."""
        return self.first_epoch > 0 or self.later_epochs != "none"


class SequenceStage(Section):
    """Shorter sequences in an early share of the run."""

    length: int = Field(gt=1, description="tokens a sequence; data.sequence_length if that is shorter")
    until: float = Field(gt=0, le=1, description="share of the run at which the next stage begins")


def check_stages(stages: Sequence[SequenceStage]) -> None:
    """ConfigError unless each stage ends after the one before."""
    for index in range(1, len(stages)):
        if stages[index].until <= stages[index - 1].until:
            raise ConfigError(
                f"stage {index + 1} ends at {stages[index].until:g} of the run, not after the one before "
                f"({stages[index - 1].until:g})",
                (index, "until"),
            )
