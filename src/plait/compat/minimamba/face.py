"""What MiniMamba's three kinds of model share: each is Plait's one model under MiniMamba's interface."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from plait.compat.minimamba.build import HeadKind, model_config, new_model, recompute
from plait.compat.minimamba.config import BaseMambaConfig, InferenceParams
from plait.compat.minimamba.core import MambaEmbedding, MambaEncoder, cache_info, reset_cache
from plait.compat.minimamba.mixers import MixerClass
from plait.config.errors import BuildError, CheckpointError
from plait.config.schema import ModelConfig
from plait.formats.foreign import SUFFIXES, find_one, read_file, unwrapped
from plait.formats.minimamba import SYSTEM, from_state_dict
from plait.nn.embedding import TokenTable
from plait.nn.roles import cast_parameters

_LOGGER = logging.getLogger(__name__)
_PARTS = ("embedding", "backbone", "lm_head", "classifier")
_THEIRS = (
    "backbone.",
    "layers.",
)  # how names in MiniMamba's state dicts begin, of its newer and its older class


class MambaModel(nn.Module):
    """A model whose forward pass is that of ``self.model``, Plait's own; ``config`` is as it was given."""

    head: ClassVar[HeadKind]
    config_class: ClassVar[type[BaseMambaConfig]]

    def __init__(self, config: BaseMambaConfig, mixer_cls: MixerClass | None = None) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise BuildError(
                f"{type(self).__name__} takes a {self.config_class.__name__}; got a {type(config).__name__}"
            )
        self.config = config
        self.mixer_cls = mixer_cls
        self.recomputes = config.gradient_checkpointing
        self.model = new_model(config, self._described())

    def _described(self) -> ModelConfig:
        return model_config(self.config, self.head, self.mixer_cls)

    @property
    def embedding(self) -> MambaEmbedding:
        """Token ids to vectors."""
        table = self.model.embedding.tokens
        assert isinstance(table, TokenTable)
        return MambaEmbedding.over(table)

    @property
    def backbone(self) -> MambaEncoder:
        """The layers and the last norm."""
        return MambaEncoder.over(self.model, self.config)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARTS:
            raise BuildError(
                f"{name} cannot be replaced: a mixer of one's own is given as "
                f"{type(self).__name__}(config, mixer_cls=...)"
            )
        super().__setattr__(name, value)

    def reset_cache(self, inference_params: InferenceParams | None = None) -> None:
        """Forget what ``inference_params`` holds."""
        reset_cache(inference_params)

    def get_cache_info(self, inference_params: InferenceParams | None = None) -> dict[str, Any]:
        """cached_layers, total_tensors, memory_mb and seqlen_offset of ``inference_params``."""
        return cache_info(inference_params)

    def gradient_checkpointing_enable(self) -> None:
        """Keep of each layer its input alone and compute it again in backward; once is enough."""
        if not self.recomputes:
            self.recomputes = True
            recompute(self.model, self.config)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take a state dict of this class, or one of MiniMamba's own.

        With MiniMamba's weights comes what MiniMamba computes in its own way, as options of a new ``self.model``
        (``self.model.config``): make the optimizer afterwards. CheckpointError names the tensor that does not fit.
        """
        tensors = unwrapped(state_dict)
        if not any(name.startswith(_THEIRS) for name in tensors):
            return super().load_state_dict(tensors, strict=strict, assign=assign)
        if not strict or assign or self.mixer_cls is not None:
            raise CheckpointError(
                f"{SYSTEM}'s own state dicts are taken whole and copied, by models without a mixer_cls"
            )
        self._take(tensors)
        return super().load_state_dict(self.state_dict())

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        model = from_state_dict(tensors, self.config.to_dict())
        if model.config.head.kind != self.head:
            raise CheckpointError(
                f"{SYSTEM}: these are the weights of a model for {model.config.head.kind}, which "
                f"{type(self).__name__} is not"
            )
        old = self.model
        cast_parameters(model.to(old.device), old.dtype)
        if self.recomputes:
            recompute(model, self.config)
        self.model = model.train(old.training)
        _LOGGER.warning(
            "weights of MiniMamba: gate without SiLU, time steps' bias twice (as options of the model; see its config)"
        )

    @classmethod
    def from_original(
        cls,
        source: str | PathLike[str] | Mapping[str, Tensor],
        config: BaseMambaConfig | None = None,
    ) -> Self:
        """MiniMamba's trained model, for evaluation: a file or a folder of weights, or a state dict with ``config``.

        Of a file or folder the configuration is by default the one JSON file beside the weights.
        """
        tensors: Any = source
        if not isinstance(source, Mapping):
            path = Path(source)
            tensors = read_file(find_one(path, SUFFIXES, "weights") if path.is_dir() else path)
            if config is None:
                folder = path if path.is_dir() else path.parent
                config = cls.config_class.from_json(find_one(folder, (".json",), "the configuration"))
        if config is None or not isinstance(tensors, Mapping):
            raise CheckpointError("a state dict and its configuration are needed, or a file that holds one")
        model = cls(config)
        model._take(unwrapped(tensors))
        return model.eval()
