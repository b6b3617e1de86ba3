"""The optimizer's finer settings as data: Muon's variants, and what single groups of parameters have of their own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from plait.config.errors import ConfigError
from plait.config.section import Section


class MuonConfig(Section):
    """Muon (Jordan 2024): a matrix's momentum is orthogonalised; below are the published variants of it."""

    momentum: float = Field(0.95, ge=0, lt=1, description="share of the past in the average of gradients")
    momentum_start: float | None = Field(
        None, ge=0, lt=1, description="momentum at the first step; null: no rise"
    )
    momentum_warmup: int = Field(
        300, gt=0, description="steps in which it rises from momentum_start to momentum"
    )
    momentum_end: float | None = Field(
        None, ge=0, lt=1, description="where it goes in the last decay_fraction of the run; null: it stays"
    )
    method: Literal["newton_schulz", "polar_express"] = Field(
        "newton_schulz", description="one polynomial at each step, or one for each (arXiv 2505.16932)"
    )
    steps: int = Field(5, gt=0, le=20, description="steps of the orthogonalisation")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="of the orthogonalisation")
    scale: Literal["adamw", "shape"] = Field(
        "adamw",
        description="of an update with n rows and m columns: 0.2 sqrt(max(n, m)), AdamW's size "
        "(arXiv 2502.16982), or sqrt(max(1, n / m))",
    )
    parts: bool = Field(
        False, description="orthogonalise each part of a joined matrix (queries, keys, values) alone"
    )
    equal_rows: bool = Field(
        False, description="bring all rows to one norm before the orthogonalisation (arXiv 2603.28254)"
    )
    renormalise: bool = Field(
        False, description="after it, bring the whole to the norm sqrt(min(n, m)) (arXiv 2602.21545)"
    )
    beta2: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="average of squares that evens out the rows or columns (NorMuon, arXiv 2510.05491); null: no",
    )
    cautious: bool = Field(
        False,
        description="decay only what the update shrinks anyway, at the update's scaled rate (arXiv 2510.12402)",
    )
    weight_decay: float | None = Field(None, ge=0, description="decay of Muon's matrices; null: weight_decay")

    @model_validator(mode="after")
    def _steps_have_coefficients(self) -> MuonConfig:
        if self.method == "polar_express" and self.steps > POLAR_EXPRESS_STEPS:
            raise ConfigError(
                f"polar_express has {POLAR_EXPRESS_STEPS} steps at most; got {self.steps}", ("steps",)
            )
        return self


POLAR_EXPRESS_STEPS = 5


class GroupConfig(Section):
    """What the parameters whose names match a pattern have of their own; null: as their role has it."""

    lr: float | None = Field(None, ge=0, description="peak learning rate")
    betas: tuple[float, float] | None = Field(None, description="AdamW's averages of gradient and square")
    eps: float | None = Field(None, gt=0, description="AdamW's, added to the root of the square")
    weight_decay: float | None = Field(None, ge=0, description="decay, the same throughout the run")
    optimizer: Literal["adamw", "muon"] | None = Field(
        None, description="which one; muon takes matrices of two dimensions alone"
    )

    @model_validator(mode="after")
    def _betas_fit(self) -> GroupConfig:
        check_betas(self.betas)
        return self


def check_betas(betas: tuple[float, float] | None) -> None:
    """ConfigError unless both are at least 0 and below 1."""
    if betas is not None and not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"each must be at least 0 and below 1; got {list(betas)}", ("betas",))
