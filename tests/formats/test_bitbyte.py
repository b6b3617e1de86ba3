"""BitByte's own numbers: logits with and without rounded activations, losses, gradients; checkpoints; refusals."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.config.schema import ModelConfig
from plait.formats.bitbyte import from_state_dict, read
from plait.formats.native import load_model, save_model
from plait.models.model import Model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "bitbyte"
CASES: dict[str, Any] = json.loads((FIXTURES / "oracle.json").read_text())["cases"]
MODELS = [name for name in CASES if name != "bitlinear"]
LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-4  # the tolerances of the fixture's README, and of a loss
ROUNDED, NEARLY_ALL = 2e-2, 0.95  # a last bit may move an activation by one of its 255 levels
models = pytest.mark.parametrize("case", MODELS)


def tensors(case: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{case}_state_dict.safetensors")


def data(case: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{case}.safetensors")


def config(case: str, **more: object) -> dict[str, Any]:
    return {**CASES[case]["config"], **more}


def convert(case: str, **more: object) -> Model:
    return from_state_dict(tensors(case), config(case, **more))


def gradients(model: Model) -> dict[str, Tensor]:
    """The gradients under the original's names, its separate matrices taken out of our joined ones."""
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {"tok_emb.weight": own["embedding.tokens.weight"], "norm_f.weight": own["final_norm.weight"]}
    for index, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{index}.mixer", f"blocks.{index}"
        value, gate = own[f"blocks.{index}.mlp.fc1.weight"].chunk(2)
        found[f"{theirs}.mlp.gate_up.weight"] = torch.cat([gate, value])
        found[f"{theirs}.mlp.down.weight"] = own[f"blocks.{index}.mlp.fc2.weight"]
        if block.kind == "attention":
            widths = [n * block.mixer.headdim for n in (block.mixer.n_head, *[block.mixer.n_kv_head] * 2)]
            for name, part in zip("qkv", own[f"{ours}.in_proj.weight"].split(widths), strict=True):
                found[f"{theirs}.attn.{name}_proj.weight"] = part
        else:
            for name in ("conv1d.weight", "in_proj.weight", "A_log"):
                found[f"{theirs}.ssm.{name}"] = own[f"{ours}.{name}"]
            found[f"{theirs}.ssm.delta_proj.weight"] = own[f"{ours}.dt_proj.weight"]
    return found


@models
def test_activations_as_they_are(case: str) -> None:
    model, true = convert(case, act_quant=False), data(case)
    out = model(true["input_ids"], labels=true["input_ids"])
    assert (out.logits - true["logits_act_off"]).abs().max() <= LOGITS
    assert (out.loss - true["loss_act_off"]).abs() <= LOSS
    out.loss.backward()
    found = gradients(model)
    wanted = {k.removeprefix("grad."): t for k, t in true.items() if k.startswith("grad.")}
    assert len(wanted) >= 4
    for name, want in wanted.items():
        assert (found[name] - want).abs().max() <= GRADIENTS * want.abs().max(), name


@models
def test_activations_in_eight_bits(case: str) -> None:
    model, true = convert(case), data(case)
    error = (model(true["input_ids"]).logits - true["logits_act_on"]).abs().amax(-1)
    assert error.max() <= ROUNDED and (error <= LOGITS).double().mean() >= NEARLY_ALL
    assert (true["logits_act_on"] - true["logits_act_off"]).abs().max() > 100 * LOGITS  # it is not the same


@models
@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
def test_cached_equals_uncached_at_every_split(case: str, rounded: bool) -> None:
    """The original has no cache; ours must give its uncached logits."""
    model, true = convert(case, act_quant=rounded), data(case)
    ids, want = true["input_ids"], true["logits_act_on" if rounded else "logits_act_off"]
    length = ids.shape[1]
    for cuts in [*((0, cut, length) for cut in range(length + 1)), tuple(range(length + 1))]:
        cache = model.new_cache(2, length)
        pieces = [model.step(ids[:, a:b], cache) for a, b in pairwise(cuts)]
        error = (torch.cat(pieces, 1) - want).abs().amax(-1)
        if rounded:
            assert error.max() <= ROUNDED and (error <= LOGITS).double().mean() >= NEARLY_ALL, cuts
        else:
            assert error.max() <= LOGITS, cuts


