"""Model Foundry's RNNs and Mamba: its own numbers, its checkpoint folders, and what is refused.

tests/fixtures/foundry_rnn holds weights, outputs and gradients that Foundry itself computed; the tolerances are
those that its README states for float32.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats.foundry import from_state_dict, read
from plait.models.model import Model
from plait.tokenizers.characters import CharactersTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "foundry_rnn"
ORACLE: dict[str, Any] = json.loads((FIXTURES / "oracle.json").read_text())["cases"]
ABSOLUTE, GRADIENTS = 1e-5, 1e-4
CASES = list(ORACLE)


class Case(NamedTuple):
    model: Model
    data: dict[str, Tensor]
    config: dict[str, Any]


def weights(case: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{case}_state_dict.safetensors")


def case(name: str) -> Case:
    config = ORACLE[name]["config"]
    return Case(from_state_dict(weights(name), config), load_file(FIXTURES / f"{name}.safetensors"), config)


def ours(name: str) -> str:
    """Our name of one of the RNN's weights."""
    head, _, rest = name.partition(".")
    if head == "rnn":
        kind, layer, *direction = (
            rest.rsplit("_l", 1)[0],
            rest.rsplit("_l", 1)[1][0],
            rest.rsplit("_l", 1)[1][1:],
        )
        return f"blocks.{layer}.mixer.rnn.{kind}_l0{direction[0]}"
    return {"embedding": "embedding.tokens", "output_projection": "head.unembedding"}[head] + f".{rest}"


def within(got: Tensor | None, want: Tensor, tolerance: float = ABSOLUTE) -> None:
    assert got is not None and got.shape == want.shape
    error = float((got.detach() - want).abs().max())
    assert error <= tolerance, f"off by {error:.2e}, more than {tolerance:.0e}"


cases = pytest.mark.parametrize("name", CASES)


@cases
@torch.no_grad()
def test_logits_and_hidden_states(name: str) -> None:
    model, data, _ = case(name)
    assert not model.training
    ids, mask = data["input_ids"], data["attention_mask"]
    within(model(ids).logits, data["logits"])
    masked, real = model(ids, attention_mask=mask), mask.bool()
    assert not bool(real.all())
    within(masked.logits[real], data["logits_masked"][real])
    within(masked.hidden[real], data["hidden_masked"][real])
    assert not masked.hidden[~real].any(), "a pad has no hidden state"
    if "bi" in name:  # the mask matters: without it the pads reach back into the text
        assert float((model(ids).logits - data["logits_masked"])[real].abs().max()) > 100 * ABSOLUTE


@cases
def test_next_token_loss_and_gradients(name: str) -> None:
    model, data, _ = case(name)
    ids, labels = data["input_ids"], data["labels"]
    if model.config.causal:  # the shift is inside
        loss = model(ids, labels=labels).loss
    else:
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    within(loss[None], data["next_token_loss"])
    found = [key for key in data if key.startswith("grad_next_token.")]
    assert len(found) >= 3
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [named[ours(key.partition(".")[2])] for key in found])
    for key, gradient in zip(found, gradients, strict=True):
        want = data[key]
        if key.endswith("embedding.weight") and not model.config.causal:
            # read backwards, pads reach the loss; the original freezes their row, ours learns it like any other
            assert not want[0].any() and gradient[0].any()
            gradient, want = gradient[1:], want[1:]
        within(gradient, want, GRADIENTS * float(want.abs().max()))


@cases
@torch.no_grad()
def test_the_loss_of_a_masked_model_is_not_shifted(name: str) -> None:
    """Two-way networks predict hidden tokens in place, as in the original; one-way ones never do."""
    model, data, _ = case(name)
    loss = model(data["input_ids"], attention_mask=data["attention_mask"], labels=data["labels"]).loss
    if model.config.causal:
        assert abs(float(loss - data["loss_unshifted"])) > 1e-3
    else:
        within(loss[None], data["loss_unshifted"])


@cases
@torch.no_grad()
def test_every_weight_is_where_it_belongs(name: str) -> None:
    """Each weight of the original, moved a little, moves our logits by many tolerances: none is dropped or swapped."""
    _, data, config = case(name)
    g = torch.Generator().manual_seed(0)
    for key, tensor in weights(name).items():
        changed = {**weights(name), key: tensor + 0.1 * torch.randn(tensor.shape, generator=g)}
        moved = (from_state_dict(changed, config)(data["input_ids"]).logits - data["logits"]).abs().max()
        assert moved > 100 * ABSOLUTE, key


