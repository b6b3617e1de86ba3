"""The contract of section 4 of the design, for every mixer of the table in two precisions."""

from __future__ import annotations

import pytest
import torch

from plait.config.errors import BuildError
from plait.config.table import kinds
from plait.mixers.contract import Layout
from plait.nn.roles import parameter_roles
from tests.invariants import (
    BESIDES,
    TOLERANCE,
    TWO_WAY,
    VARIANTS,
    build_mixer,
    check_batch,
    check_causal,
    check_edges,
    check_fork,
    check_gradient_through_states,
    check_packed,
    check_packed_states,
    check_splits,
    check_steps,
    lay,
    make_mixer,
    sequences,
)

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
causal = pytest.mark.parametrize("name", {**VARIANTS, **BESIDES})
every = pytest.mark.parametrize("name", {**VARIANTS, **TWO_WAY, **BESIDES})


def build(name: str, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    kind, options = {**VARIANTS, **TWO_WAY, **BESIDES}[name]
    return make_mixer(kind, options, dtype=dtype)


def test_every_kind_of_the_table_is_tested() -> None:
    assert {kind for kind, _ in VARIANTS.values()} == set(kinds())


@dtypes
@causal
@pytest.mark.parametrize("in_place", [False, True], ids=["forward", "step"])
def test_any_split_equals_one_call(name: str, in_place: bool, dtype: torch.dtype) -> None:
    check_splits(build(name, dtype), TOLERANCE[dtype], in_place=in_place)


@dtypes
@causal
def test_token_by_token_equals_one_call(name: str, dtype: torch.dtype) -> None:
    check_steps(build(name, dtype), TOLERANCE[dtype])


@dtypes
@every
def test_packed_equals_separate(name: str, dtype: torch.dtype) -> None:
    check_packed(build(name, dtype), TOLERANCE[dtype])


@dtypes
@causal
def test_packed_equals_separate_with_states(name: str, dtype: torch.dtype) -> None:
    check_packed_states(build(name, dtype), TOLERANCE[dtype])


@dtypes
@causal
def test_nothing_reaches_back(name: str, dtype: torch.dtype) -> None:
    check_causal(build(name, dtype))


@dtypes
@every
def test_the_rest_of_the_batch_changes_nothing(name: str, dtype: torch.dtype) -> None:
    check_batch(build(name, dtype), TOLERANCE[dtype])


@causal
def test_a_restored_clone_gives_the_same_bits(name: str) -> None:
    check_fork(build(name, torch.float32))


@every
def test_no_tokens_no_sequences_one_token(name: str) -> None:
    check_edges(build(name))


@causal
def test_gradients_flow_through_states(name: str) -> None:
    check_gradient_through_states(build(name), TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", TWO_WAY)
def test_a_mixer_that_looks_ahead_keeps_no_state(name: str) -> None:
    mixer = build(name)
    assert not mixer.causal and not mixer.stateful
    with pytest.raises(BuildError, match="keeps no state: it is not causal"):
        mixer.init_state(1)
    xs = torch.cat(sequences(mixer, [20, 20]))
    other = xs.clone()
    other[:, 15] += 1
    before, after = (mixer(x, Layout.dense(2, 20))[0] for x in (xs, other))
    assert not torch.equal(before[:, 14], after[:, 14])


@every
def test_every_parameter_has_a_role(name: str) -> None:
    mixer = build(name)
    assert parameter_roles(mixer).keys() == dict(mixer.named_parameters()).keys()


@causal
def test_state_dtypes_and_bytes(name: str) -> None:
    mixer = build(name, torch.float32)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        state = mixer.init_state(3, 10, dtype=dtype)
        assert state.nbytes == mixer.state_bytes(3, 10, dtype)
        for tensor in state.values():
            assert tensor.shape[0] == 3
            assert tensor.dtype == dtype or (dtype == torch.bfloat16 and tensor.dtype == torch.float32)


@causal
def test_autocast_leaves_states_alone(name: str) -> None:
    mixer = build(name, torch.float32)
    (x,) = sequences(mixer, [20])
    state = mixer.init_state(1, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, new = mixer(x, lay(Layout.dense(1, 20), x), state)
    assert new is not None
    assert {n: t.dtype for n, t in new.items()} == {n: t.dtype for n, t in state.items()}


@every
def test_flops_count_every_linear_map(name: str) -> None:
    mixer = build(name)
    assert mixer.flops(10) >= 10 * 2 * sum(
        p.numel() for n, p in mixer.named_parameters() if "proj.weight" in n
    )
    assert mixer.flops(10) < mixer.flops(20)


@every
def test_meta_build_and_initialisation_write_every_element(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        mixer = build_mixer(*{**VARIANTS, **TWO_WAY, **BESIDES}[name])
    mixer.to_empty(device="cpu")
    with torch.no_grad():
        for p in mixer.parameters():
            p.fill_(float("nan"))
    for module in mixer.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()  # type: ignore[operator]
    for n, p in mixer.named_parameters():
        assert p.isfinite().all(), f"{n} was left uninitialised"