def test_every_quirk_is_an_option_of_the_model() -> None:
    model = convert("bitbytelm_gqa")
    layer = model.config.layers()[0]
    assert layer.kind == "attention"
    chosen = layer.options.model_dump()
    assert (chosen["n_head"], chosen["n_kv_head"], chosen["rope_base"]) == (2, 1, 5000.0)
    linear, mlp = layer.block.linear, layer.block.mlp
    assert (linear.kind, linear.ste, linear.activations, linear.scale) == (
        "ternary",
        "clipped",
        "int8",
        "part",
    )
    assert mlp.linear is not None and (mlp.kind, mlp.width, mlp.linear.scale) == ("swiglu", 32, "matrix")
    assert (model.config.final_norm.kind, model.config.norm.eps) == ("rms", 1e-6)
    model = convert("mambamlm", act_quant=False)
    layer = model.config.layers()[0]
    chosen = layer.options.model_dump()
    assert (chosen["dt_rank"], chosen["projections"], chosen["gate"]) == ("full", "separate", "silu")
    assert (layer.block.linear.scale, layer.block.linear.activations) == ("matrix", "none")
    assert (model.config.final_norm.kind, model.config.final_norm.eps) == ("layer", 1e-5)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("bitbytelm_mha", {"attention": {"linear": {"scale": "matrix"}}}),
        ("bitbytelm_mha", {"mlp": {"linear": {"scale": "part"}}}),
        ("bitbytelm_gqa", {"attention": {"rope_base": 10000.0}}),
        ("mambamlm", {"linear": {"scale": "part"}}),
        ("mambamlm", {"final_norm": {"eps": 1e-3}}),
    ],
)
def test_every_quirk_moves_the_numbers(case: str, change: dict[str, Any]) -> None:
    model, true = convert(case, act_quant=False), data(case)
    sections = {kind: {**own, **change.get(kind, {})} for kind, own in model.config.sections.items()}
    rest = {name: value for name, value in change.items() if name not in sections}
    merged = ModelConfig.merge(model.config.model_dump() | sections, rest)
    other = Model(ModelConfig.model_validate(merged)).eval()
    other.load_state_dict(model.state_dict())
    assert (other(true["input_ids"]).logits - true["logits_act_off"]).abs().max() > 20 * LOGITS


def test_blocks_of_both_kinds_in_one_model() -> None:
    """A hybrid of Block and MambaBlock: what it computes is its blocks', one after the other."""
    attention, mamba = tensors("bitbytelm_mha"), tensors("mambamlm")
    joint = dict(attention) | {k: t for k, t in mamba.items() if k.startswith("blocks.0.")}
    joint = {k: t for k, t in joint.items() if not k.startswith("blocks.0.attn.")}
    model = from_state_dict(joint, config("bitbytelm_mha", d_state=8, act_quant=False))
    assert [block.kind for block in model.blocks] == ["mamba", "attention"]
    first, second = (convert(case, act_quant=False) for case in ("mambamlm", "bitbytelm_mha"))
    ids = data("mambamlm")["input_ids"]
    parts = torch.nn.Module()
    parts.blocks = torch.nn.ModuleList([first.blocks[0], second.blocks[1]])
    second.blocks = parts.blocks  # type: ignore[assignment]
    assert (model(ids).logits - second(ids).logits).abs().max() <= 1e-6


def checkpoint(case: str, **more: object) -> dict[str, Any]:
    flags = {
        **config(case),
        **{"data": "shards", "out": "runs", "steps": 10, "lr": 3e-4, "ddp": False, "no_act_quant": True},
        **{"resume": None, "batch_size": 2, "grad_accum": 1, "seq_len": 64},
    }
    flags.pop("vocab_size")
    return {
        "step": 7,
        "model": tensors(case),
        "opt": {"state": {}},
        "scaler": {"scale": 1.0},
        "args": flags,
        **more,
    }


