"""nanochat's Python configs in our schema: every setting does what it says, and nothing else is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import plait.compat.nanochat.configs as shipped
from plait.cli.entry import main
from plait.config.errors import ConfigError
from plait.config.load import load_config, save_config
from plait.config.originals import recognise
from plait.config.originals.nanochat import BaseTrain, translate
from plait.config.originals.nanochat import recognise as is_nanochat
from plait.training.resume import differences

CONFIGS = Path(shipped.__file__).parent
PATTERNS = {
    "transformer_d20": ["attention"] * 20,
    "mamba_d20": ["mamba"] * 20,
    "hybrid_early_t_late_m_d20": ["attention"] * 12 + ["mamba"] * 8,
    "hybrid_alternating_d20": ["attention", "mamba"] * 10,
    "rtx3070_d16": ["attention"] * 10 + ["mamba"] * 6,
}
# The four strategies; the third with the entry that the document lost.
STRATEGIC = '["T", "T"] + ["M"] * 7 + ["T"] + ["M"] * 6 + ["T", "M", "T", "T"]'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def test_all_five_are_shipped() -> None:
    assert {path.stem for path in CONFIGS.glob("*_d*.py")} == set(PATTERNS)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_shipped_config_is_the_run_that_it_names(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.py")
    small = name == "rtx3070_d16"
    assert [layer.kind for layer in config.model.layers()] == PATTERNS[name]
    assert config.model.d_model == 64 * len(PATTERNS[name]) and config.data.sequence_length == (
        1024 if small else 2048
    )
    training = config.training
    assert training.batch_tokens == 524288 and training.tokens_per_parameter == 20
    assert training.micro_batch_tokens == (4 * 1024 if small else 32 * 2048)
    assert (training.embedding_lr, training.unembedding_lr, training.muon_lr) == (0.2, 0.004, 0.02)
    assert training.weight_decay == 0 and training.grad_clip == 1 and training.optimizer == "muon"
    for layer in config.model.layers():
        assert (layer.block.norm.kind, layer.block.norm.weight, layer.block.norm.place) == (
            "rms",
            False,
            "pre",
        )
        options = layer.options.model_dump()
        if layer.kind == "mamba":
            assert (options["d_state"], options["d_conv"], options["expand"]) == (16, 4, 2)
            assert layer.block.mlp.kind == "none"
        else:
            heads = config.model.d_model // 128
            assert (options["n_head"], options["n_kv_head"]) == (heads, heads)
            assert layer.block.mlp.kind == "relu2" and options["rope_reverse"] and options["qk_norm"]


def test_it_is_octobers_recipe() -> None:
    """At depth 20 the recipe that Plait ships, but for what a machine or a reader's order decides."""
    ours, theirs = load_config("nanochat"), load_config({"depth": 20})
    found = {".".join(map(str, path)) for path, _, _ in differences(ours.to_dict(), theirs.to_dict())}
    assert {path for path in found if not path.startswith("model.")} == {
        "experiment_name",
        "data.format",
        "data.shuffle",
    }
    for name in ("norm", "mlp", "embedding", "final_norm", "head", "init", "d_model", "vocab_size"):
        assert getattr(ours.model, name) == getattr(theirs.model, name), name
    assert [layer.block for layer in ours.model.layers()] == [layer.block for layer in theirs.model.layers()]


def test_the_size_rule() -> None:
    for depth, heads in ((1, 1), (2, 1), (3, 2), (12, 6), (13, 7), (20, 10), (26, 13)):
        model = load_config({"depth": depth, "max_seq_len": 64}).model
        assert (model.d_model, len(model.layers())) == (64 * depth, depth)
        options = model.layers()[0].options.model_dump()
        assert (options["n_head"], options["n_kv_head"]) == (heads, heads), depth


