"""What the six architectures share: each is Plait's one model under Model Foundry's interface."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from plait.compat.foundry.architectures.base import MODEL_TYPE, BaseLanguageModel, ModelOutput
from plait.compat.foundry.config import ExperimentConfig, ModelConfig
from plait.config.errors import BuildError, CheckpointError, ConfigError
from plait.config.originals.foundry import model_values
from plait.config.schema import ModelConfig as PlaitModelConfig
from plait.formats import foundry
from plait.formats.folders import MODEL_CONFIG
from plait.formats.foreign import read_json
from plait.formats.native import load_model, save_model
from plait.models.heads import LMHead
from plait.models.model import Model
from plait.training.wrap import recompute_blocks

_DEFAULT_LENGTH = 1024


class PlaitLanguageModel(BaseLanguageModel):
    """A language model whose forward pass is that of ``self.model``, Plait's own."""

    architectures: ClassVar[tuple[str, ...]]  # what from_config and from_pretrained accept

    def __init__(
        self,
        vocab_size: int,
        config: ModelConfig | Mapping[str, Any],
        max_sequence_length: int = _DEFAULT_LENGTH,
    ) -> None:
        super().__init__()
        described = ModelConfig.model_validate(config)
        self._accept(described.architecture)
        values = {**model_values(described, max_sequence_length), "vocab_size": vocab_size}
        self.model = Model(PlaitModelConfig.model_validate(values))

    @classmethod
    def over(cls, model: Model) -> Self:
        """The face of a model that exists, for training or evaluation as that is."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.model = model
        return face.train(model.training)

    @classmethod
    def from_config(cls, config: ExperimentConfig) -> Self:
        """The model of an experiment, with new weights; ConfigError, a ValueError, if it is another's."""
        given = config.model.architecture
        if given not in cls.architectures:
            raise ConfigError(
                f"{cls.__name__}.from_config() called with architecture '{given}'. "
                f"Expected '{' or '.join(cls.architectures)}'."
            )
        values = model_values(config.model, config.data.max_sequence_length)
        values["vocab_size"] = config.tokenizer.vocab_size
        return cls.over(Model(PlaitModelConfig.model_validate(values)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
    ) -> ModelOutput:
        """Logits, and the loss if labels are given: shifted once in here by whoever predicts the next token.

        input_ids and labels (B, T), unshifted, -100 ignored; attention_mask (B, T), 0 at pads on either side.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            labels=labels,
            token_type_ids=token_type_ids,
            logits=True,
        )
        return ModelOutput(loss=out.loss, logits=out.logits, hidden_states=out.hidden)

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of the token ids."""
        return self.model.embedding.tokens

    def resize_token_embeddings(self, new_num_tokens: int) -> None:
        """Grow or shrink the vocabulary; ids that stay keep their vectors, a tied output stays tied."""
        self.model.resize_token_embeddings(new_num_tokens)

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Continue ids or texts; see ``plait.inference.generate.generate``."""
        return self.model.generate(prompts, **options)

    def gradient_checkpointing_enable(self) -> None:
        """Keep of each block its input alone and compute it again in backward."""
        recompute_blocks(list(self.model.blocks))

    @property
    def config(self) -> PlaitModelConfig:
        """The model as Plait describes it."""
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return self.model.vocab_size

    @property
    def embedding(self) -> nn.Embedding:
        """The table of the token ids."""
        return self.get_input_embeddings()

    @property
    def layers(self) -> nn.Module:
        """The blocks, first to last."""
        blocks = self.model.blocks
        assert isinstance(blocks, nn.Module)
        return blocks

    @property
    def norm(self) -> nn.Module:
        """The norm before the output."""
        return self.model.final_norm

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states to logits; where it is tied its ``weight`` is the embedding's."""
        head = self.model.head
        assert isinstance(head, LMHead) and head.unembedding is not None
        return head.unembedding

    @property
    def dropout_prob(self) -> float:
        """Dropout of what each branch of a block adds."""
        return self.model.config.dropout

    @property
    def model_type(self) -> str:
        """The name of the architecture."""
        return architecture_of(self.model)

    @property
    def supports_generation(self) -> bool:
        """Whether no output depends on a later token."""
        return self.model.config.head.kind == "lm"

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write a folder that ``plait.load`` reads, and the name of the architecture."""
        folder = Path(save_directory)
        save_model(self.model, folder, self.model.tokenizer)
        (folder / MODEL_TYPE).write_text(self.model_type, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, model_directory: str | PathLike[str], **arguments: Any) -> Self:
        """The model of such a folder, of a run of Plait's, or of one of Foundry's own checkpoints; for evaluation.

        The folder tells everything, so no arguments are taken.
        """
        if arguments:
            raise TypeError(
                f"{cls.__name__}.from_pretrained takes a folder alone; got {', '.join(arguments)}"
            )
        model = load_folder(Path(model_directory))
        try:
            cls._accept(architecture_of(model))
        except ConfigError as error:
            raise CheckpointError(f"{model_directory}: {error}") from None
        return cls.over(model)

    @classmethod
    def _accept(cls, architecture: str) -> None:
        if architecture not in cls.architectures:
            raise ConfigError(
                f"{cls.__name__} is for {' or '.join(cls.architectures)}; this is a {architecture} model"
            )


def load_folder(folder: Path) -> Model:
    """The model in a folder of Plait's or of Foundry's, with its tokenizer, in evaluation mode."""
    config = folder / MODEL_CONFIG
    theirs = "model_type" in read_json(config) if config.is_file() else _has_foundry_files(folder)
    if not theirs:
        return load_model(folder)
    model, tokenizer = foundry.read(folder)
    model.tokenizer = tokenizer
    return model


def _has_foundry_files(folder: Path) -> bool:
    return (folder / "pytorch_model.bin").is_file() or any(folder.glob("checkpoint-*"))


def architecture_of(model: Model) -> str:
    """Foundry's name of a model's architecture; BuildError if it has none for it."""
    kinds = {block.kind for block in model.blocks}
    if kinds == {"attention"}:
        return "gpt2" if model.config.causal else "bert"
    if len(kinds) == 1 and kinds <= {"lstm", "gru", "rnn", "mamba"}:
        return kinds.pop()
    raise BuildError(f"Model Foundry has no architecture of layers {', '.join(sorted(kinds))}")
