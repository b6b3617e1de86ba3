"""nanochat of October 2025 and July 2026, and its hybrid: its own numbers, its layout, what is refused.

tests/fixtures/nanochat_* are folders that nanochat itself wrote, with what it computed from them; the tolerances are
those that their README files state for float32.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.config.errors import CheckpointError
from plait.config.schema import ModelConfig, TokenizerConfig
from plait.formats.nanochat import from_state_dict, read, read_meta, write
from plait.formats.nanochat_files import find_weights
from plait.formats.nanochat_layout import model_config, to_theirs
from plait.models import Model
from plait.models.loss import cross_entropy
from plait.tokenizers.chat import NANOCHAT_SPECIAL_TOKENS
from plait.tokenizers.load import train_tokenizer
from tests.invariants import redraw

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = {"october": FIXTURES / "nanochat_oct2025", "july": FIXTURES / "nanochat_jul2026"}
ABSOLUTE, LOSS = 1e-4, 1e-5
GRADIENTS = {"october": 1e-4, "july": 2e-4}  # relative to the largest element
both = pytest.mark.parametrize("name", FOLDERS)


@cache
def oracle(name: str) -> dict[str, Tensor]:
    return load_file(FOLDERS[name] / "oracle.safetensors")


def weights_of(name: str, step: int = 10) -> Path:
    return FOLDERS[name] / "base_checkpoints" / "d4" / f"model_{step:06d}.pt"


def tensors_of(name: str, step: int = 10) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(weights_of(name, step), weights_only=True)
    return tensors


def model_of(name: str, step: int = 10) -> Model:
    return read(weights_of(name, step))[0]


def within(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = float((got.detach() - want).abs().max())
    assert error <= tolerance, f"{what}: off by {error:.2e}, more than {tolerance:.0e}"


def losses(model: Model, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The mean loss on nanochat's shifted targets, whose -1 is our -100, and the logits."""
    logits = model(data["input_ids"]).logits
    total, count = cross_entropy(logits, data["targets"].masked_fill(data["targets"] == -1, -100))
    return total / count, logits


@both
def test_logits_loss_and_gradients_are_nanochats(name: str) -> None:
    model, data = model_of(name), oracle(name)
    loss, logits = losses(model, data)
    within(logits, data["logits"], ABSOLUTE, "logits")
    within(loss[None], data["loss"], LOSS, "loss")
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), data["targets"], ignore_index=-1, reduction="none"
    )
    within(each, data["loss_per_token"], ABSOLUTE, "loss of each token")
    loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == dict(model.named_parameters()).keys(), "a parameter has no gradient"
    theirs = to_theirs(ours, model.config)
    names = [n.removeprefix("grad.") for n in data if n.startswith("grad.")]
    assert len(names) >= 3
    for n in names:
        true = data[f"grad.{n}"]
        within(theirs[n], true, GRADIENTS[name] * float(true.abs().max()), f"gradient of {n}")


@both
def test_greedy_continuation_through_the_cache_is_nanochats(name: str) -> None:
    data = oracle(name)
    prompt, greedy = data["prompt"].tolist(), data["greedy"].tolist()
    made = model_of(name).generate([prompt], max_new_tokens=len(greedy), temperature=0)
    assert made == [greedy]


@both
def test_the_cache_gives_nanochats_logits_at_every_token(name: str) -> None:
    model, data = model_of(name), oracle(name)
    ids = data["input_ids"]
    cache, done, parts = model.new_cache(2, ids.shape[1]), 0, []
    for size in (1, 3, ids.shape[1] - 10, 1, 1, 4):
        parts.append(model.step(ids[:, done : done + size], cache))
        done += size
    within(torch.cat(parts, 1), data["logits"], ABSOLUTE, "logits of pieces")


