"""The state of nanochat's optimizers: read, it takes the further steps that nanochat takes; written, nanochat does.

nanochat's side is tests/formats/nanochat_optimizers.py, itself held to what nanochat's optimizers did (the fixtures).
Both sides orthogonalise in float32, so that a difference is one of states, not of rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.config.schema import ModelConfig
from plait.config.training import TrainingConfig
from plait.formats.nanochat import from_state_dict, read, read_meta, write
from plait.formats.nanochat_files import optimizer_files
from plait.formats.nanochat_groups import adamw_groups, muon_groups
from plait.formats.nanochat_optimizer import read_optimizer
from plait.formats.nanochat_run import run_config
from plait.models.model import Model
from plait.training.optimizers import Optimizer
from tests.formats.nanochat_optimizers import loss_of, shares, weights_of
from tests.formats.nanochat_sides import (
    FOLDERS,
    STEPS,
    Theirs,
    batches,
    begun,
    begun_on,
    config_of,
    far,
    files_of,
    meta_of,
    tensors_of,
    trained,
)

both = pytest.mark.parametrize("name", ["october", "july"])


def settings_of(folder: Path, config: ModelConfig) -> TrainingConfig:
    """As converted, with the momentum and the rounding of nanochat's side."""
    state = read_optimizer(optimizer_files(folder, 13), config)
    training = run_config(read_meta(folder), config, state, 13).training
    muon = training.muon.replace(momentum=0.95, precision="fp32")
    return training.replace(muon=muon, weight_decay=0.28 if config.backout else training.weight_decay)


def ours(folder: Path) -> tuple[Model, Optimizer]:
    """The model of a folder of nanochat's, and the optimizer with the state that lies there."""
    model = read(folder)[0].train()
    optimizer = Optimizer(model, settings_of(folder, model.config))
    found, own = read_optimizer(optimizer_files(folder, 13), model.config).tensors, optimizer.state()
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        assert tensor.shape == found[name].shape and tensor.dtype == found[name].dtype == torch.float32, name
        tensor.copy_(found[name])
    return model, optimizer


def advance(model: Model, optimizer: Optimizer, some: Sequence[tuple[Tensor, Tensor]]) -> None:
    for ids, targets in some:
        optimizer.zero_grad()
        loss_of(model, ids, targets).backward()
        optimizer.step()


@both
def test_the_tests_own_optimizers_are_nanochats(name: str) -> None:
    """Two steps against what nanochat computed (July's with the rates that the oracle took)."""
    theirs = begun(name, **({"weight_decay": 0.0} if name == "july" else {}))
    if name == "july":
        for group, recorded in zip(
            theirs.optimizers[0].param_groups,
            json.loads((FOLDERS[name] / "optimizer_steps.json").read_text())["groups"],
            strict=True,
        ):
            members = [n for n, w in theirs.weights.items() if any(w is p for p in group["params"])]
            assert sorted(members) == sorted(recorded["params"])
            group["lr"] = recorded["lr"]
            assert all(
                list(v) == recorded[k] if k == "betas" else v == recorded[k]
                for k, v in group.items()
                if k in ("betas", "eps", "weight_decay", "kind", "momentum", "beta2")
            )
    wanted = load_file(FOLDERS[name] / "optimizer_steps.safetensors")
    for step in (1, 2):
        theirs.advance(batches(name)[:1])
        for key in [k for k in wanted if k.startswith(f"step{step}.")]:
            errors = (
                (theirs.weights[key.removeprefix(f"step{step}.")] - wanted[key])
                .detach()
                .abs()
                .flatten()
                .sort()
                .values
            )
            median, late = float(errors[len(errors) // 2]), float(errors[int(0.99 * (len(errors) - 1))])
            matrix = name == "october" and ".h." in key
            limits = (1e-6, 1e-4) if name == "july" else (2e-4, 2e-3) if matrix else (1e-4, 5e-3)
            assert median < limits[0] and late < limits[1], (key, median, late)


@both
def test_the_groups_and_their_order_are_nanochats(name: str) -> None:
    recorded = json.loads((FOLDERS[name] / "optimizer_steps.json").read_text())["groups"]
    config = config_of(name)
    made = adamw_groups(config) + muon_groups(config, by_shape=name == "july")
    assert [[n for n, _ in members] for members in made] == [group["params"] for group in recorded]


@pytest.mark.parametrize(
    ("name", "kind", "by_shape"),
    [
        ("october", "one", False),
        ("october", "one", True),  # torchrun with one process
        ("november", "2", True),
        ("november", "3", True),
        ("july", "one", True),
        ("july", "2", True),
        ("july", "8", True),  # more processes than some groups have matrices
    ],
)
def test_further_steps_are_nanochats(name: str, kind: str, by_shape: bool, tmp_path: Path) -> None:
    theirs = trained(name, by_shape)
    folder = theirs.save(tmp_path / "d4", files_of(theirs, kind))
    model, optimizer = ours(folder)
    advance(model, optimizer, batches(name)[STEPS:])
    theirs.advance(batches(name)[STEPS:])
    assert far(model, theirs) == {}


def forget(what: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            if name.startswith(f"{what}."):
                tensor.zero_()

    return change


def swap_parts(state: dict[str, Tensor]) -> None:
    """Keys and values change places in the joined matrix: 16 rows each, after 32 of queries."""
    for name, tensor in state.items():
        if name.startswith("momentum_buffer.") and name.endswith("in_proj.weight"):
            tensor.copy_(torch.cat([tensor[:32], tensor[48:], tensor[32:48]]))


CHANGES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    **{what: forget(what) for what in ("exp_avg", "exp_avg_sq", "step", "momentum_buffer", "second_moment")},
    "keys and values": swap_parts,
}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (name, what)
        for name in ("october", "july")
        for what in CHANGES
        if (name, what) != ("october", "second_moment")
    ],
)
def test_every_part_of_the_state_matters(name: str, what: str, tmp_path: Path) -> None:
    """What the test above compares does not agree by chance."""
    theirs = trained(name)
    model, optimizer = ours(theirs.save(tmp_path / "d4", files_of(theirs, "one")))
    CHANGES[what](optimizer.state())
    advance(model, optimizer, batches(name)[STEPS:])
    theirs.advance(batches(name)[STEPS:])
    assert far(model, theirs)


