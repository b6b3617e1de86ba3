"""MiniMamba's interface as its document prints it, under the changed import root: configs, snippets, cache, generation.

Its models, their trained weights and parts are in test_minimamba_models.py, _weights.py and _parts.py.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plait
from plait.compat import minimamba
from plait.compat.minimamba import (
    BaseMambaConfig,
    InferenceParams,
    Mamba,
    MambaClassificationConfig,
    MambaConfig,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaLMConfig,
)
from plait.config.errors import BuildError, CapacityError, ConfigError, DataError
from plait.config.load import load_config
from plait.config.table import TABLE
from tests.invariants import redraw, rms

FIXTURES = Path(__file__).parents[1] / "fixtures" / "minimamba"
SMALL: dict[str, Any] = {"d_model": 24, "n_layer": 3, "d_state": 6}
V = 51


@pytest.fixture(autouse=True)
def own_table() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def language_model(**more: Any) -> MambaForCausalLM:
    """Weights with which every branch and a long memory matter."""
    model = MambaForCausalLM(MambaLMConfig(**{**SMALL, "vocab_size": V, **more}))
    redraw(model)
    return model.eval()


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- names and configs


def test_every_name_is_where_it_was() -> None:
    places = {
        "config": "BaseMambaConfig MambaConfig MambaLMConfig MambaClassificationConfig InferenceParams",
        "core": "MambaEncoder MambaEmbedding MambaLMHead MambaClassificationHead",
        "models": "MambaForCausalLM MambaForSequenceClassification MambaForFeatureExtraction Mamba",
        "norm": "RMSNorm",
        "s6": "S6",
        "block": "MambaBlock",
    }
    names = {"MambaLegacy"}
    for module, words in places.items():
        found = importlib.import_module(f"plait.compat.minimamba.{module}")
        for name in words.split():
            assert getattr(found, name) is getattr(minimamba, name)
            names.add(name)
    assert importlib.import_module("plait.compat.minimamba.model").Mamba is minimamba.MambaLegacy
    assert set(minimamba.__all__) == names and len(names) == 17
    assert minimamba.__version__ == "1.0.0" and MambaConfig is MambaLMConfig


def test_the_defaults_are_minimambas() -> None:
    base = {
        "d_model": 768,
        "n_layer": 12,
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": "auto",
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init": "random",
        "dt_scale": 1.0,
        "dt_init_floor": 1e-4,
        "conv_bias": True,
        "bias": False,
        "norm_epsilon": 1e-5,
        "rms_norm": True,
        "use_fast_path": True,
        "device": None,
        "dtype": None,
        "gradient_checkpointing": False,
    }
    assert BaseMambaConfig().to_dict() == base
    lm = {"vocab_size": 32000, "pad_vocab_size_multiple": 8, "tie_embeddings": True}
    assert MambaLMConfig().to_dict() == base | lm
    labels = {"num_labels": 2, "pooling_strategy": "last", "dropout": 0.1, "vocab_size": 32000}
    assert MambaClassificationConfig().to_dict() == base | labels
    assert (BaseMambaConfig().d_inner, BaseMambaConfig(d_model=10, expand=1.5).d_inner) == (1536, 15)
    assert [MambaLMConfig(vocab_size=n).padded_vocab_size for n in (32000, 32001, 5)] == [32000, 32008, 8]


def test_one_config_is_laid_into_another() -> None:
    base_config = BaseMambaConfig(d_model=512, n_layer=12, d_conv=3)
    lm_config = MambaLMConfig(vocab_size=32000, **base_config)
    class_config = MambaClassificationConfig(num_labels=3, **base_config)
    assert (lm_config.d_model, lm_config.d_conv, lm_config.vocab_size) == (512, 3, 32000)
    assert (class_config.n_layer, class_config.num_labels) == (12, 3)
    assert lm_config["d_conv"] == 3 and dict(**lm_config) == lm_config.to_dict()
    with pytest.raises(KeyError, match="no field 'd_con'"):
        lm_config["d_con"]


def test_configs_as_json(tmp_path: Path) -> None:
    config = MambaLMConfig(**SMALL, vocab_size=V, dtype=torch.bfloat16, device=torch.device("cpu"))
    path = tmp_path / "config.json"
    config.save_to_json(path)
    again = MambaLMConfig.from_json(path)
    assert again == MambaLMConfig.from_json_file(path) == MambaLMConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() == json.loads(config.to_json_string())
    assert (again.dtype, again.device) == ("bfloat16", "cpu")
    assert MambaForCausalLM(again).model.dtype == MambaForCausalLM(config).model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"config.json: BaseMambaConfig has no field 'vocab_size'"):
        BaseMambaConfig.from_json(path)
    with pytest.raises(ConfigError, match=r"has no field 'd_stat' \(did you mean 'd_state'\?\)"):
        MambaLMConfig.from_dict({"d_stat": 3})
    with pytest.raises(ConfigError, match=r"absent.json: there is no such file"):
        MambaLMConfig.from_json(tmp_path / "absent.json")
    # a file of MiniMamba's own also tells what follows from the rest
    theirs = json.loads((FIXTURES / "oracle.json").read_text())["cases"]["lm"]["config"]
    assert MambaLMConfig.from_dict(theirs).padded_vocab_size == theirs["padded_vocab_size"] == 56


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_model": 0}, "d_model: expected a whole number greater than 0; got 0"),
        ({"dt_rank": "full"}, "dt_rank"),
        ({"dt_init": "zeros"}, "dt_init: expected one of random, constant"),
        ({"dtype": "int8"}, "dtype: expected one of float32, float64, bfloat16, float16"),
        ({"rms_norm": 3}, "rms_norm"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon"),
    ],
)
def test_values_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MambaLMConfig(**wrong)
    config = MambaLMConfig(**SMALL)
    for name, value in wrong.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):  # also one that was changed afterwards
        MambaForCausalLM(config)


# ---- the document's snippets, at a smaller size


def test_quick_start() -> None:
    config = MambaLMConfig(d_model=64, n_layer=3, vocab_size=3200)
    model = MambaForCausalLM(config)

    input_ids = torch.randint(0, 3200, (1, 10))
    generated = model.generate(input_ids, max_new_tokens=50, temperature=0.8)
    assert generated.shape == (1, 60) and torch.equal(generated[:, :10], input_ids)
    assert generated.min() >= 0 and generated.max() < 3200
    assert model.training  # as it was


def test_advanced_usage(capsys: pytest.CaptureFixture[str]) -> None:
    model, input_ids = language_model(), ids_of(1, 10)

    inference_params = InferenceParams()
    for token in model.generate_streaming(input_ids, max_new_tokens=100):
        print(f"Generated: {token}")
    cache_info = model.get_cache_info(inference_params)
    print(f"Memory usage: {cache_info['memory_mb']:.2f} MB")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 101 and lines[-1] == "Memory usage: 0.00 MB"  # nothing was read through these
    assert all(0 <= int(line.removeprefix("Generated: ")) < V for line in lines[:-1])


def test_old_code_and_the_new_form() -> None:
    config = MambaConfig(d_model=64, n_layer=3, vocab_size=320)
    model = Mamba(config)
    new = MambaForCausalLM(MambaLMConfig(d_model=64, n_layer=3, vocab_size=320))
    assert isinstance(model, MambaForCausalLM)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in new.named_parameters()
    }


def test_three_tasks() -> None:
    base_config = BaseMambaConfig(**SMALL)
    lm_config = MambaLMConfig(vocab_size=V, **base_config)
    class_config = MambaClassificationConfig(num_labels=3, vocab_size=V, **base_config)
    ids = ids_of(2, 9)

    model: Any = MambaForCausalLM(lm_config)
    assert model(ids).shape == (2, 9, V)
    model = MambaForSequenceClassification(class_config)
    assert model(ids).shape == (2, 3) and model.num_labels == 3
    model = MambaForFeatureExtraction(base_config)
    assert model(torch.randn(2, 9, 24)).shape == (2, 9, 24)
    for cls, config, wanted in (
        (MambaForCausalLM, base_config, "takes a MambaLMConfig; got a BaseMambaConfig"),
        (MambaForSequenceClassification, lm_config, "takes a MambaClassificationConfig; got a MambaLMConfig"),
    ):
        with pytest.raises(BuildError, match=wanted):
            cls(config)


# ---- InferenceParams


@pytest.mark.parametrize("fast", [True, False])
def test_cached_calls_equal_the_whole_run_at_every_split(fast: bool) -> None:
    model, ids = language_model(use_fast_path=fast), ids_of(2, 12)
    whole = model(ids)
    for cut in range(13):
        for second in {cut, min(cut + 4, 12)}:
            params = InferenceParams(max_batch_size=2)
            spans = ((0, cut), (cut, second), (second, 12))
            logits = torch.cat([model(ids[:, a:b], params) for a, b in spans], 1)
            assert rms(logits, whole) < 1e-5, (cut, second)
            assert params.seqlen_offset == 12


def test_what_is_cached_is_told_in_numbers() -> None:
    model, ids = language_model(), ids_of(2, 5)
    params = InferenceParams(max_batch_size=2)
    empty = {"cached_layers": 0, "total_tensors": 0, "memory_mb": 0.0, "seqlen_offset": 0}
    assert params.get_cache_info() == model.get_cache_info(params) == model.get_cache_info() == empty
    model(ids, params)
    model(ids[:, :2], inference_params=params)
    floats = 3 * 2 * 48 * (3 + 6)  # layers, rows, channels, taps - 1 and states
    assert model.get_cache_info(params) == {
        "cached_layers": 3,
        "total_tensors": 6,
        "memory_mb": 4 * floats / 2**20,
        "seqlen_offset": 7,
    }
    shapes = {name: tuple(t.shape) for name, t in params.cache.items()}
    assert shapes == {
        f"{name}_{i}": size
        for i in range(3)
        for name, size in (("conv_state", (2, 3, 48)), ("ssm_state", (2, 48, 6)))
    }
    assert not any(tensor.requires_grad for tensor in params.cache.values())  # though gradients were on
    model.reset_cache(params)
    assert params.get_cache_info() == empty and params.cache == {}
    assert rms(model(ids, params), model(ids)) < 1e-6


def test_a_cache_is_one_models_and_counts_by_itself() -> None:
    model, other, ids = language_model(), language_model(), ids_of(1, 4)
    params = InferenceParams(max_sequence_len=6)
    model(ids, params)
    params.seqlen_offset = 4  # what it is already
    for wrong in (5, 0):
        with pytest.raises(BuildError, match="seqlen_offset is 4, counted by the model"):
            params.seqlen_offset = wrong
    with pytest.raises(BuildError, match="belong to another model"):
        other(ids, params)
    with pytest.raises(CapacityError, match=r"3 more would exceed the cache's capacity of 6"):
        model(ids[:, :3], params)
    assert params.seqlen_offset == 4
    with pytest.raises(BuildError, match=r"2 rows were given, but max_batch_size is 1: .*max_batch_size=2"):
        model(ids_of(2, 4), InferenceParams())
    with pytest.raises(BuildError, match="inference_params is a dict; it must be InferenceParams"):
        model(ids, {})
    for given in ({"seqlen_offset": 3}, {"cache": {"conv_state_0": ids}}):
        with pytest.raises(BuildError, match="begins empty"):
            InferenceParams(**given)


def test_prepared_inputs_are_what_the_cache_lacks() -> None:
    model, ids = language_model(), ids_of(1, 9)
    params, logits = InferenceParams(), []
    for length in (4, 5, 9):
        logits.append(model(**model.prepare_inputs_for_generation(ids[:, :length], params)))
    assert [part.shape[1] for part in logits] == [4, 1, 4]  # not the last token alone
    assert rms(torch.cat(logits, 1), model(ids)) < 1e-5
    assert torch.equal(model(**model.prepare_inputs_for_generation(ids)), model(ids))


# ---- generation


def greedy(model: MambaForCausalLM, ids: Tensor, new: int) -> Tensor:
    for _ in range(new):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_lengths_and_greedy_choice() -> None:
    model, ids = language_model(), ids_of(3, 6)
    want = greedy(model, ids, 10)
    for options in ({"do_sample": False}, {"temperature": 0.0}, {"top_k": 1}):
        for use_cache in (True, False):
            assert torch.equal(model.generate(ids, max_length=16, use_cache=use_cache, **options), want)
    assert torch.equal(model.generate(ids, max_length=7, max_new_tokens=10, do_sample=False), want)
    assert model.generate(ids).shape == (3, 50)
    assert torch.equal(model.generate(ids, max_length=5), ids)  # it has more already
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[:, :2] = 0
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    found = model.generate(padded, max_new_tokens=10, do_sample=False, attention_mask=mask)
    assert torch.equal(found[:, 2:], want)


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    model = language_model()
    ids = ids_of(1, 5).expand(4000, 5)
    torch.manual_seed(3)
    drawn = model.generate(ids, max_new_tokens=1, top_p=1.0, temperature=2.0)[:, -1]
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, max_new_tokens=1, top_p=1.0, temperature=2.0)[:, -1], drawn)
    probability = (model(ids[:1])[0, -1] / 2.0).softmax(-1)
    share = torch.bincount(drawn, minlength=V) / 4000
    assert (share - probability).abs().max() < 0.03
    nucleus = model.generate(ids, max_new_tokens=1, top_p=0.5, temperature=2.0)[:, -1].unique()
    ordered, index = probability.sort(descending=True)
    kept = index[: int((ordered.cumsum(0) < 0.5).sum()) + 1]
    assert sorted(nucleus.tolist()) == sorted(kept.tolist())


def test_streaming_gives_ints_one_by_one_and_ends_at_eos() -> None:
    model, ids = language_model(), ids_of(1, 6)
    want = greedy(model, ids, 12)[0, 6:].tolist()
    stream = model.generate_streaming(ids, max_new_tokens=12, temperature=0.0)
    first = next(stream)
    assert type(first) is int and [first, *stream] == want
    end = want[4]
    ended = list(model.generate_streaming(ids, max_new_tokens=12, temperature=0.0, eos_token_id=end))
    assert ended == want[: want.index(end) + 1]
    with pytest.raises(DataError, match="continues one row; input_ids has 2"):
        model.generate_streaming(ids_of(2, 3))


# ---- from the configuration file to generated text


def test_end_to_end_from_a_saved_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its JSON is a config of ``plait train``: it trains, saves, resumes bit for bit, generates."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    MambaLMConfig(**SMALL, vocab_size=260).save_to_json(tmp_path / "minimamba.json")
    overrides = [
        f"--data.train={tmp_path / 'text.txt'}",
        "--data.sequence_length=32",
        "--training.batch_tokens=128",
        "--training.lr=1e-2",
        "--training.checkpoint_every=6",
        "--training.eval_tokens=256",
    ]

    overrides += [f"--training.out={tmp_path / 'run'}", "--training.steps=12"]
    done = plait.train(load_config(tmp_path / "minimamba.json", overrides), quiet=True)
    assert [layer.kind for layer in done.model.config.layers()] == ["mamba"] * 3
    assert done.model.config.layers()[0].options.d_state == 6 and done.model.vocab_size == 260
    assert done.loss is not None and done.loss < 4.5
    again = plait.train(resume=next((tmp_path / "run" / "checkpoints").glob("*06")), quiet=True)
    assert again.step == 12
    for a, b in zip(again.model.parameters(), done.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(plait.load(tmp_path / "run").generate("the ", max_new_tokens=5), str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_fast_path": False}, "use_fast_path: .*PLAIT_BACKEND=portable"),
        ({"dtype": "float64"}, "dtype: .*float32, bfloat16, float16"),
        ({"vocab_size": None}, "vocab_size: a run needs token ids"),
        ({"d_stat": 3}, r"d_stat: unknown key.*did you mean 'd_state'\?"),
    ],
)
def test_a_run_refuses_what_it_cannot_honour(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({**MambaLMConfig(**SMALL).to_dict(), **change})


def test_a_saved_classifiers_config_is_a_run_too() -> None:
    given = MambaClassificationConfig(
        **SMALL, num_labels=1, pooling_strategy="max", device="cpu", gradient_checkpointing=True
    )
    config = load_config(given.to_dict() | {"dtype": "bfloat16"})
    head = config.model.head
    assert (head.kind, head.num_labels, head.pooling, head.dropout) == ("classification", 1, "max", 0.1)
    training = config.training
    assert (training.objective, training.precision, training.device) == ("classification", "bf16", "cpu")
    assert training.activation_checkpointing == "block"


@dataclass
class Ranked(MambaLMConfig):
    """A config with a field for a mixer of one's own."""

    rank: int = 3


def test_a_config_of_ones_own_reaches_the_mixer() -> None:
    class LowRank(torch.nn.Module):
        def __init__(self, config: Ranked) -> None:
            super().__init__()
            self.down = torch.nn.Linear(config.d_model, config.rank)
            self.up = torch.nn.Linear(config.rank, config.d_model)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    model = MambaForCausalLM(Ranked(**SMALL, vocab_size=V, rank=5), mixer_cls=LowRank)
    assert model.backbone.layers[2].mixer.down.weight.shape == (5, 24)