def test_the_third_strategy_has_twenty_entries(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, f"depth = 20\nblock_pattern = {STRATEGIC}\n"))
    kinds = [layer.kind[0] for layer in config.model.layers()]
    assert "".join(kinds) == "aa" + "m" * 7 + "a" + "m" * 6 + "amaa"
    lost = STRATEGIC.replace("7", "6", 1)
    with pytest.raises(
        ConfigError, match=r"config\.py: block_pattern: it has 19 block types, which must match the 20"
    ):
        load_config(written(tmp_path, f"depth = 20\nblock_pattern = {lost}\n"))


# Every setting, another value of it, and where in our config it shows.
EFFECTS: dict[str, tuple[Any, str, Any]] = {
    "run": ("mine", "experiment_name", "mine"),
    "model_tag": ("tagged", "experiment_name", "tagged"),
    "device_type": ("cuda", "training.device", "cuda"),
    "core_metric_max_per_task": (20, "training.core_max_per_task", 20),
    "depth": (4, "model.d_model", 256),
    "max_seq_len": (1024, "data.sequence_length", 1024),
    "block_pattern": (["M"] * 20, "model.pattern", ["M"] * 20),
    "mamba_d_state": (64, "model.mamba.d_state", 64),
    "mamba_d_conv": (3, "model.mamba.d_conv", 3),
    "mamba_expand": (3, "model.mamba.expand", 3),
    "mamba_use_mlp": (True, "model.mamba.mlp", "relu2"),
    "num_iterations": (7, "training.steps", 7),
    "target_flops": (1e18, "training.flops", 1e18),
    "target_param_data_ratio": (10, "training.tokens_per_parameter", 10),
    "device_batch_size": (8, "training.micro_batch_tokens", 8 * 2048),
    "total_batch_size": (131072, "training.batch_tokens", 131072),
    "embedding_lr": (0.3, "training.embedding_lr", 0.3),
    "unembedding_lr": (0.01, "training.unembedding_lr", 0.01),
    "weight_decay": (0.1, "training.groups", None),
    "matrix_lr": (0.05, "training.muon_lr", 0.05),
    "grad_clip": (0.0, "training.grad_clip", None),
    "warmup_ratio": (0.1, "training.warmup", 0.1),
    "warmdown_ratio": (0.5, "training.decay_fraction", 0.5),
    "final_lr_frac": (0.1, "training.min_lr_ratio", 0.1),
    "eval_every": (-1, "training.eval_every", 0),
    "eval_tokens": (4096, "training.eval_tokens", 4096),
    "sample_every": (50, "training.sample_every", 50),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_setting_takes_effect(name: str) -> None:
    value, path, expected = EFFECTS[name]
    small = {"total_batch_size": 65536} if name == "depth" else {}
    found: Any = translate({name: value, **small, **({} if name == "depth" else {"depth": 20})})
    for key in path.split("."):
        found = found[key]
    if name == "weight_decay":
        assert {key: group["weight_decay"] for key, group in found.items()} == {
            "embedding.tokens.weight": 0.1,
            "head.unembedding.weight": 0.1,
        }
    else:
        assert found == expected
    changed = load_config({"depth": 20, name: value}).to_dict()
    assert changed != load_config({"depth": 20}).to_dict()


def test_none_is_left_out() -> None:
    assert set(EFFECTS) == set(BaseTrain.model_fields) - {"core_metric_every", "release"}


def test_core_is_evaluated_as_often_as_is_said_where_its_tasks_are() -> None:
    assert load_config({"depth": 20}).training.core_every == 0
    asked = {"depth": 20, "core_metric_every": 150, "core_metric_max_per_task": -1}
    with pytest.raises(ConfigError, match=r"training\.core_tasks: core_every is 150, but no folder"):
        load_config(asked)
    training = load_config(asked, ["--training.core_tasks=bundle"]).training
    assert (training.core_tasks, training.core_every, training.core_max_per_task) == ("bundle", 150, None)
    assert load_config(asked | {"core_metric_every": -1}).training.core_every == 0


def test_matrix_products_are_bfloat16_on_a_gpu() -> None:
    """Whoever starts it, and whether a device is named or not: one option, resolved where the run begins."""
    for settings in ({}, {"device_type": "cuda"}, {"device_type": "cpu"}):
        assert load_config({"depth": 2, **settings}).training.precision == "auto"
    assert (
        load_config("nanochat").training.precision == load_config("nanochat2026").training.precision == "auto"
    )


def test_the_horizon_is_the_first_that_is_set() -> None:
    def of(**settings: Any) -> dict[str, Any]:
        training = load_config({"depth": 2, **settings}).training.model_dump()
        return {name: training[name] for name in ("steps", "flops", "tokens_per_parameter")}

    assert of() == {"steps": 1000, "flops": None, "tokens_per_parameter": 20}
    assert of(target_flops=1e15)["flops"] == 1e15 and of(target_flops=1e15)["tokens_per_parameter"] is None
    assert of(num_iterations=5, target_flops=1e15) == {
        "steps": 5,
        "flops": None,
        "tokens_per_parameter": None,
    }
    with pytest.raises(ConfigError, match="num_iterations: nothing says how long to train"):
        of(target_param_data_ratio=-1)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"block_patern": ["T"]}, r"block_patern: unknown key.*did you mean 'block_pattern'"),
        ({"mamba_d_state": 0}, "mamba_d_state: expected a whole number greater than 0; got 0"),
        ({"mamba_use_mlp": "perhaps"}, "mamba_use_mlp: expected true or false; got 'perhaps'"),
        ({"block_pattern": ["T", "X"]}, r"block_pattern\[1\]: Unknown block type: .*'X'"),
        ({"scalar_lr": 0.5}, "scalar_lr: it is a setting of July 2026: set release to 2026"),
        ({"release": 2024}, r"release: expected 2025 \(October\) or 2026 \(July\); got 2024"),
        (
            {"max_seq_len": 1000},
            "total_batch_size: 524288 tokens a step are not whole rows of max_seq_len 1000",
        ),
        ({"total_batch_size": 2048}, "at least device_batch_size 32 of them"),
        ({"device_type": "tpu"}, None),
    ],
)
def test_what_cannot_be_is_refused_by_its_own_name(settings: dict[str, Any], complaint: str | None) -> None:
    if complaint is None:  # a device is looked for when the run begins
        assert load_config({"depth": 2, **settings}).training.device == "tpu"
        return
    with pytest.raises(ConfigError, match=complaint):
        load_config({"depth": 2, **settings})