@pytest.mark.parametrize(("name", "processes"), [("october", 1), ("july", 1), ("july", 4)])
def test_what_is_written_is_what_nanochat_wrote(name: str, processes: int, tmp_path: Path) -> None:
    """Its own optimizer takes the file in, and further steps there are those here."""
    theirs = trained(name)
    folder = theirs.save(tmp_path / "d4", files_of(theirs, "one"))
    model, optimizer = ours(folder)
    write(model, tmp_path / "back", step=13, optimizer=optimizer, processes=processes)
    written = [torch.load(f, weights_only=True) for f in optimizer_files(tmp_path / "back", 13)]
    state = theirs.state()
    wanted = [state] if name == "october" else shares(state, processes)
    assert len(written) == len(wanted)
    for got, want in zip(written, wanted, strict=True):
        for mine, original in zip(*((got, want) if name == "october" else ([got], [want])), strict=True):
            assert mine["state"].keys() == original["state"].keys()
            for number, entry in original["state"].items():
                assert mine["state"][number].keys() == entry.keys()
                for what, value in entry.items():
                    other = mine["state"][number][what]
                    assert type(other) is type(value) and torch.equal(
                        torch.as_tensor(other), torch.as_tensor(value)
                    ), (number, what)
            for group, own in zip(original["param_groups"], mine["param_groups"], strict=True):
                assert group.keys() == own.keys() and group["params"] == own["params"]
                for key in ("initial_lr", "betas", "eps", "kind", "ns_steps", "beta2", "nesterov"):
                    assert (
                        own.get(key) == pytest.approx(group.get(key))
                        if key != "kind"
                        else own.get(key) == group.get(key)
                    ), key
    if processes > 1:
        return
    fresh = Theirs(name, weights_of({n: w.detach() for n, w in theirs.weights.items()}), [])
    fresh.optimizers = begun_on(fresh)
    for part, saved in zip(fresh.optimizers, written[0] if name == "october" else written, strict=True):
        part.load_state_dict(saved)
    fresh.advance(batches(name)[STEPS:])
    advance(model, optimizer, batches(name)[STEPS:])
    assert far(model, fresh) == {}


def state_of(states: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """July's state dict of a rank, to be damaged."""
    found: dict[str, Any] = states[f"optim_000013_rank{rank}.pt"]
    return found


def drop(states: dict[str, Any], *files: str) -> None:
    for file in files:
        del states[f"optim_000013_{file}.pt"]


def replace_entry(states: dict[str, Any], number: int, what: str, change: Callable[[Any], Any]) -> None:
    entry = state_of(states)["state"][number]
    entry[what] = change(entry[what])


# In July's numbering 0 is lm_head, 1 wte, 2 and 3 value_embeds, 9 the first of Muon.
DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a rank in the middle": (
        r"optim_000013_rank1\.pt is missing beside optim_000013_rank3",
        lambda s: drop(s, "rank1"),
    ),
    "the last rank": (
        r"rank0\.pt: exp_avg of lm_head\.weight is one .* share of 4, but there are files of 3: rank 3 is missing",
        lambda s: drop(s, "rank3"),
    ),
    "all ranks but one": (
        "share of 4, but there are files of 1: rank 1",
        lambda s: drop(s, "rank1", "rank2", "rank3"),
    ),
    "another run's ranks": (
        "share of 4, but there are files of 5",
        lambda s: s.update({"optim_000013_rank4.pt": state_of(s)}),
    ),
    "two kinds": (r"holds both optim_000013\.pt and", lambda s: s.update({"optim_000013.pt": [1, 2]})),
    "shape": (
        r"rank0\.pt: exp_avg_sq of transformer\.wte\.weight has the shape \(32, 16\), not \(32, 32\)",
        lambda s: replace_entry(s, 1, "exp_avg_sq", lambda t: t[:, :16]),
    ),
    "stack": (
        r"second_momentum_buffer of transformer\.h\.1\.attn\.ve_gate\.weight has the shape \(1, 12\), not \(1, 1, 12\)",
        lambda s: replace_entry(s, 9, "second_momentum_buffer", lambda t: t[0]),
    ),
    "missing": (r"momentum_buffer of transformer\.h\..* is missing", lambda s: state_of(s)["state"].pop(11)),
    "integers": (
        r"exp_avg of value_embeds\.1\.weight is no tensor of floating",
        lambda s: replace_entry(s, 2, "exp_avg", lambda t: t.long()),
    ),
    "steps": (
        r"step of resid_lambdas is 'many', no number",
        lambda s: replace_entry(s, 4, "step", lambda _: "many"),
    ),
    "unequal steps": (
        r"step of x0_lambdas is another one",
        lambda s: replace_entry(s, 5, "step", lambda n: n + 1),
    ),
    "form": (r"is no optimizer's state", lambda s: s.update({"optim_000013_rank0.pt": {"state": {}}})),
    "groups": (r"of another model: its groups have 1 \+ 1", lambda s: state_of(s)["param_groups"].pop()),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_does_not_fit_is_named_with_its_tensor(what: str, tmp_path: Path) -> None:
    message, damage = DAMAGED[what]
    theirs = trained("july")
    states = files_of(theirs, "4")
    damage(states)
    folder = theirs.save(tmp_path / "d4", states)
    with pytest.raises(CheckpointError, match=message):
        read_optimizer(optimizer_files(folder, 13), config_of("july"))


