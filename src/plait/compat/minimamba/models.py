"""MiniMamba's models: language model, classifier, features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from plait.compat.minimamba.build import backend, run
from plait.compat.minimamba.config import (
    BaseMambaConfig,
    InferenceParams,
    MambaClassificationConfig,
    MambaLMConfig,
)
from plait.compat.minimamba.core import MambaClassificationHead, MambaLMHead
from plait.compat.minimamba.face import MambaModel
from plait.config.errors import DataError
from plait.inference.generate import generate, stream_generate
from plait.models.heads import ClassificationHead, LMHead
from plait.models.output import Output


class MambaForCausalLM(MambaModel):
    """A language model of a MambaLMConfig; its logits are ``vocab_size`` wide."""

    head = "lm"
    config_class = MambaLMConfig

    @property
    def lm_head(self) -> MambaLMHead:
        """Hidden states to logits, those of rows that only pad the vocabulary included."""
        head = self.model.head
        assert isinstance(head, LMHead)
        return MambaLMHead.over(head.unembedding)

    def forward(
        self,
        input_ids: Tensor,
        inference_params: InferenceParams | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Logits (B, L, vocab_size) of ids (B, L); with labels {"loss", "logits"}.

        Labels are ids (B, L), unshifted, -100 ignored, and are shifted in here. attention_mask (B, L) is 0 at pads, on
        either side. With ``inference_params`` the ids go on from what it holds.
        """
        out = run(
            self.model,
            self.config,
            inference_params,
            input_ids,
            labels=labels,
            attention_mask=attention_mask,
        )
        return _given(out, labels)

    def generate(
        self,
        input_ids: Tensor,
        max_length: int = 50,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float | None = 0.9,
        top_k: int | None = None,
        do_sample: bool = True,
        pad_token_id: int | None = None,
        eos_token_id: int | None = None,
        use_cache: bool = True,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, L) and what follows, (B, L + the most that a row wrote), pads after a row's end.

        ``max_length`` counts the prompt, ``max_new_tokens`` goes before it. ``do_sample`` False or temperature 0: the
        most probable token each time. torch.manual_seed makes it repeatable.
        """
        new = max(0, max_length - input_ids.shape[1]) if max_new_tokens is None else max_new_tokens
        with backend(self.config):
            ids: Tensor = generate(
                self.model,
                input_ids,
                attention_mask=attention_mask,
                max_new_tokens=new,
                temperature=temperature if do_sample else 0.0,
                top_p=top_p,
                top_k=top_k,
                eos_token_id=[] if eos_token_id is None else eos_token_id,
                pad_token_id=pad_token_id,
                use_cache=use_cache,
            )
        return ids

    def generate_streaming(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_p: float | None = 0.9,
        eos_token_id: int | None = None,
    ) -> Iterator[int]:
        """One id after the other, as soon as it is drawn, the end token too; input_ids (1, L)."""
        if input_ids.shape[0] != 1:
            raise DataError(f"generate_streaming continues one row; input_ids has {input_ids.shape[0]}")
        pieces = stream_generate(
            self.model,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_token_id=[] if eos_token_id is None else eos_token_id,
        )
        return self._ids(pieces)

    def _ids(self, pieces: Iterator[Any]) -> Iterator[int]:
        while True:
            with backend(self.config):  # not while the caller has the turn: a backend is the whole process's
                piece = next(pieces, None)
            if piece is None:
                return
            yield from piece.ids

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inference_params: InferenceParams | None = None
    ) -> dict[str, Any]:
        """Arguments of the next ``forward`` over whole rows (B, L): the tokens that ``inference_params`` lacks."""
        seen = 0 if inference_params is None else inference_params.seqlen_offset
        return {"input_ids": input_ids[:, seen:], "inference_params": inference_params}


class MambaForSequenceClassification(MambaModel):
    """A classifier of whole sequences, of a MambaClassificationConfig; one label is a regression."""

    head = "classification"
    config_class = MambaClassificationConfig

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return self.classifier.head.num_labels

    @property
    def classifier(self) -> MambaClassificationHead:
        """Hidden states to labels."""
        head = self.model.head
        assert isinstance(head, ClassificationHead)
        return MambaClassificationHead.over(head)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits (B, num_labels) of ids (B, L); with labels (B,) {"loss", "logits"}.

        The loss is cross-entropy, or the mean squared error if there is one label. attention_mask (B, L) is 0 at pads,
        which nothing looks at.
        """
        out = run(self.model, self.config, None, input_ids, attention_mask=attention_mask, labels=labels)
        return _given(out, labels)


class MambaForFeatureExtraction(MambaModel):
    """Hidden states of ids, if the config has a vocabulary, or of vectors."""

    head = "features"
    config_class = BaseMambaConfig

    @property
    def has_embeddings(self) -> bool:
        """Whether it takes token ids."""
        return "vocab_size" in self.config.keys()  # noqa: SIM118

    def forward(
        self,
        inputs: Tensor,
        inference_params: InferenceParams | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, L) or vectors (B, L, d_model) to hidden states (B, L, d_model), zeros at pads."""
        if not inputs.is_floating_point() and not self.has_embeddings:
            raise DataError("token ids were given, but the config has no vocab_size: give vectors")
        hidden = run(self.model, self.config, inference_params, inputs, attention_mask=attention_mask).hidden
        assert hidden is not None
        return hidden


class Mamba(MambaForCausalLM):
    """The first name of MambaForCausalLM."""


def _given(out: Output, labels: Tensor | None) -> Tensor | dict[str, Tensor]:
    assert out.logits is not None
    if labels is None:
        return out.logits
    assert out.loss is not None
    return {"loss": out.loss, "logits": out.logits}
