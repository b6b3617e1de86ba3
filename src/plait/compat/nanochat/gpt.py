"""GPT as nanochat has it: the same calls, over the one model.

The blocks in ``transformer.h`` and the weights in ``transformer.wte`` and ``lm_head`` are the model's own; the
forward pass is the model's. Weights leave and enter (``state_dict``, ``load_state_dict``) under nanochat's names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.compat.nanochat.blocks.registry import block_of
from plait.compat.nanochat.gpt_config import NAMES, GPTConfig, model_config
from plait.compat.nanochat.optimizer_state import speak_nanochat
from plait.compat.nanochat.rotary import apply_rotary_emb, rotary_tables
from plait.config.errors import BuildError
from plait.config.originals.nanochat import resolved_pattern, translate
from plait.config.schema import MLPConfig, TrainingConfig
from plait.formats.foreign import Tensors
from plait.formats.nanochat_layout import SYSTEM, to_ours, to_theirs
from plait.formats.native import weights
from plait.inference.generate import stream_generate
from plait.mixers.attention import Attention
from plait.mixers.contract import linear_flops
from plait.models.init import init_weights
from plait.models.model import Model
from plait.nn.mlp import MLP as PlaitMLP
from plait.nn.norm import RMSNorm
from plait.training.optimizers import Optimizer

if TYPE_CHECKING:
    from plait.compat.nanochat.engine import KVCache

__all__ = ["GPT", "MLP", "GPTConfig", "apply_rotary_emb", "norm"]

IGNORE = -1  # nanochat's target that does not count


def norm(x: Tensor) -> Tensor:
    """The RMS norm without weights over the last channels of x, with float32's eps."""
    y: Tensor = RMSNorm(x.shape[-1], eps=torch.finfo(torch.float32).eps, weight=False)(x)
    return y


class MLP(PlaitMLP):
    """(..., n_embd) -> the same, four times as wide inside, squared ReLU: for blocks of your own."""

    def __init__(self, config: Any) -> None:
        super().__init__(MLPConfig(kind="relu2"), config.n_embd)


class Blocks(nn.ModuleList):
    """The blocks of a built model, to look at; they are chosen by ``block_pattern`` and not replaced afterwards."""

    def __setitem__(self, index: Any, module: nn.Module) -> None:
        raise BuildError(
            "a GPT's blocks cannot be replaced: register_block the new type and name it in block_pattern"
        )


