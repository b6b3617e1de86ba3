"""What BitByte's language models share: each is Plait's one model, its weights under BitByte's names."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from plait.compat.bitbyte.models.block import Block, ByteBlock
from plait.compat.bitbyte.models.mamba.mamba_block import MambaBlock
from plait.compat.bitbyte.weights import to_theirs
from plait.config.errors import BuildError, CheckpointError
from plait.config.originals.bitbyte import Family, Sizes, family_pattern, model_section
from plait.config.pattern import parse_pattern
from plait.config.schema import ModelConfig
from plait.config.words import counted
from plait.formats.bitbyte import SYSTEM, from_state_dict
from plait.formats.foreign import unwrapped
from plait.inference.generate import generate
from plait.models.block import Block as PlaitBlock
from plait.models.heads import LMHead
from plait.models.model import Model
from plait.training.wrap import recompute_blocks

_FACES: dict[str, type[ByteBlock]] = {"attention": Block, "mamba": MambaBlock}
_ONLY = {"attention": ("n_head", "n_kv_head", "rope_base"), "mamba": ("d_state", "d_conv", "expand")}
_THEIRS = {"attn": "attention", "ssm": "mamba"}  # how a block's tensors tell its kind


class ByteLM(nn.Module):
    """Ids of bytes (B, T) to logits (B, T, vocab_size); ``model`` is Plait's own.

    ``state_dict`` and ``load_state_dict`` speak BitByte's names, and mean the same numbers as there.
    """

    family: ClassVar[Family]

    def __init__(self, sizes: Sizes, pattern: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.pattern = self._kinds(pattern)
        self.model = Model(ModelConfig.model_validate(model_section(sizes, self.pattern)))

    def _kinds(self, pattern: str | Sequence[str] | None) -> list[str]:
        if pattern is None:
            return family_pattern(self.family, self.sizes.n_layer)
        entries = parse_pattern(pattern if isinstance(pattern, str) else list(pattern))
        kinds = [entry.kind for entry in entries]
        if not set(kinds) <= set(_FACES) or any(entry.options for entry in entries):
            raise BuildError(f"pattern: {pattern!r}; a block is named mamba or attention, and has no options")
        if len(kinds) != self.sizes.n_layer:
            raise BuildError(
                f"pattern: it has {counted(len(kinds), 'block')}, but n_layer is {self.sizes.n_layer}"
            )
        return kinds

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that matter, as BitByte's trainer keeps them: what is off is not named."""
        unused = {name for kind, names in _ONLY.items() if kind not in self.pattern for name in names}
        values = self.sizes.model_dump(exclude={"act_quant", *unused}, exclude_none=True)
        return values if self.sizes.act_quant else {**values, "no_act_quant": True}

    @property
    def tok_emb(self) -> nn.Embedding:
        """The table of the ids."""
        return self.model.embedding.tokens

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first to last, to look at."""
        blocks = cast("list[PlaitBlock]", self.model.blocks)
        return nn.ModuleList(_FACES[block.kind].over(block) for block in blocks)

    @property
    def norm_f(self) -> nn.Module:
        """The last norm."""
        return self.model.final_norm

    @property
    def lm_head(self) -> nn.Module:
        """The output map; its weight is the table's."""
        head = self.model.head
        assert isinstance(head, LMHead)
        return head.unembedding

    def forward(self, idx: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of ids (B, T)."""
        logits: Tensor = self.model(idx).logits
        return logits

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """Ids (B, T) and ``max_new_tokens`` more, through the model's cache; temperature 0 is greedy."""
        ids: Tensor = generate(
            self.model,
            idx,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos_token_id=[],
        )
        return ids

    def gradient_checkpointing_enable(self) -> None:
        """Keep of each block its input alone and compute it again in backward."""
        recompute_blocks(list(self.model.blocks))

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The weights under BitByte's names."""
        found = OrderedDict() if destination is None else destination
        for name, tensor in to_theirs(self.model).items():
            found[prefix + name] = tensor
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take such weights, all of them; CheckpointError names the tensor, or the block of another family."""
        if not strict or assign:
            raise CheckpointError(f"{SYSTEM}'s state dicts are taken whole and copied")
        tensors = unwrapped(state_dict)
        for name in tensors:
            found = re.match(r"blocks\.(\d+)\.(attn|ssm)\.", name)
            own = self.pattern[int(found[1])] if found and int(found[1]) < len(self.pattern) else None
            if found and own and own != _THEIRS[found[2]]:
                raise CheckpointError(
                    f"{SYSTEM}: block {found[1]} of the weights is {_THEIRS[found[2]]}, of this "
                    f"{type(self).__name__} {own}: they are of another family"
                )
        given = from_state_dict(tensors, self.settings)
        if given.config.final_norm != self.model.config.final_norm or not given.config.head.tie:
            raise CheckpointError(
                f"{SYSTEM}: the weights have another last norm, or an output that is not tied"
            )
        return self.model.load_state_dict(given.state_dict())
