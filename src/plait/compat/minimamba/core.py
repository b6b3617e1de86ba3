"""The parts of MiniMamba's models, each over a part of Plait's: to use alone, or to look at in a model."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from plait.compat.minimamba.block import MambaBlock
from plait.compat.minimamba.build import model_config, new_model, run
from plait.compat.minimamba.config import BaseMambaConfig, InferenceParams
from plait.compat.minimamba.mixers import MixerClass
from plait.config.errors import DataError
from plait.config.schema import HeadConfig
from plait.models.block import Block
from plait.models.door import enter
from plait.models.heads import ClassificationHead, Unembedding
from plait.models.model import Model
from plait.nn.embedding import TokenTable

STD = 0.02  # of initial tables and output maps


class MambaEncoder(nn.Module):
    """Layers and a last norm: vectors (B, L, d_model) to hidden states of the same shape."""

    def __init__(self, config: BaseMambaConfig, mixer_cls: MixerClass | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = new_model(config, model_config(config, "features", mixer_cls))

    @classmethod
    def over(cls, model: Model, config: BaseMambaConfig) -> Self:
        """The layers of a model that exists."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.config, face.model = config, model
        return face

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last, to look at: another mixer is given when the model is made."""
        blocks = cast("list[Block]", self.model.blocks)
        return nn.ModuleList(MambaBlock.over(block, self.config) for block in blocks)

    @property
    def norm(self) -> nn.Module:
        """The last norm."""
        return self.model.final_norm

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        """hidden_states (B, L, d_model), which go on from ``inference_params`` if that is given."""
        if not hidden_states.is_floating_point():
            raise DataError("MambaEncoder takes vectors (batch, tokens, d_model); token ids were given")
        hidden = run(self.model, self.config, inference_params, hidden_states).hidden
        assert hidden is not None
        return hidden

    def reset_cache(self, inference_params: InferenceParams | None = None) -> None:
        """Forget what ``inference_params`` holds."""
        reset_cache(inference_params)

    def get_cache_info(self, inference_params: InferenceParams | None = None) -> dict[str, Any]:
        """What ``inference_params`` holds; see there."""
        return cache_info(inference_params)


class MambaEmbedding(nn.Module):
    """Token ids to vectors; the row of ``pad_token_id`` begins as zeros."""

    def __init__(self, vocab_size: int, d_model: int, pad_token_id: int | None = None) -> None:
        super().__init__()
        self.pad_token_id = pad_token_id
        self.token_embedding = TokenTable(vocab_size, d_model, std=STD)
        if pad_token_id is not None:
            with torch.no_grad():
                self.token_embedding.weight[pad_token_id] = 0.0

    @classmethod
    def over(cls, table: TokenTable) -> Self:
        """The face of a model's own table."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.pad_token_id, face.token_embedding = None, table
        return face

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return self.token_embedding.num_embeddings

    @property
    def d_model(self) -> int:
        """Width of the vectors."""
        return self.token_embedding.embedding_dim

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, d_model)."""
        vectors: Tensor = self.token_embedding(input_ids)
        return vectors


class MambaLMHead(nn.Module):
    """Hidden states to logits; the weight is ``embedding_layer``'s if that is given and ``tie_weights``."""

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        bias: bool = False,
        tie_weights: bool = True,
        embedding_layer: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        tied = embedding_layer.weight if tie_weights and embedding_layer is not None else None
        self.lm_head = Unembedding(d_model, vocab_size, bias=bias, tied=tied)
        self.lm_head.reset_parameters(STD)

    @classmethod
    def over(cls, unembedding: Unembedding) -> Self:
        """The face of a model's own output map; it gives the rows that only pad as well."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.lm_head = unembedding
        return face

    @property
    def tie_weights(self) -> bool:
        """Whether the weight is the embedding's."""
        return self.lm_head.tied

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, d_model) -> (B, L, vocab_size)."""
        logits: Tensor = self.lm_head(hidden_states)
        return logits


class MambaClassificationHead(nn.Module):
    """Hidden states to one vector of labels a sequence: the last, the mean or the maximum of its tokens, then a map."""

    def __init__(
        self, d_model: int, num_labels: int, pooling_strategy: str = "last", dropout: float = 0.1
    ) -> None:
        super().__init__()
        values = {"num_labels": num_labels, "pooling": pooling_strategy, "dropout": dropout}
        self.head = ClassificationHead(
            HeadConfig.model_validate({"kind": "classification", **values}), d_model
        )
        nn.init.normal_(self.classifier.weight, std=STD)
        nn.init.zeros_(self.classifier.bias)

    @classmethod
    def over(cls, head: ClassificationHead) -> Self:
        """The face of a model's own head."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.head = head
        return face

    @property
    def classifier(self) -> nn.Linear:
        """The map to labels."""
        return self.head.classifier

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden_states (B, L, d_model), attention_mask (B, L), 0 at pads -> (B, num_labels)."""
        entry = enter(hidden_states, attention_mask, None, None, None)
        logits: Tensor = self.head(entry.tokens, entry.layout)
        return logits


def reset_cache(inference_params: InferenceParams | None) -> None:
    """Forget what ``inference_params`` holds, if there are any."""
    if inference_params is not None:
        inference_params.reset_cache()


def cache_info(inference_params: InferenceParams | None) -> dict[str, Any]:
    """What ``inference_params`` holds; without any, what new ones would."""
    return (InferenceParams() if inference_params is None else inference_params).get_cache_info()