class GPT(nn.Module):
    """A language model of the blocks that ``config.block_pattern`` names.

    ``config`` is the one given, unchanged; ``block_pattern`` the resolved pattern, a type for each layer; ``model`` is
    Plait's own model. ConfigError, a ValueError, for a pattern that "must match" n_layer, or an "Unknown block type".
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        pattern = config.block_pattern
        self.config = replace(config, block_pattern=None if pattern is None else list(pattern))
        self.block_pattern = resolved_pattern(pattern, config.n_layer)
        self._hold(Model(model_config(config)))

    @classmethod
    def over(cls, model: Model, config: GPTConfig) -> GPT:
        """The face of a model that exists, such as a loaded one; ``config`` describes it."""
        face = cls.__new__(cls)
        nn.Module.__init__(face)
        face.config = config
        face.block_pattern = resolved_pattern(config.block_pattern, config.n_layer)
        face._hold(model)
        return face

    def _hold(self, model: Model) -> None:
        self.model = model
        blocks = [block_of(block, self.config, index) for index, block in enumerate(model.blocks)]
        # In a tuple, so that they are not registered: their weights are the model's.
        self._faces = (nn.ModuleDict({"wte": model.embedding.tokens, "h": Blocks(blocks)}),)

    @property
    def transformer(self) -> nn.ModuleDict:
        """``wte``, the embedding's table, and ``h``, the blocks."""
        return self._faces[0]

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states to logits before the soft cap; its ``weight`` is (vocab_size, n_embd)."""
        head = self.model.head
        assert head is not None
        unembedding = head.unembedding
        assert isinstance(unembedding, nn.Module)
        return unembedding

    @property
    def cos(self) -> Tensor:
        """The cosines of ten times ``sequence_len`` positions, (1, 10 T, 1, head width / 2) in bfloat16."""
        return self._rotary()[0]

    @property
    def sin(self) -> Tensor:
        """The sines of the same positions."""
        return self._rotary()[1]

    def _rotary(self) -> tuple[Tensor, Tensor]:
        # Made when asked for: the model's attention has tables of its own, and Mamba needs none.
        if not any(isinstance(block.mixer, Attention) for block in self.model.blocks):
            raise BuildError("this GPT has no attention, so it has no rotary tables")
        headdim = self.config.n_embd // self.config.n_head
        return rotary_tables(10 * self.config.sequence_len, headdim, self.get_device())

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """A copy of the weights in float32 under nanochat's names, for T and M; with other blocks, under ours."""
        if not self._has_names():
            return super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        found = OrderedDict() if destination is None else destination
        for name, tensor in to_theirs(weights(self.model), self.model.config).items():
            found[prefix + name] = tensor
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take the weights of such a state dict, all of them; CheckpointError names the tensor that does not fit."""
        if not strict:
            raise BuildError("a GPT takes whole state dicts alone: strict must be True")
        if self._has_names():
            state_dict = to_ours(Tensors(state_dict, SYSTEM), self.model.config)
            state_dict = {name: tensor.to(self.model.dtype) for name, tensor in state_dict.items()}
            return self.model.load_state_dict(state_dict, assign=assign)
        return super().load_state_dict(state_dict, assign=assign)

    def _has_names(self) -> bool:
        return {block.kind for block in self.model.blocks} <= set(NAMES)

    def init_weights(self) -> None:
        """Draw all weights anew, also after ``to_empty`` of a model that was built on the meta device."""
        init_weights(self.model)

    def get_device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def estimate_flops(self) -> int:
        """Operations a token of training, forward and backward, at rows of ``sequence_len``: block by block.

        An attention counts all T keys for each of T queries, as nanochat does; other mixers count themselves.
        """
        length = self.config.sequence_len
        total = 6 * self.lm_head.get_parameter("weight").numel()
        for block in self.model.blocks:
            if isinstance(block.mixer, Attention):
                total += 3 * linear_flops(block) + 12 * block.mixer.n_head * block.mixer.headdim * length
            else:
                total += 3 * block.flops(length) // length
        return total

    def setup_optimizers(
        self,
        unembedding_lr: float = 0.004,
        embedding_lr: float = 0.2,
        matrix_lr: float = 0.02,
        weight_decay: float = 0.0,
    ) -> list[torch.optim.Optimizer]:
        """[AdamW, Muon]: every parameter in one of them by its role; matrices to Muon, all others to AdamW.

        Each group has its ``initial_lr``. With attention alone their states are saved and loaded in nanochat's form.
        Over several processes, let the trainer do it (scripts.base_train).
        """
        settings = {"unembedding_lr": unembedding_lr, "embedding_lr": embedding_lr, "matrix_lr": matrix_lr}
        recipe = translate({**settings, "weight_decay": weight_decay})["training"]
        optimizer = Optimizer(self.model, TrainingConfig.model_validate(recipe))
        for part in optimizer.parts:
            for group in part.param_groups:
                group["initial_lr"] = group["lr"]
        if {block.kind for block in self.model.blocks} == {"attention"}:
            return speak_nanochat(optimizer, self.model.config)
        return optimizer.parts

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KVCache | None = None,
        loss_reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Logits (B, T, V) of idx (B, T); with ``targets`` (B, T) the loss in nats instead.

        Targets are the next tokens, already shifted; -1 does not count. ``loss_reduction`` none: (B T,), 0 where a
        target does not count. With ``kv_cache`` idx continues what the cache holds, which moves on; no gradients then.
        """
        if kv_cache is not None:
            if targets is not None:
                raise BuildError("a loss over a cache is not defined here: give targets or kv_cache")
            return self.model.step(idx, kv_cache.attached(self.model))
        logits = self.model(idx).logits
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction=loss_reduction
        )

    def generate(
        self,
        tokens: list[int],
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[int]:
        """Continue a list of ids: ``max_tokens`` more, one after the other; temperature 0 takes the most probable."""
        pieces = stream_generate(
            self.model,
            [list(tokens)],
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            eos_token_id=[],
        )
        for piece in pieces:
            yield from piece.ids