def test_only_nanochats_configs_are_taken_for_them(tmp_path: Path) -> None:
    for path in CONFIGS.glob("*_d*.py"):
        assert recognise(load_raw(path)) == "nanochat"
    for ours in (
        {},
        {"model": {"block_pattern": ["T"]}},
        {"training": {"steps": 3}},
        {"experiment_name": "depth"},
    ):
        assert not is_nanochat(ours)
    assert load_config({"model": {"block_pattern": ["T", "M"]}}).model.pattern == ["T", "M"]
    config = load_config(
        {"depth": 2, "block_pattern": ["T", "M"]}, ["--training.lr=0.5", "--model.d_model=64"]
    )
    assert config.training.lr == 0.5 and config.model.d_model == 64
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def load_raw(path: Path) -> dict[str, Any]:
    from plait.config.load import read_config_file

    return read_config_file(path)


def test_plait_train_takes_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(CONFIGS / "rtx3070_d16.py"), "--model.vocab_size=65536"]
    assert main(["train", *words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "10 - 15, each   mamba" in shown and "300M" in shown
    assert main(["train", words[0], "--depth=3"]) == 1
    assert "the config has no such key" in capsys.readouterr().err
    assert main(["train", words[0]]) == 1
    assert "no text is named to train on" in capsys.readouterr().err


def test_nothing_of_it_imports_torch() -> None:
    code = (
        "import sys\nfrom plait.config.originals.nanochat import translate\n"
        "translate({'depth': 20, 'block_pattern': ['T', 'M'] * 10})\nassert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
