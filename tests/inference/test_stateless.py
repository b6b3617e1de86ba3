"""A user's layer that keeps no state: it generates all the same, by running over the whole text, and says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from plait.config.options import Options
from plait.config.table import temporary_mixer
from plait.inference.generate import complete, generate
from plait.mixers.contract import Layout, Mixer, State
from plait.models import Model
from tests.inference.helpers import greedy_by_hand, make_model, tokens


class RunningMean(Mixer):
    """The mean of all tokens so far, mapped."""

    options_class = Options
    stateful = False

    def __init__(
        self, options: Options, d_model: int, *, causal: bool, layer_index: int, linear: str
    ) -> None:
        super().__init__(d_in=d_model, d_out=d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        self.refuse_state(state)
        x = self.proj(layout.pad(x))
        return layout.unpad(x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]), None


@pytest.fixture
def model() -> Iterator[Model]:
    with temporary_mixer("running_mean", RunningMean):
        yield make_model(["gru", "running_mean"])


def test_it_writes_what_the_whole_text_says_and_warns_once(model: Model) -> None:
    prompts = tokens(3, 9)
    with pytest.warns(UserWarning, match=r"layer 1 \(running_mean\) keeps no state"):
        ours = generate(model, prompts, temperature=0, max_new_tokens=8)
    assert ours == [greedy_by_hand(model, prompt, 8) for prompt in prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, prompts, max_new_tokens=2)


def test_rows_end_and_fork_without_a_cache_as_with_one(model: Model) -> None:
    for stateless in (model, make_model("lstm")):
        options = {"seed": [4, 9], "num_samples": 2, "max_new_tokens": 20, "use_cache": False}
        free = generate(stateless, tokens(3, 5), **options)
        ends = [free[0][3], free[1][2], free[2][8]]
        rows = complete(stateless, tokens(3, 5), eos_token_id=ends, **options)
        for row, whole in zip(rows, free, strict=True):
            assert row.ids == whole[: next((i + 1 for i, t in enumerate(whole) if t in ends), 20)]
    options["use_cache"] = True
    assert complete(stateless, tokens(3, 5), eos_token_id=ends, **options) == rows
