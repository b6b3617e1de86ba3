"""MiniMamba's own numbers: logits, losses, gradients, poolings, features; and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats.minimamba import from_state_dict, read
from plait.formats.native import load_model, save_model
from plait.models.model import Model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "minimamba"
CASES: dict[str, Any] = json.loads((FIXTURES / "oracle.json").read_text())["cases"]
LOGITS, FEATURES, LOSS, GRADIENTS = 5e-5, 2e-5, 1e-5, 1e-4  # the tolerances of the fixture's README
POOLINGS = ("last", "mean", "max")
language_models = pytest.mark.parametrize("case", ["lm", "lm_untied_bias"])


def tensors(case: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{case}_state_dict.safetensors")


def data(case: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{case}.safetensors")


def config(case: str, **more: object) -> dict[str, Any]:
    return {**CASES[case]["config"], **more}


def convert(case: str, **more: object) -> Model:
    return from_state_dict(tensors(case), config(case, **more))


def ours(name: str) -> str:
    """Our name of a tensor of theirs."""
    for old, new in (
        ("embedding.token_embedding", "embedding.tokens"),
        ("backbone.layers", "blocks"),
        ("backbone.norm", "final_norm"),
        ("lm_head.lm_head", "head.unembedding"),
    ):
        name = name.replace(old, new)
    return name


@language_models
def test_language_model(case: str) -> None:
    model, true = convert(case), data(case)
    out = model(true["input_ids"], labels=true["labels"])
    assert out.logits.shape == true["logits"].shape == (2, 19, 56)
    assert (out.logits - true["logits"]).abs().max() <= LOGITS
    assert (model(true["input_ids_long"]).logits - true["logits_long"]).abs().max() <= LOGITS
    assert (out.loss - true["loss"]).abs() <= LOSS
    out.loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [name for name in true if name.startswith("grad.")]
    assert len(gradients) == 3
    for name in gradients:
        found = parameters[ours(name.removeprefix("grad."))].grad
        assert found is not None
        assert (found - true[name]).abs().max() <= GRADIENTS * true[name].abs().max(), name


@pytest.mark.parametrize("pooling", POOLINGS)
def test_classification(pooling: str) -> None:
    model, true = convert("classification", pooling_strategy=pooling), data("classification")
    assert not model.training  # its dropout of 0.1 is off
    found = model(true["input_ids"]).logits
    assert (found - true[f"logits_{pooling}"]).abs().max() <= LOGITS
    found = model(true["input_ids"], attention_mask=true["attention_mask"]).logits
    assert (found - true[f"logits_{pooling}_masked"]).abs().max() <= LOGITS


def test_features_from_ids_and_from_embeddings() -> None:
    model, true = convert("features"), data("features")
    assert model.head is None
    assert (model(true["input_ids"]).hidden - true["features_from_ids"]).abs().max() <= FEATURES
    found = model(inputs_embeds=true["input_embeddings"]).hidden
    assert (found - true["features_from_embeddings"]).abs().max() <= FEATURES


def test_features_without_a_vocabulary() -> None:
    given = tensors("features")
    del given["embedding.token_embedding.weight"]
    bare = {k: v for k, v in config("features").items() if "vocab" not in k and k != "tie_embeddings"}
    true = data("features")
    found = from_state_dict(given, bare)(inputs_embeds=true["input_embeddings"]).hidden
    assert (found - true["features_from_embeddings"]).abs().max() <= FEATURES


def test_one_label_is_a_regression() -> None:
    given = tensors("classification")
    given["classifier.classifier.weight"] = given["classifier.classifier.weight"][:1].clone()
    given["classifier.classifier.bias"] = given["classifier.classifier.bias"][:1].clone()
    model = from_state_dict(given, config("classification", num_labels=1, pooling_strategy="last"))
    true = data("classification")
    want = torch.tensor([0.5, -2.0])
    out = model(true["input_ids"], labels=want)
    expected = (true["logits_last"][:, 0] - want).square().mean()
    assert (out.loss - expected).abs() <= LOGITS


@language_models
def test_cached_equals_uncached_at_every_split(case: str) -> None:
    """The original's cache cannot run; ours must give the original's uncached logits."""
    model, true = convert(case), data(case)
    ids, real = true["input_ids"], true["logits"][..., :51]
    for cut in range(ids.shape[1] + 1):
        cache = model.new_cache(2, ids.shape[1])
        logits = torch.cat([model.step(ids[:, :cut], cache), model.step(ids[:, cut:], cache)], 1)
        assert (logits - real).abs().max() <= LOGITS, cut
    cache = model.new_cache(2, ids.shape[1])
    steps = [model.step(ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    assert (torch.cat(steps, 1) - real).abs().max() <= LOGITS


def test_every_quirk_is_an_option_of_the_model() -> None:
    model = convert("lm")
    layer = model.config.layers()[0]
    chosen = layer.options.model_dump()
    assert (chosen["gate"], chosen["dt_bias_scale"], chosen["dt_rank"]) == ("identity", 2.0, 2)
    assert (layer.block.mlp.kind, layer.block.norm.kind, layer.block.norm.eps) == ("none", "rms", 1e-5)
    assert (model.vocab_size, model.config.pad_vocab_size_multiple, model.config.head.padded) == (51, 8, True)
    assert from_state_dict(tensors("lm"), config("lm", dt_rank="auto")).config == model.config


@pytest.mark.parametrize(
    "change", [{"gate": "silu"}, {"dt_bias_scale": 1.0}, {"d_conv": 3}], ids=["gate", "bias", "taps"]
)
def test_every_quirk_moves_the_numbers(change: dict[str, object]) -> None:
    model, true = convert("lm"), data("lm")
    other = Model(model.config.replace(mamba={**model.config.sections["mamba"], **change})).eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name] if p.shape == weights[name].shape else weights[name][..., :3])
    assert (other(true["input_ids"]).logits - true["logits"]).abs().max() > 100 * LOGITS


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_ids_are_never_generated(use_cache: bool, temperature: float) -> None:
    model = convert("lm_untied_bias")
    with torch.no_grad():
        model.head.unembedding.bias[51:] += 100  # the most probable ones by far
    assert (model(torch.tensor([[1, 2]])).logits.argmax(-1) >= 51).all()
    found = model.generate(
        [[1, 2], [3]], max_new_tokens=12, temperature=temperature, use_cache=use_cache, seed=0
    )
    assert all(0 <= token < 51 for row in found for token in row)


def test_a_saved_conversion_is_the_same_model(tmp_path: Path) -> None:
    for case in ("lm", "lm_untied_bias", "classification", "features"):
        given = {"pooling_strategy": "mean"} if case == "classification" else {}
        model = convert(case, **given)
        save_model(model, tmp_path / case)
        again = load_model(tmp_path / case)
        assert again.config == model.config
        ids = data(case)["input_ids"]
        name = "hidden" if case == "features" else "logits"
        assert torch.equal(again(ids)[name], model(ids)[name])


def test_weights_are_copies() -> None:
    given = tensors("lm")
    model = from_state_dict(given, config("lm"))
    before = model(torch.tensor([[1, 2, 3]])).logits
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_the_older_class_and_wrapped_names() -> None:
    """``minimamba.model.Mamba`` has no backbone; DistributedDataParallel puts a prefix before every name."""
    old = {"embedding.token_embedding.weight": "embedding.weight", "backbone.norm.weight": "norm_f.weight"}
    old["lm_head.lm_head.weight"] = "lm_head.weight"
    given = {
        "module." + old.get(name, name.removeprefix("backbone.")): t for name, t in tensors("lm").items()
    }
    assert "module.layers.0.mixer.D" in given
    true = data("lm")
    logits = from_state_dict(given, config("lm", tie_embeddings=False))(true["input_ids"]).logits
    assert (logits - true["logits"]).abs().max() <= LOGITS


def test_layer_norms() -> None:
    """rms_norm false: LayerNorms, whose offsets have a place."""
    given = tensors("features")
    for name in [n for n in given if n.endswith("norm.weight")]:
        given[name.replace("weight", "bias")] = torch.full_like(given[name], 0.25)
    model = from_state_dict(given, config("features", rms_norm=False))
    assert model.config.norm.kind == model.config.final_norm.kind == "layer"
    hidden = model(torch.arange(9)[None]).hidden
    normed = (hidden - 0.25) / given["backbone.norm.weight"]
    assert normed.mean(-1).abs().max() < 1e-5 and (normed.var(-1, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_files_and_folders(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"weights{ending}"
    if ending == ".pt":
        torch.save(tensors("lm"), file)
    else:
        save_file(tensors("lm"), file)
    true = data("lm")
    model, tokenizer = read(file, config("lm"))
    assert tokenizer is None and (model(true["input_ids"]).logits - true["logits"]).abs().max() <= LOGITS
    with pytest.raises(
        CheckpointError, match=r"expected one file with the configuration \(.json\), found none"
    ):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config("lm")))
    for path in (tmp_path, file):
        assert read(path)[0].config == model.config


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    given = tensors("lm")
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (
            {k: t for k, t in given.items() if "layers.1.mixer.D" not in k},
            {},
            "backbone.layers.1.mixer.D is missing",
        ),
        (given | {"extra.weight": torch.zeros(1)}, {}, "the tensor extra.weight has no place"),
        (given | {"backbone.norm.weight": torch.zeros(3)}, {}, r"backbone.norm.weight is .* of shape \(3,\)"),
        (given, {"n_layer": 1}, r"backbone.layers.1.mixer.A_log \(and 9 more\) has no place"),
        (given, {"dt_rank": 3}, r"x_proj.weight is .* says .* of shape \(15, 80\)"),
        (given, {"vocab_size": 40}, "has 56 rows, but vocab_size 40"),
        (given, {"d_stat": 6}, r"the setting 'd_stat' is not known \(did you mean 'd_state'\?\)"),
        (given, {"d_model": "40"}, "'d_model' is '40', not a positive integer"),
        (given, {"bias": 1}, "'bias' is 1, not true or false"),
        (given, {"dt_init": "zeros"}, "dt_init: expected one of random, constant"),
        (given | {"lm_head.lm_head.weight": torch.zeros(56, 40)}, {}, "lm_head.lm_head.weight differs"),
        (given | {"backbone.norm.weight": torch.ones(40).long()}, {}, "backbone.norm.weight is torch.int64"),
        ({**given, "step": 3}, {}, "step is no tensor; it is of type int"),  # type: ignore[dict-item]
    ]
    for weights, change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            from_state_dict(weights, config("lm", **change))
    for name, content, message in (
        ("a.pt", b"not a pickle", "a.pt holds more than tensors and plain data, or is damaged"),
        ("b.safetensors", b"12345678", "b.safetensors cannot be read"),
        ("c.txt", b"", "c.txt is no file of weights; allowed: .safetensors, .pt"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name, config("lm"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "absent.pt", config("lm"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state dict but a list"):
        read(tmp_path / "list.pt", config("lm"))
    torch.save({"model": Model}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain data"):
        read(tmp_path / "code.pt", config("lm"))
