"""GPT-2 and BERT from Hugging Face's own folders: the numbers that Model Foundry's wrapper of them gives.

tests/fixtures/foundry_transformers holds the folders and the numbers; the tolerances are those that its README states
for float32.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats import foundry
from plait.formats.huggingface import bert, gpt2
from plait.models.model import Model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "foundry_transformers"
LOGITS, LOSS, GRADIENTS = 1e-4, 1e-5, 1e-4


def config(family: str) -> dict[str, Any]:
    return json.loads((FIXTURES / family / "config.json").read_text())


def weights(family: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / family / "model.safetensors")


def numbers(family: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{family}_oracle.safetensors")


def load(family: str) -> Model:
    return foundry.read(FIXTURES / family)[0]


def within(got: Tensor | None, want: Tensor, tolerance: float) -> None:
    assert got is not None and got.shape == want.shape
    error = float((got.detach() - want).abs().max())
    assert error <= tolerance, f"off by {error:.2e}, more than {tolerance:.0e}"


def check_gradients(
    model: Model, loss: Tensor, ours: dict[str, tuple[str, bool]], data: dict[str, Tensor]
) -> None:
    """``ours``: for each of their gradients the name of our weight, and whether it lies transposed."""
    wanted = {key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")}
    assert wanted.keys() == ours.keys()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [named[ours[key][0]] for key in wanted])
    for (key, want), gradient in zip(wanted.items(), gradients, strict=True):
        got = gradient.T if ours[key][1] else gradient[: len(want)]  # queries are the first rows of ours
        within(got, want, GRADIENTS * float(want.abs().max()))


@torch.no_grad()
def test_gpt2_logits() -> None:
    model, data = load("gpt2"), numbers("gpt2")
    ids, mask = data["input_ids"], data["right_mask"].bool()
    within(model(ids).logits, data["logits"], LOGITS)
    within(model(ids, attention_mask=mask).logits[mask], data["logits_right_mask"][mask], LOGITS)
    seen: list[Tensor] = []
    hook = model.blocks[0].register_forward_hook(lambda block, given, made: seen.append(made[0]))
    model(ids)
    hook.remove()
    within(seen[0], data["hidden_after_block0"], LOGITS)


@torch.no_grad()
def test_gpt2_left_padding() -> None:
    """Theirs counts positions from the first pad, ours from the first token: that is all the difference there is."""
    model, data = load("gpt2"), numbers("gpt2")
    ids, mask, want = data["input_ids"], data["left_mask"].bool(), data["logits_left_mask"]
    ours = model(ids, attention_mask=mask).logits
    padded = 0
    for row in range(ids.shape[0]):
        real = mask[row]
        pads = int((~real).sum())
        within(ours[row][real], model(ids[row][real][None]).logits[0], LOGITS)  # as without the pads
        moved = copy.deepcopy(model)
        table = moved.embedding.positions.weight
        table[: len(table) - pads] = table[pads:].clone()
        within(moved(ids[row][real][None]).logits[0], want[row][real], LOGITS)
        padded += pads
    assert padded


def test_gpt2_loss_and_gradients() -> None:
    model, data = load("gpt2"), numbers("gpt2")
    loss = model(data["input_ids"], labels=data["labels"]).loss
    within(loss[None], data["loss"], LOSS)
    ours = {
        "transformer.wte.weight": ("embedding.tokens.weight", False),
        "transformer.wpe.weight": ("embedding.positions.weight", False),
        "transformer.h.0.attn.c_attn.weight": ("blocks.0.mixer.in_proj.weight", True),
    }
    check_gradients(model, loss, ours, data)


@torch.no_grad()
def test_bert_logits() -> None:
    model, data = load("bert"), numbers("bert")
    ids, mask, types = data["input_ids"], data["attention_mask"].bool(), data["token_type_ids"]
    within(model(ids).logits, data["logits_no_mask"], LOGITS)
    for more, want in (({}, "logits_masked"), ({"token_type_ids": types}, "logits_masked_types")):
        within(model(ids, attention_mask=mask, **more).logits[mask], data[want][mask], LOGITS)
    assert not bool(mask.all()) and bool(types.any())


def test_bert_loss_and_gradients() -> None:
    model, data = load("bert"), numbers("bert")
    loss = model(data["input_ids"], attention_mask=data["attention_mask"], labels=data["labels"]).loss
    within(loss[None], data["loss_masked"], LOSS)
    ours = {
        "bert.embeddings.word_embeddings.weight": ("embedding.tokens.weight", False),
        "bert.encoder.layer.0.attention.self.query.weight": ("blocks.0.mixer.in_proj.weight", False),
        "cls.predictions.transform.dense.weight": ("head.transform.weight", False),
    }
    check_gradients(model, loss, ours, data)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@torch.no_grad()
def test_names_that_other_files_have(family: str, tmp_path: Path) -> None:
    """Pickled files, a wrapper's prefix, tied weights twice, buffers and parts that are no part of the model."""
    tensors, data = weights(family), numbers(family)
    more: dict[str, Tensor] = {}
    if family == "gpt2":
        more["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        more["transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40)
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        within(gpt2.from_state_dict(bare, config(family))(data["input_ids"]).logits, data["logits"], LOGITS)
        want = data["logits"]
    else:
        table = "bert.embeddings.word_embeddings.weight"
        more["cls.predictions.decoder.weight"] = tensors[table].clone()
        more["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
        more["bert.pooler.dense.weight"] = torch.ones(32, 32)
        tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}
        want = data["logits_no_mask"]
    folder = tmp_path / "run" / "checkpoint-7"
    folder.mkdir(parents=True)
    torch.save(
        {f"hf_model.{name}": t for name, t in {**tensors, **more}.items()}, folder / "pytorch_model.bin"
    )
    shutil.copy(FIXTURES / family / "config.json", folder)
    within(foundry.read(tmp_path / "run")[0](data["input_ids"]).logits, want, LOGITS)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_what_does_not_fit_is_named(family: str, tmp_path: Path) -> None:
    module: Any = {"gpt2": gpt2, "bert": bert}[family]
    tensors, values = weights(family), config(family)
    key = next(iter(tensors))
    for changed, word in (
        ({**tensors, "stranger": torch.zeros(1)}, "stranger"),
        ({**tensors, key: torch.zeros(3, 3)}, "has shape"),
        (
            {name: t for name, t in tensors.items() if "wpe" not in name and "position" not in name},
            "positions",
        ),
    ):
        with pytest.raises(CheckpointError, match=word):
            module.from_state_dict(changed, values)
    output, table = module.OUTPUT, module.TABLE
    with pytest.raises(CheckpointError, match="differ"):
        module.from_state_dict({**tensors, output: tensors[table] + 1}, values)
    name = "activation_function" if family == "gpt2" else "hidden_act"
    for wrong in ({name: "silu"}, {"add_cross_attention": True}):
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            module.from_state_dict(tensors, {**values, **wrong})
    save_file(tensors, tmp_path / "model.safetensors")
    if family == "bert":  # a folder that does not tell its shape is not guessed at
        with pytest.raises(CheckpointError, match="shape"):
            foundry.read(tmp_path)


@torch.no_grad()
def test_gpt2_scales_of_attention() -> None:
    """Scores that are not scaled, or less in each layer, are options of our layers."""
    tensors, values, ids = weights("gpt2"), config("gpt2"), numbers("gpt2")["input_ids"]
    plain = gpt2.from_state_dict(tensors, values)
    unscaled = gpt2.from_state_dict(tensors, {**values, "scale_attn_weights": False})
    by_layer = gpt2.from_state_dict(tensors, {**values, "scale_attn_by_inverse_layer_idx": True})
    assert [block.mixer.scale for block in unscaled.blocks] == [1.0, 1.0]
    assert [block.mixer.scale for block in by_layer.blocks] == [8**-0.5, 8**-0.5 / 2]
    for model in (unscaled, by_layer):
        assert float((model(ids).logits - plain(ids).logits).abs().max()) > 100 * LOGITS