def test_the_config_is_checked_against_the_tensors() -> None:
    tensors = weights("gru_uni")
    built = from_state_dict(tensors, {})  # the tensors tell all but dropout
    assert built.config.pattern == "gru" and built.config.dropout == 0
    assert from_state_dict(tensors, {"dropout": 0.25, "rnn_type": "gru"}).config.dropout == 0.25
    for wrong in ({"hidden_size": 8}, {"rnn_type": "lstm"}, {"bidirectional": True}, {"hidden": 16}):
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            from_state_dict(tensors, wrong)
    experiment = {"model": {"architecture": "gru", "rnn": ORACLE["gru_uni"]["config"]}}
    assert from_state_dict(tensors, experiment).config.dropout == 0.1


def test_tensors_that_do_not_fit_are_named() -> None:
    tensors = weights("lstm_bi")
    missing = {key: tensor for key, tensor in tensors.items() if key != "rnn.weight_hh_l1_reverse"}
    with pytest.raises(CheckpointError, match=r"rnn\.weight_hh_l1_reverse is missing"):
        from_state_dict(missing, {})
    with pytest.raises(CheckpointError, match=r"extra"):
        from_state_dict({**tensors, "extra": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"output_projection\.bias"):
        from_state_dict({**tensors, "output_projection.bias": torch.zeros(59)}, {})
    with pytest.raises(CheckpointError, match="none of its architectures"):
        from_state_dict({"weight": torch.zeros(1)}, {})


def checkpoint(folder: Path, step: int, name: str, **tensors: Tensor) -> Path:
    """A folder as Foundry's trainer leaves it."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    torch.save({**weights(name), **tensors}, path / "pytorch_model.bin")
    (path / "model_type.txt").write_text(name[:-4])
    torch.save({"global_step": step, "random_state": object}, path / "training_state.pt")
    (path / "metadata.json").write_text(json.dumps({"global_step": step}))
    return path


@torch.no_grad()
def test_a_checkpoint_folder_is_read(tmp_path: Path) -> None:
    """The last one of a run, with its tokenizer; the pickled state of training is not opened."""
    checkpoint(tmp_path, 100, "lstm_uni", **{"output_projection.bias": torch.full((60,), 9.0)})
    last = checkpoint(tmp_path, 2000, "lstm_uni")
    CharactersTokenizer("abc").save(last)
    data = load_file(FIXTURES / "lstm_uni.safetensors")
    for source in (tmp_path, last):
        model, tokenizer = read(source)
        within(model(data["input_ids"]).logits, data["logits"])
        assert tokenizer is not None and tokenizer.encode("cab") == [7, 5, 6]
    shutil.rmtree(last)
    assert read(tmp_path)[1] is None
    with pytest.raises(CheckpointError, match="weights"):
        read(tmp_path.parent / tmp_path.name / "checkpoint-100" / "metadata.json")


@torch.no_grad()
def test_files_alone(tmp_path: Path) -> None:
    data = load_file(FIXTURES / "rnn_uni.safetensors")
    torch.save(weights("rnn_uni"), tmp_path / "weights.pt")
    for file in (FIXTURES / "rnn_uni_state_dict.safetensors", tmp_path / "weights.pt"):
        model, tokenizer = read(file, ORACLE["rnn_uni"]["config"])
        within(model(data["input_ids"]).logits, data["logits"])
        assert tokenizer is None


D_MODEL, STATES, TAPS, RANK, VOCAB, LAYERS = 10, 3, 4, 2, 23, 2
INNER = 2 * D_MODEL


@cache
def mamba_weights(pre_norm: bool) -> dict[str, Tensor]:
    """A Mamba of Foundry on a machine with mamba-ssm: random weights under its names."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) / shape[-1] ** 0.5

    found = {"embedding.weight": draw(VOCAB, D_MODEL) * 3}
    inside = "mixer." if pre_norm else ""
    for index in range(LAYERS):
        mixer = {
            "A_log": draw(INNER, STATES),
            "D": draw(INNER),
            "in_proj.weight": draw(2 * INNER, D_MODEL),
            "conv1d.weight": draw(INNER, 1, TAPS),
            "conv1d.bias": draw(INNER),
            "x_proj.weight": draw(RANK + 2 * STATES, INNER),
            "dt_proj.weight": draw(INNER, RANK),
            "dt_proj.bias": draw(INNER),
            "out_proj.weight": draw(D_MODEL, INNER),
        }
        found |= {f"layers.{index}.{inside}{name}": tensor for name, tensor in mixer.items()}
        if pre_norm:
            found |= {f"layers.{index}.norm.{name}": 1 + 0.3 * draw(D_MODEL) for name in ("weight", "bias")}
    final = "norm_f" if pre_norm else "norm"
    found |= {f"{final}.{name}": 1 + 0.3 * draw(D_MODEL) for name in ("weight", "bias")}
    return {**found, "lm_head.weight": found["embedding.weight"].clone()}


def mamba_logits(w: dict[str, Tensor], ids: Tensor, pre_norm: bool) -> Tensor:
    """What that model computes (T,) -> (T, V), written down one token at a time."""
    x = w["embedding.weight"][ids]
    for index in range(LAYERS):
        p = f"layers.{index}." + ("mixer." if pre_norm else "")
        u = x
        if pre_norm:
            u = F.layer_norm(x, (D_MODEL,), w[f"layers.{index}.norm.weight"], w[f"layers.{index}.norm.bias"])
        v, z = (u @ w[p + "in_proj.weight"].T).chunk(2, -1)
        padded = torch.cat([v.new_zeros(TAPS - 1, INNER), v])
        taps = w[p + "conv1d.weight"][:, 0]
        v = torch.stack([(padded[t : t + TAPS].T * taps).sum(1) for t in range(len(ids))])
        v = F.silu(v + w[p + "conv1d.bias"])
        rank, B, C = (v @ w[p + "x_proj.weight"].T).split([RANK, STATES, STATES], -1)
        dt = F.softplus(rank @ w[p + "dt_proj.weight"].T + w[p + "dt_proj.bias"])
        A, h, out = -w[p + "A_log"].exp(), torch.zeros(INNER, STATES), []
        for t in range(len(ids)):
            h = (dt[t][:, None] * A).exp() * h + (dt[t] * v[t])[:, None] * B[t]
            out.append(h @ C[t] + w[p + "D"] * v[t])
        x = x + (torch.stack(out) * F.silu(z)) @ w[p + "out_proj.weight"].T
    final = "norm_f" if pre_norm else "norm"
    x = F.layer_norm(x, (D_MODEL,), w[f"{final}.weight"], w[f"{final}.bias"])
    return x @ w["lm_head.weight"].T


@pytest.mark.parametrize("pre_norm", [True, False], ids=["as built", "as planned"])
@torch.no_grad()
def test_mamba_of_mamba_ssm_loads(pre_norm: bool) -> None:
    tensors = mamba_weights(pre_norm)
    config = {"vocab_size": VOCAB, "d_model": D_MODEL, "n_layers": LAYERS, "d_state": STATES, "dropout": 0.1}
    model = from_state_dict(tensors, config)
    assert model.config.dropout == 0.1
    ids = torch.randint(VOCAB, (17,), generator=torch.Generator().manual_seed(2))
    within(model(ids[None]).logits[0], mamba_logits(tensors, ids, pre_norm), 1e-4)
    untied = {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}
    within(from_state_dict(untied, {})(ids[None]).logits[0], mamba_logits(untied, ids, pre_norm), 1e-4)
    with pytest.raises(CheckpointError, match="d_state"):
        from_state_dict(tensors, {"d_state": 16})


def test_the_stand_in_for_mamba_is_refused() -> None:
    """Its shapes: one map d_inner x d_inner for the time steps, and no C."""
    tensors = dict(mamba_weights(True))
    for index in range(LAYERS):
        tensors[f"layers.{index}.mixer.x_proj.weight"] = torch.zeros(2 * STATES, INNER)
        tensors[f"layers.{index}.mixer.dt_proj.weight"] = torch.zeros(INNER, INNER)
    with pytest.raises(CheckpointError, match=r"stand-in.*not Mamba.*plait train"):
        from_state_dict(tensors, {})
