"""GPT-2 as transformers' GPT2LMHeadModel keeps it: config.json and its weights, whose linear maps lie transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats.foreign import Settings, make_model, unwrapped
from plait.formats.huggingface.names import Names, one_of, renamed
from plait.models.model import Model

SYSTEM = "GPT-2"
BLOCK = r"transformer\.h\.(\d+)\."
NAMES: Names = (
    (r"transformer\.wte\.", "embedding.tokens."),
    (r"transformer\.wpe\.", "embedding.positions."),
    (BLOCK + r"ln_1\.", r"blocks.\1.norm1."),
    (BLOCK + r"ln_2\.", r"blocks.\1.norm2."),
    (BLOCK + r"attn\.c_attn\.", r"blocks.\1.mixer.in_proj."),
    (BLOCK + r"attn\.c_proj\.", r"blocks.\1.mixer.out_proj."),
    (BLOCK + r"mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (BLOCK + r"mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
    (r"transformer\.ln_f\.", "final_norm."),
    (r"lm_head\.", "head.unembedding."),
)
TRANSPOSED = r".*\.(c_attn|c_proj|c_fc)\.weight"
LEFT_OUT = r".*\.attn\.(bias|masked_bias)"  # the triangle of older files, no weight
TABLE, OUTPUT = "transformer.wte.weight", "lm_head.weight"

# Their names of activations; all of the second kind are the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """The model in evaluation mode; ``config`` is the content of config.json."""
    values = model_config(config)
    tied: bool = values["head"]["tie"]
    return make_model(values, weights(tensors, tied=tied), SYSTEM)


def weights(tensors: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Their weights under our names; a tied output once. Names without the prefix ``transformer.`` are theirs too."""
    named = {name if _whole(name) else f"transformer.{name}": t for name, t in unwrapped(tensors).items()}
    if tied:
        named = one_of(named, TABLE, OUTPUT, SYSTEM)
    return renamed(named, NAMES, SYSTEM, transposed=TRANSPOSED, left_out=LEFT_OUT)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as our model's config; CheckpointError for a setting that Plait does not have."""
    given = Settings(config, SYSTEM)
    if given.flag("add_cross_attention", False):
        raise CheckpointError(f"{SYSTEM}: add_cross_attention is not for a model that reads one text")
    n_layer, width = given.count("n_layer", 12), given.count("n_embd", 768)
    attention = {
        "n_head": given.count("n_head", 12),
        "rope": False,
        "bias": True,
        "attn_dropout": given.get("attn_pdrop", 0.1),
    }
    pattern: Any = "attention"
    if not given.flag("scale_attn_weights", True):
        attention["scale"] = 1.0
    if given.flag("scale_attn_by_inverse_layer_idx", False):
        scale = attention.get("scale", (width // attention["n_head"]) ** -0.5)
        pattern = [{"mixer": "attention", "scale": scale / (index + 1)} for index in range(n_layer)]
    eps = given.number("layer_norm_epsilon", 1e-5)
    inner = given.get("n_inner")
    return {
        "d_model": width,
        "n_layer": n_layer,
        "pattern": pattern,
        "vocab_size": given.count("vocab_size", 50257),
        "norm": {"kind": "layer", "eps": eps},
        "final_norm": {"kind": "layer", "eps": eps},
        "mlp": {
            "kind": activation(given, "activation_function", "gelu_new"),
            "width": 4 * width if inner is None else inner,
            "bias": True,
        },
        "dropout": given.get("resid_pdrop", 0.1),
        "embedding": {
            "position": "learned",
            "max_positions": given.count("n_positions", 1024),
            "dropout": given.get("embd_pdrop", 0.1),
        },
        "head": {"kind": "lm", "tie": given.flag("tie_word_embeddings", True)},
        "init": {"std": given.number("initializer_range", 0.02)},
        "attention": attention,
    }


def activation(given: Settings, name: str, default: str) -> str:
    """Our name of the activation that a setting names."""
    value = given.get(name, default)
    if value not in ACTIVATIONS:
        raise CheckpointError(
            f"{given.system}: the setting {name!r} is {value!r}; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[value]


def _whole(name: str) -> bool:
    return name.startswith(("transformer.", "lm_head."))