def test_octobers_file_is_its_list_and_whole(tmp_path: Path) -> None:
    theirs = trained("october")
    state = theirs.state()
    folder = theirs.save(tmp_path / "d4", {"optim_000013.pt": state[0]})
    files = optimizer_files(folder, 13)
    with pytest.raises(CheckpointError, match=r"optim_000013\.pt is not the list of AdamW's and Muon's"):
        read_optimizer(files, config_of("october"))
    number = state[1]["param_groups"][0]["params"][2]
    del state[1]["state"][number]
    torch.save(state, files[0])
    with pytest.raises(
        CheckpointError, match=r"momentum_buffer of transformer\.h\.1\.attn\.c_q\.weight is missing"
    ):
        read_optimizer(files, config_of("october"))


def test_a_hybrid_has_no_such_state(tmp_path: Path) -> None:
    hybrid = config_of("october").replace(pattern=["T", "M", "T", "T"])
    with pytest.raises(CheckpointError, match=r"Muon takes matrices alone.*layer 1, a mamba"):
        read_optimizer([tmp_path / "optim_000013.pt"], hybrid)
    model = Model(hybrid)
    training = TrainingConfig.model_validate({"optimizer": "muon"})
    with pytest.raises(CheckpointError, match="layer 1, a mamba"):
        write(model, tmp_path / "d4", step=1, optimizer=Optimizer(model, training))
    assert not (tmp_path / "d4").exists()


UNWRITABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "AdamW alone": ("october", "trains transformer.h.0.attn.c_q.weight by Muon", {"optimizer": "adamw"}),
    "a variant": (
        "october",
        "keeps momentum_buffer of transformer.h.0.attn.c_q.weight, and this optimizer",
        {"muon": {"beta2": 0.9, "parts": True}},
    ),
    "joined parts": (
        "july",
        "evens out transformer.h.0.attn.c_q.weight, .* one by one",
        {"muon": {"beta2": 0.9}},
    ),
    "no variant": ("july", "keeps momentum_buffer, second_momentum_buffer of", {}),
    "rates": ("october", "at one rate", {"groups": {"blocks.1.*": {"lr": 0.5}}}),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_nanochats_optimizers_cannot_be_in_is_not_written(what: str, tmp_path: Path) -> None:
    name, message, settings = UNWRITABLE[what]
    model = from_state_dict(tensors_of(name), meta_of(name)).train()
    smear = {"groups": {"smear.*": {"optimizer": "adamw"}}} if name == "july" else {}
    training = TrainingConfig.model_validate({"optimizer": "muon", **smear, **settings})
    optimizer = Optimizer(model, training)
    advance(model, optimizer, batches(name)[:1])
    with pytest.raises(CheckpointError, match=message):
        write(model, tmp_path / "d4", step=1, optimizer=optimizer)
    assert not (tmp_path / "d4").exists()


def test_processes_must_share_the_rows(tmp_path: Path) -> None:
    model, optimizer = ours(trained("july").save(tmp_path / "d4", files_of(trained("july"), "one")))
    with pytest.raises(CheckpointError, match=r"the 128 rows of lm_head\.weight over 3"):
        write(model, tmp_path / "back", step=1, optimizer=optimizer, processes=3)
    model, optimizer = ours(trained("october").save(tmp_path / "d5", files_of(trained("october"), "one")))
    with pytest.raises(CheckpointError, match="saves the state of one process"):
        write(model, tmp_path / "back", step=1, optimizer=optimizer, processes=2)