@both
def test_the_last_step_is_read_and_its_embeddings_are_widened(name: str) -> None:
    stored = tensors_of(name, 20)
    assert stored["transformer.wte.weight"].dtype == torch.bfloat16
    for place in (FOLDERS[name], FOLDERS[name] / "base_checkpoints", weights_of(name).parent):
        model, tokenizer = read(place)
        assert tokenizer is None
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        within(model(oracle(name)["input_ids"]).logits, oracle(name)["logits_step20"], ABSOLUTE, "logits")
        assert not model.training
        assert torch.equal(model.embedding.tokens.weight, stored["transformer.wte.weight"].float())


def test_without_a_path_the_users_own_folder_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(FOLDERS["july"]))
    assert read_meta()["step"] == 20
    assert read()[0].config.backout


@both
@pytest.mark.parametrize("step", [10, 20])
def test_what_is_written_is_what_nanochat_wrote(name: str, step: int, tmp_path: Path) -> None:
    model, source = model_of(name, step), weights_of(name, step)
    folder = tmp_path / "base_checkpoints" / "d4"
    meta = read_meta(source)
    write(model, folder, step=step, sequence_len=meta["max_seq_len"], meta=meta)
    written = torch.load(folder / source.name, weights_only=True)
    original = tensors_of(name, step)
    assert list(written) == list(original)
    for n, tensor in original.items():
        assert written[n].shape == tensor.shape and written[n].dtype == torch.float32
        assert torch.equal(written[n], tensor.float()), n
    assert all(t.dtype == torch.float32 for t in original.values()) or step == 20
    described = source.with_name(source.name.replace("model", "meta")).with_suffix(".json")
    assert (folder / described.name).read_bytes() == described.read_bytes()
    again, _ = read(tmp_path)
    for n, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(n)), n


QUIRKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "october": [
        ("rotation by minus theta", {"attention": {"rope_reverse": False}}),
        ("tables in bfloat16", {"attention": {"rope_dtype": "float32"}}),
        ("norm of queries and keys", {"attention": {"qk_norm": False}}),
        ("soft-cap", {"head": {"softcap": None}}),
        ("norm after the embedding", {"embedding": {"norm": "none"}}),
        ("squared ReLU", {"mlp": "gelu"}),
    ],
    "july": [
        ("rotation by minus theta", {"attention": {"rope_reverse": False}}),
        ("base of the rotation", {"attention": {"rope_base": 10000.0}}),
        ("sharper attention", {"attention": {"qk_scale": 1.0}}),
        ("soft-cap", {"head": {"softcap": None}}),
        ("windows", {"pattern": [{"mixer": "T", "value_embedding": bool(i % 2)} for i in range(4)]}),
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, changes, id=f"{name}: {what}")
        for name, all_ in QUIRKS.items()
        for what, changes in all_
    ],
)
def test_every_quirk_is_an_option_and_matters(name: str, changes: dict[str, Any]) -> None:
    model, data = model_of(name), oracle(name)
    section = model_config(read_meta(weights_of(name))["model_config"])
    values = dict(section)
    for key, value in changes.items():
        both_map = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both_map else value
    plain = Model(ModelConfig.model_validate(values))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved = float((plain.eval()(data["input_ids"]).logits - data["logits"]).abs().max())
    assert moved > 5 * ABSOLUTE, f"it moves the logits by {moved:.1e} only"


@pytest.mark.parametrize(
    "part", ["smear.share", "backout.share", "blocks.1.mixer.value_embedding.table.weight"]
)
def test_every_part_of_july_matters(part: str) -> None:
    model, data = model_of("july"), oracle("july")
    with torch.no_grad():
        model.get_parameter(part).zero_()
        moved = float((model(data["input_ids"]).logits - data["logits"]).abs().max())
    assert moved > 100 * ABSOLUTE


