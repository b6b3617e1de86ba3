"""BERT as transformers' BertForMaskedLM keeps it: config.json and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.config.errors import CheckpointError
from plait.formats.foreign import Settings, make_model, unwrapped
from plait.formats.huggingface.gpt2 import activation
from plait.formats.huggingface.names import Names, one_of, renamed
from plait.models.model import Model

SYSTEM = "BERT"
BLOCK = r"bert\.encoder\.layer\.(\d+)\."
NAMES: Names = (
    (r"bert\.embeddings\.word_embeddings\.", "embedding.tokens."),
    (r"bert\.embeddings\.position_embeddings\.", "embedding.positions."),
    (r"bert\.embeddings\.token_type_embeddings\.", "embedding.types."),
    (r"bert\.embeddings\.LayerNorm\.", "embedding.norm."),
    (BLOCK + r"attention\.self\.query\.", r"blocks.\1.mixer.in_proj."),
    (BLOCK + r"attention\.self\.key\.", r"blocks.\1.mixer.in_proj."),
    (BLOCK + r"attention\.self\.value\.", r"blocks.\1.mixer.in_proj."),
    (BLOCK + r"attention\.output\.dense\.", r"blocks.\1.mixer.out_proj."),
    (BLOCK + r"attention\.output\.LayerNorm\.", r"blocks.\1.norm1."),
    (BLOCK + r"intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (BLOCK + r"output\.dense\.", r"blocks.\1.mlp.fc2."),
    (BLOCK + r"output\.LayerNorm\.", r"blocks.\1.norm2."),
    (r"cls\.predictions\.transform\.dense\.", "head.transform."),
    (r"cls\.predictions\.transform\.LayerNorm\.", "head.norm."),
    (r"cls\.predictions\.decoder\.", "head.unembedding."),
)
# Parts of other BERT models that no masked language model has: the pooler, the head for next sentences.
LEFT_OUT = r"bert\.pooler\..*|cls\.seq_relationship\..*|bert\.embeddings\.position_ids"
TABLE, OUTPUT = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
OUTPUT_BIAS, SAME_BIAS = "cls.predictions.decoder.bias", "cls.predictions.bias"


def from_state_dict(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Model:
    """The model in evaluation mode; ``config`` is the content of config.json."""
    values = model_config(config)
    tied: bool = values["head"]["tie"]
    return make_model(values, weights(tensors, tied=tied), SYSTEM)


def weights(tensors: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Their weights under our names; a tied output once. Older files call a norm's weights gamma and beta."""
    named = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor
        for name, tensor in unwrapped(tensors).items()
    }
    named = one_of(named, OUTPUT_BIAS, SAME_BIAS, SYSTEM)
    if tied:
        named = one_of(named, TABLE, OUTPUT, SYSTEM)
    return renamed(named, NAMES, SYSTEM, left_out=LEFT_OUT)


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as our model's config; CheckpointError for a setting that Plait does not have."""
    given = Settings(config, SYSTEM)
    if given.flag("is_decoder", False) or given.flag("add_cross_attention", False):
        raise CheckpointError(f"{SYSTEM}: is_decoder and add_cross_attention make another model of it")
    if given.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(f"{SYSTEM}: of position_embedding_type only 'absolute' is known")
    width, eps = given.count("hidden_size", 768), given.number("layer_norm_eps", 1e-12)
    norm = {"kind": "layer", "eps": eps}
    kind = activation(given, "hidden_act", "gelu")
    dropout = given.get("hidden_dropout_prob", 0.1)
    return {
        "d_model": width,
        "n_layer": given.count("num_hidden_layers", 12),
        "pattern": "attention",
        "vocab_size": given.count("vocab_size", 30522),
        "causal": False,
        "norm": {**norm, "place": "post"},
        "final_norm": "none",
        "mlp": {"kind": kind, "width": given.count("intermediate_size", 3072), "bias": True},
        "dropout": dropout,
        "embedding": {
            "position": "learned",
            "max_positions": given.count("max_position_embeddings", 512),
            "token_types": given.count("type_vocab_size", 2),
            "norm": norm,
            "dropout": dropout,
        },
        "head": {
            "kind": "masked_lm",
            "transform": kind,
            "bias": True,
            "tie": given.flag("tie_word_embeddings", True),
        },
        "init": {"std": given.number("initializer_range", 0.02)},
        "attention": {
            "n_head": given.count("num_attention_heads", 12),
            "rope": False,
            "bias": True,
            "attn_dropout": given.get("attention_probs_dropout_prob", 0.1),
        },
    }