@pytest.mark.parametrize("wrap", [dict, lambda flags: argparse.Namespace(**flags)], ids=["dict", "namespace"])
@models
def test_checkpoints(case: str, wrap: Any, tmp_path: Path) -> None:
    saved = checkpoint(case, variant="base", model_family=CASES[case]["class"])
    saved["args"] = wrap(saved["args"])
    saved["model"] = {f"module._orig_mod.{name}": t for name, t in saved["model"].items()}
    torch.save(saved, tmp_path / "ckpt.pt")
    true = data(case)
    model, tokenizer = read(tmp_path / "ckpt.pt")
    assert not model.training
    assert (model(true["input_ids"]).logits - true["logits_act_off"]).abs().max() <= LOGITS
    assert tokenizer is not None and tokenizer.vocab_size == 256
    assert tokenizer.encode("Aé") == [65, 195, 169]
    rounded, _ = read(tmp_path / "ckpt.pt", config(case))  # the config given outweighs the flags
    assert (rounded(true["input_ids"]).logits - true["logits_act_on"]).abs().max() <= ROUNDED
    assert rounded.config != model.config


def test_folders_and_bare_weights(tmp_path: Path) -> None:
    true = data("mambamlm")
    for step in (9, 10):
        saved = checkpoint("mambamlm")
        if step == 9:
            saved["model"] = {k: torch.zeros_like(t) for k, t in saved["model"].items()}
        torch.save(saved, tmp_path / f"ckpt_{step}.pt")
    model, _ = read(tmp_path)  # 10 is later than 9
    assert (model(true["input_ids"]).logits - true["logits_act_off"]).abs().max() <= LOGITS
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(tensors("mambamlm"), bare / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected one file with the settings"):
        read(bare)
    (bare / "config.json").write_text(json.dumps(config("mambamlm", act_quant=False)))
    for path in (bare, bare / "model.safetensors"):
        assert torch.equal(read(path)[0](true["input_ids"]).logits, model(true["input_ids"]).logits)
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"expected one file with weights .* found .*; name the file"):
        read(tmp_path)


@models
def test_a_saved_conversion_is_the_same_model(case: str, tmp_path: Path) -> None:
    model, tokenizer = convert(case), read(_written(case, tmp_path))[1]
    save_model(model, tmp_path / "model", tokenizer)
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    ids = data(case)["input_ids"]
    assert torch.equal(again(ids).logits, model(ids).logits)
    text = again.generate("abc", max_new_tokens=4, temperature=0.0)
    assert isinstance(text, str)


def _written(case: str, folder: Path) -> Path:
    torch.save(checkpoint(case), folder / "ckpt.pt")
    return folder / "ckpt.pt"


def test_an_untied_output_and_none_at_all() -> None:
    given = tensors("bitbytelm_mha")
    del given["lm_head.weight"]
    assert from_state_dict(given, config("bitbytelm_mha")).config.head.tie
    given["lm_head.weight"] = given["tok_emb.weight"] + 1
    model = from_state_dict(given, config("bitbytelm_mha"))
    assert not model.config.head.tie and torch.equal(model.head.unembedding.weight, given["lm_head.weight"])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    given = tensors("mambamlm")
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({k: t for k, t in given.items() if "1.ssm.D" not in k}, {}, "the tensor blocks.1.ssm.D is missing"),
        (given | {"blocks.0.ssm.gate": torch.zeros(1)}, {}, "the tensor blocks.0.ssm.gate has no place"),
        (given, {"d_ff": 40}, r"blocks.0.mlp.gate_up.weight is .* of shape \(96, 28\)"),
        (given, {"n_layer": 3}, "block 2 should hold tensors of either blocks.2.attn or blocks.2.ssm"),
        (given | {"blocks.0.attn.q_proj.weight": torch.zeros(1)}, {}, "block 0 should hold"),
        (given, {"layers": 2}, "the setting 'layers' is not known"),
        (given, {"act_quant": "yes"}, "'act_quant' is 'yes', not true or false"),
    ]
    for weights, change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            from_state_dict(weights, config("mambamlm", **change))
    settings = config("bitbytelm_mha")
    del settings["n_head"]
    with pytest.raises(CheckpointError, match="'n_head' is missing; it is a positive integer"):
        from_state_dict(tensors("bitbytelm_mha"), settings)
    for change, message in (
        ({"variant": "Diffusion"}, "the checkpoint's variant is 'Diffusion'"),
        ({"model_family": "log-linear"}, "the checkpoint's model_family is 'log-linear'"),
        ({"args": None}, r"holds no settings of its run \(args\)"),
    ):
        torch.save(checkpoint("mambamlm", **change), tmp_path / "ckpt.pt")
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "ckpt.pt")