@both
def test_compiled_models_prefix_is_taken_off_once_and_whole(name: str) -> None:
    """lstrip("_orig_mod.") strips letters: it made "esid_lambdas" of "resid_lambdas"."""
    meta = read_meta(weights_of(name))
    prefixed = {f"_orig_mod.{n}": tensor for n, tensor in tensors_of(name).items()}
    model = from_state_dict(prefixed, meta)
    within(model(oracle(name)["input_ids"]).logits, oracle(name)["logits"], ABSOLUTE, "logits")


def test_weights_are_copied() -> None:
    tensors = tensors_of("october")
    model = from_state_dict(tensors, read_meta(weights_of("october")))
    before = model.head.unembedding.weight.clone()
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(model.head.unembedding.weight, before) and before.abs().max() > 0


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: tensor for n, tensor in tensors.items() if n != name}


Change = Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]]
REFUSED: dict[str, tuple[str, Change]] = {
    "missing": (
        r"the tensor transformer\.h\.2\.attn\.c_k\.weight is missing",
        lambda t, c: (without(t, "transformer.h.2.attn.c_k.weight"), c),
    ),
    "left over": (
        r"the tensor transformer\.h\.3\..* \(and 5 more\) has no place",
        lambda t, c: (t, c | {"n_layer": 3}),
    ),
    "shape": (
        r"transformer\.h\.0\.attn\.c_k\.weight is .*\(16, 32\).*\(32, 32\)",
        lambda t, c: (t, c | {"n_kv_head": 4}),
    ),
    "numbers": (
        r"lm_head\.weight is torch\.int64",
        lambda t, c: (t | {"lm_head.weight": t["lm_head.weight"].long()}, c),
    ),
    "no tensor": (r"lm_head\.weight is no tensor", lambda t, c: (t | {"lm_head.weight": 3}, c)),
    "unknown key": (r"'n_heads' is not known.*'n_head'", lambda t, c: (t, c | {"n_heads": 4})),
    "no number": (r"'n_layer' is 'four', not a positive integer", lambda t, c: (t, c | {"n_layer": "four"})),
    "windows": (
        r"window_pattern: it must be letters S and L; got 'SXL'",
        lambda t, c: (t, c | {"window_pattern": "SXL"}),
    ),
    "july's tensors": (r"resid_lambdas is missing", lambda t, c: (t, c | {"window_pattern": "L"})),
    "pattern": (
        r"block_pattern.*Unknown block type",
        lambda t, c: (t, c | {"block_pattern": ["T", "X"] * 2}),
    ),
    "length": (r"3 block types, which must match the 4", lambda t, c: (t, c | {"block_pattern": ["T"] * 3})),
    "no section": (r"model_config is 7", lambda t, c: (t, {"model_config": 7})),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named(what: str) -> None:
    message, change = REFUSED[what]
    tensors, config = change(tensors_of("october"), read_meta(weights_of("october"))["model_config"])
    with pytest.raises(CheckpointError, match=message):
        from_state_dict(tensors, config)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    weights = tmp_path / "model_000001.pt"
    torch.save({"transformer.wte.weight": Runs()}, weights, pickle_module=pickle)
    with pytest.raises(CheckpointError, match="more than tensors and plain data"):
        read(weights, {"n_layer": 1})
    assert not (tmp_path / "ran").exists()


def test_the_largest_depth_and_the_last_step_are_found(tmp_path: Path) -> None:
    for stage, tag, step in [
        ("base", "d4", 7),
        ("base", "d12", 9),
        ("base", "d12", 100),
        ("base", "zz", 999),
    ]:
        folder = tmp_path / f"{stage}_checkpoints" / tag
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"model_{step:06d}.pt").touch()
        (folder / f"optim_{step + 1:06d}.pt").touch()
    best = tmp_path / "base_checkpoints" / "d12" / "model_000100.pt"
    assert find_weights(tmp_path) == find_weights(tmp_path / "base_checkpoints") == best
    assert find_weights(best.parent / "model_000009.pt").name == "model_000009.pt"
    (tmp_path / "chatsft_checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="base_checkpoints, chatsft_checkpoints; give one of these"):
        find_weights(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint of nanochat's"):
        find_weights(tmp_path / "chatsft_checkpoints")
    with pytest.raises(CheckpointError, match=r"there is no .*base_checkpoint \(did you mean"):
        find_weights(tmp_path / "base_checkpoint")
    one = tmp_path / "named"
    shutil.copytree(best.parent, one / "my model")
    assert find_weights(one).parent.name == "my model"
    shutil.copytree(best.parent, one / "other")
    with pytest.raises(CheckpointError, match="several models, my model, other"):
        find_weights(one)


def test_a_bare_state_dict_takes_its_configuration(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors, meta = tensors_of("october"), read_meta(weights_of("october"))
    save_file(tensors, tmp_path / "weights.safetensors")
    torch.save(tensors, tmp_path / "weights.pt")
    for file in ("weights.safetensors", "weights.pt"):
        with pytest.raises(CheckpointError, match="give the configuration"):
            read(tmp_path / file)
        model, _ = read(tmp_path / file, meta["model_config"])
        within(model(oracle("october")["input_ids"]).logits, oracle("october")["logits"], ABSOLUTE, "logits")
    shutil.copy(weights_of("october"), tmp_path)
    with pytest.raises(CheckpointError, match=r"meta_000010\.json cannot be read"):
        read(tmp_path / "model_000010.pt")
    (tmp_path / "meta_000010.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no model_config"):
        read(tmp_path / "model_000010.pt")
    torch.save([1, 2], tmp_path / "model_000011.pt")
    with pytest.raises(CheckpointError, match="holds no state dict but a list"):
        read(tmp_path / "model_000011.pt", meta)


def small(**changes: Any) -> Model:
    values: dict[str, Any] = {
        "preset": "nanochat",
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 40,
        "attention": {"n_head": 2},
    }
    for key, value in changes.items():
        both_map = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both_map else value
    model = Model(ModelConfig.model_validate(values))
    redraw(model)
    return model.eval()


UNSPEAKABLE: list[tuple[str, dict[str, Any]]] = [
    (r"layer 0: it has no mamba2", {"pattern": "M2 T", "mamba2": {"headdim": 16}}),
    (r"dropout 0\.1: its models have 0", {"dropout": 0.1}),
    (r"head tie true: its models have false", {"head": {"tie": True}}),
    (r"head softcap null: its models have 15", {"head": {"softcap": None}}),
    (r"final_norm weight true", {"norm": {"weight": True}}),
    (r"layer 0: norm weight true", {"attention": {"norm": {"weight": True}}}),
    (r"final_norm kind 'none'", {"final_norm": "none"}),
    (r"embedding position 'learned'", {"embedding": {"position": "learned"}}),
    (r"rows of the embedding 64: its models have 40", {"pad_vocab_size_multiple": 64}),
    (r"layer 1: linear kind 'ternary'", {"pattern": ["T", {"mixer": "T", "linear": "ternary"}]}),
    (r"layer 0: rope_base 5000", {"attention": {"rope_base": 5000.0}}),
    (r"layer 0: window 8", {"attention": {"window": 8}}),
    (r"layer 1: n_head 4: its models have 2", {"pattern": ["T", {"mixer": "T", "n_head": 4}]}),
    (r"layer 0: mlp kind 'gelu'", {"mlp": "gelu"}),
    (r"layer 0: residual embedded true", {"residual": {"embedded": True}}),
    (r"layer 1: dt_rank 3", {"pattern": ["T", {"mixer": "M", "dt_rank": 3}]}),
    (r"layer 1: d_state 8", {"pattern": ["M", {"mixer": "M", "d_state": 8}]}),
    (r"a Mamba layer beside smear or backout", {"pattern": "T M", "backout": True}),
    (r"backout false: its models have true", {"embedding": {"smear": True}}),
]


@pytest.mark.parametrize(("message", "changes"), UNSPEAKABLE, ids=[m for m, _ in UNSPEAKABLE])
def test_what_nanochat_cannot_express_is_refused_by_name(
    message: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(small(**changes), tmp_path / "d2", step=1)
    assert not (tmp_path / "d2").exists(), "something was written all the same"


def test_initialisation_is_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    write(small(init="normal"), tmp_path / "d2", step=1)
    assert (tmp_path / "d2" / "model_000001.pt").is_file()


def test_float64_is_refused_and_bfloat16_widened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no float64, and embedding\.tokens\.weight is"):
        write(small().double(), tmp_path / "d2", step=1)
    narrow = small().bfloat16()
    write(narrow, tmp_path / "d2", step=1)
    assert torch.equal(
        read(tmp_path / "d2")[0].head.unembedding.weight, narrow.head.unembedding.weight.float()
    )


@pytest.mark.parametrize("mlp", [False, True], ids=["no MLP", "MLP"])
def test_a_hybrid_is_written_as_the_fork_does_and_read_back(mlp: bool, tmp_path: Path) -> None:
    model = small(
        pattern=["T", "M", "M"], n_layer=3, mamba={"d_state": 8, "mlp": {"kind": "relu2" if mlp else "none"}}
    )
    write(model, tmp_path / "d3", step=5, sequence_len=64)
    gpt = json.loads((tmp_path / "d3" / "meta_000005.json").read_text())["model_config"]
    assert gpt == {
        "sequence_len": 64,
        "vocab_size": 40,
        "n_layer": 3,
        "n_head": 2,
        "n_kv_head": 2,
        "n_embd": 32,
        "block_pattern": ["T", "M", "M"],
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_use_mlp": mlp,
    }
    names = set(torch.load(tmp_path / "d3" / "model_000005.pt", weights_only=True))
    mixer = {"A_log", "D", "conv1d.bias", "conv1d.weight", "dt_proj.bias", "dt_proj.weight"}
    mixer |= {"in_proj.weight", "out_proj.weight", "x_proj.weight"}
    own = {f"transformer.h.2.mixer.{n}" for n in mixer}
    own |= {"transformer.h.2.mlp.c_fc.weight", "transformer.h.2.mlp.c_proj.weight"} if mlp else set()
    assert {n for n in names if n.startswith("transformer.h.2.")} == own
    again, _ = read(tmp_path)
    ids = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert [block.kind for block in again.blocks] == ["attention", "mamba", "mamba"]


def test_long_names_of_block_types_are_read(tmp_path: Path) -> None:
    model = small(pattern=["T", "M"])
    write(model, tmp_path / "d2", step=5)
    meta = tmp_path / "d2" / "meta_000005.json"
    values = json.loads(meta.read_text())
    values["model_config"]["block_pattern"] = ["transformer", "MAMBA"]
    meta.write_text(json.dumps(values))
    assert [block.kind for block in read(tmp_path)[0].blocks] == ["attention", "mamba"]


def test_a_tokenizer_lies_beside_the_model_and_belongs_to_it(tmp_path: Path) -> None:
    special = list(NANOCHAT_SPECIAL_TOKENS)
    config = TokenizerConfig(type="bpe", vocab_size=300, special_tokens=special)
    tokenizer = train_tokenizer(config, ["a little text, a little more of it"] * 3)
    folder = tmp_path / "base_checkpoints" / "d2"
    model = small(vocab_size=tokenizer.vocab_size)
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ ids, but the model 40"):
        write(small(), folder, step=1, tokenizer=tokenizer)
    assert not folder.exists()
    write(model, folder, step=1, tokenizer=tokenizer)
    assert (tmp_path / "tokenizer" / "tokenizer.pkl").is_file()
    _, found = read(tmp_path, allow_pickle=True)
    assert found is not None and found.encode("a little text") == tokenizer.encode("a little text")
    write(small(), folder, step=2)
    with pytest.raises(CheckpointError, match="do not belong together"):
        read(tmp_path, allow_pickle=True)
