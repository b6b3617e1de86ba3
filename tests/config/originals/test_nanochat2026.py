"""nanochat's settings of July 2026: what follows from the depth, every setting's effect, and what is refused.

The numbers of the first table were computed by nanochat's own code (92d63d4), those of the second its log prints
("Auto Batch Size Scaling").
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.originals import recognise
from plait.config.originals.nanochat2026 import (
    BaseTrain2026,
    counted_parameters,
    gpt_values,
    scaling,
    translate,
)
from plait.models.model import Model
from plait.training.horizon import counted_parameters as counted_of_model
from plait.training.horizon import horizon
from plait.training.optimizers import assigned_groups
from plait.training.resume import differences

# depth, vocabulary: counted parameters, batch, weight decay, steps
COMPUTED = {
    (2, 32768): (4587532, 131072, 3.360004394519755, 420),
    (4, 32768): (11534384, 262144, 1.8899031293917847, 528),
    (7, 32768): (38797504, 262144, 0.5618626501644677, 1776),
    (12, 32768): (110100912, 524288, 0.28, 2520),
    (17, 32768): (308478924, 1048576, 0.14133133074080959, 3530),
    (20, 32768): (435160240, 1048576, 0.1001877764255601, 4980),
    (24, 32768): (729810624, 1048576, 0.05973842446340308, 8352),
    (26, 32768): (918423532, 1048576, 0.04747018702740847, 10510),
    (32, 32768): (1677724672, 2097152, 0.03675007690415606, 9600),
    (8, 65500): (58720448, 524288, 0.6449999509540527, 1344),
    (17, 65500): (346227660, 1048576, 0.15470426229076983, 3962),
    (24, 65500): (780142272, 1048576, 0.0686578546598222, 8928),
}


@pytest.mark.parametrize(("depth", "vocab_size"), COMPUTED)
def test_what_follows_from_the_depth(depth: int, vocab_size: int) -> None:
    counted, batch, decay, steps = COMPUTED[depth, vocab_size]
    given = BaseTrain2026(depth=depth, vocab_size=vocab_size)
    assert counted_parameters(gpt_values(given)) == counted
    training = load_config({"release": 2026, "depth": depth, "vocab_size": vocab_size}).training
    assert training.batch_tokens == batch
    assert training.weight_decay == pytest.approx(decay, rel=1e-7)
    assert 12 * counted // batch == steps
    factor = math.sqrt(batch / 2**19)
    assert training.muon_lr == pytest.approx(0.02 * factor)
    assert training.embedding_lr == pytest.approx(0.3 * factor)
    assert training.unembedding_lr == pytest.approx(0.008 * factor)


@pytest.mark.parametrize(
    ("depths", "batch"), [((8,), 2**18), ((10, 16), 2**19), ((18, 26), 2**20), ((32, 50), 2**21)]
)
def test_the_batches_that_nanochats_log_prints(depths: tuple[int, ...], batch: int) -> None:
    for depth in depths:
        assert scaling(BaseTrain2026(depth=depth)).batch_tokens == batch


@pytest.mark.parametrize("depth", [4, 7])
def test_it_is_what_the_built_model_and_its_optimizer_take(depth: int) -> None:
    """The rule counts by formula; here the model is built, counted, grouped, and the run's steps are computed."""
    config = load_config({"release": 2026, "depth": depth, "max_seq_len": 512})
    model = Model(config.model.replace(vocab_size=32768), device="meta")
    counted, batch, decay, steps = COMPUTED[depth, 32768]
    assert counted_of_model(model, "matrices") == counted
    assert sum(p.numel() for p in model.parameters()) > 2 * counted
    length = horizon(config.training, model, 512, batch // 512, None)
    assert length is not None and length.steps == steps and "in products" in length.reason
    wide, factor = (config.model.d_model / 768) ** -0.5, math.sqrt(batch / 2**19)
    groups = assigned_groups(model, config.training)
    wanted = {
        "embedding.tokens.weight": (False, 0.3 * wide * factor, (0.8, 0.995), 0.001),
        "head.unembedding.weight": (False, 0.008 * wide * factor, (0.8, 0.96), 0.01),
        f"blocks.{depth - 1}.mixer.value_embedding.table.weight": (
            False,
            0.15 * wide * factor,
            (0.8, 0.995),
            0.01,
        ),
        "blocks.0.input_mix.scale": (False, 0.005 * factor, (0.8, 0.95), 0.05),
        "blocks.0.input_mix.share": (False, 0.5 * factor, (0.96, 0.95), 0.0),
        "smear.gate": (False, 0.2, (0.8, 0.95), 0.0),
        "backout.share": (False, 0.2, (0.8, 0.95), 0.0),
        "blocks.0.mlp.fc1.weight": (True, 0.02 * factor, None, decay),
        f"blocks.{depth - 1}.mixer.value_embedding.gate": (True, 0.02 * factor, None, decay),
    }
    for name, (muon, lr, betas, weight_decay) in wanted.items():
        group = groups[name]
        assert group.muon == muon and group.lr == pytest.approx(lr), name
        assert group.weight_decay == pytest.approx(weight_decay), name
        assert betas is None or group.betas == betas, name


def test_the_page_says_what_follows_from_depth_24() -> None:
    page = " ".join((Path(__file__).parents[3] / "docs" / "from-nanochat.md").read_text().split())
    config = load_config({"release": 2026, "depth": 24})
    training = config.training
    assert (
        f"Depth 24 is {config.model.d_model} wide and takes steps of {training.batch_tokens:,} tokens, Muon at "
        f"{training.muon_lr:.4f} and a weight decay of {training.weight_decay:.4f}."
    ) in page


def test_a_tied_output_counts() -> None:
    tied = Model(
        load_config({"model": {"preset": "gpt2", "d_model": 96, "n_layer": 2, "vocab_size": 100}}).model,
        device="meta",
    )
    assert counted_of_model(tied, "matrices") == 2 * 12 * 96 * 96 + 100 * 96


def test_windows_and_value_embeddings() -> None:
    model = load_config({"release": 2026, "depth": 5, "max_seq_len": 1024, "window_pattern": "SL"}).model
    options = [layer.options.model_dump() for layer in model.layers()]
    assert [o["window"] for o in options] == [257, 1025, 257, 1025, 1025]
    assert [o["value_embedding"] for o in options] == [True, False, True, False, True]


def test_the_width_is_rounded_up_to_whole_heads() -> None:
    for depth, aspect, head, width in (
        (7, 64, 128, 512),
        (12, 64, 128, 768),
        (10, 60, 128, 640),
        (3, 64, 64, 192),
    ):
        found = gpt_values(BaseTrain2026(depth=depth, aspect_ratio=aspect, head_dim=head))
        assert (found["n_embd"], found["n_head"]) == (width, width // head)


def test_depth_12_is_the_recipe() -> None:
    """But for names, the reader's order, and what counts as the same model said layer by layer."""
    ours, theirs = load_config("nanochat2026"), load_config({"release": 2026, "depth": 12})
    found = {".".join(map(str, path)) for path, _, _ in differences(ours.to_dict(), theirs.to_dict())}
    assert {path for path in found if not path.startswith("model.")} == {
        "experiment_name",
        "data.format",
        "data.shuffle",
    }
    for one, other in zip(ours.model.layers(), theirs.model.layers(), strict=True):
        assert one.block == other.block
        mine, its = one.options.model_dump(), other.options.model_dump()
        assert mine | {"n_kv_head": 6} == its
    for name in ("norm", "mlp", "embedding", "final_norm", "head", "init", "d_model", "backout"):
        assert getattr(ours.model, name) == getattr(theirs.model, name), name


# Every setting, another value of it, and where in our config it shows.
EFFECTS: dict[str, tuple[Any, str, Any]] = {
    "run": ("mine", "experiment_name", "mine"),
    "model_tag": ("tagged", "experiment_name", "tagged"),
    "device_type": ("cpu", "training.device", "cpu"),
    "depth": (4, "model.d_model", 256),
    "aspect_ratio": (32, "model.d_model", 640),
    "head_dim": (64, "model.attention.n_head", 20),
    "max_seq_len": (1024, "data.sequence_length", 1024),
    "window_pattern": ("L", "model.pattern", None),
    "vocab_size": (65536, "tokenizer.vocab_size", 65536),
    "num_iterations": (7, "training.steps", 7),
    "target_flops": (1e18, "training.flops", 1e18),
    "target_param_data_ratio": (8, "training.tokens_per_parameter", 8),
    "device_batch_size": (8, "training.micro_batch_tokens", 8 * 2048),
    "total_batch_size": (262144, "training.batch_tokens", 262144),
    "embedding_lr": (0.2, "training.embedding_lr", 0.2 * 2**0.5),
    "unembedding_lr": (0.01, "training.unembedding_lr", 0.01 * 2**0.5),
    "weight_decay": (0.0, "training.weight_decay", 0.0),
    "matrix_lr": (0.05, "training.muon_lr", 0.05 * 2**0.5),
    "scalar_lr": (0.25, "training.lr", 0.25 * 2**0.5),
    "warmup_steps": (10, "training.warmup", 10),
    "warmdown_ratio": (0.5, "training.decay_fraction", 0.5),
    "final_lr_frac": (0.1, "training.min_lr_ratio", 0.1),
    "eval_every": (-1, "training.eval_every", 0),
    "eval_tokens": (4096, "training.eval_tokens", 4096),
    "core_metric_max_per_task": (-1, "training.core_max_per_task", None),
    "sample_every": (50, "training.sample_every", 50),
    "save_every": (100, "training.checkpoint_every", 100),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_setting_takes_effect(name: str) -> None:
    value, path, expected = EFFECTS[name]
    found: Any = translate({"depth": 20, name: value})
    for key in path.split("."):
        found = found[key]
    if name == "window_pattern":
        assert {entry["window"] for entry in found} == {2049}
    else:
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
    changed = load_config({"release": 2026, "depth": 20, name: value}).to_dict()
    assert changed != load_config({"release": 2026, "depth": 20}).to_dict()


def test_none_is_left_out() -> None:
    assert set(EFFECTS) == set(BaseTrain2026.model_fields) - {"release", "fp8", "core_metric_every"}
    asked = {"release": 2026, "core_metric_every": 150}
    with pytest.raises(ConfigError, match="core_tasks: core_every is 150"):
        load_config(asked)
    assert load_config(asked, ["--training.core_tasks=x"]).training.core_every == 150


def test_a_batch_that_is_given_scales_rates_and_decay() -> None:
    training = load_config({"release": 2026, "depth": 12, "total_batch_size": 2**17}).training
    assert training.batch_tokens == 2**17 and training.muon_lr == pytest.approx(0.01)
    assert training.weight_decay == pytest.approx(0.14)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"block_pattern": ["T"]}, "block_pattern: unknown key; allowed: release, run"),
        ({"window_pattern": "SX"}, "window_pattern: it must be letters S and L; got 'SX'"),
        ({"fp8": True}, "fp8: products in 8 bits are not there"),
        ({"total_batch_size": 3000}, "total_batch_size: 3000 tokens a step are not whole rows"),
        ({"target_param_data_ratio": -1}, "num_iterations: nothing says how long to train"),
    ],
)
def test_what_cannot_be_is_refused_by_its_own_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config({"release": 2026, **settings})


def test_it_is_recognised() -> None:
    assert recognise({"release": 2026}) == recognise({"window_pattern": "L"}) == "nanochat"
    with pytest.raises(ConfigError, match="window_pattern: it is a setting of July 2026"):
        load_config({"window_pattern": "L"})
