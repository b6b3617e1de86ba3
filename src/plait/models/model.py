"""The one model: embedding, blocks, norm, head. GPT-2, BERT, Mamba, hybrids are configurations of it."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError, CapacityError, DataError
from plait.config.lazy import load_object
from plait.config.schema import ModelConfig
from plait.mixers.contract import Mixer
from plait.mixers.smear import Smear
from plait.models.backout import Backout
from plait.models.block import Block
from plait.models.cache import Cache
from plait.models.door import Entry, enter
from plait.models.heads import ClassificationHead, LMHead, pool
from plait.models.init import init_weights
from plait.models.later import later
from plait.models.loss import cross_entropy, next_token_targets
from plait.models.output import Output
from plait.models.resize import resize_vocabulary
from plait.nn.embedding import Embedding
from plait.nn.norm import make_norm
from plait.nn.roles import parameter_roles


class Model(nn.Module):
    """A plait of mixers with a head; built from a ``ModelConfig`` alone, no file and no global.

    On the meta device nothing is allocated or drawn: ``materialize`` does both later.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise BuildError("model.vocab_size is not set: give it, or train with a tokenizer that sets it")
        self.config = config
        self.vocab_size = config.vocab_size
        self.tokenizer: Any = None  # set by whoever loads the model with one; generation reads it
        multiple = config.pad_vocab_size_multiple
        rows = -(-config.vocab_size // multiple) * multiple
        d_in = config.embedding.width or config.d_model
        with torch.device(device or torch.get_default_device()):
            self.embedding = Embedding(config.embedding, rows, d_in)
            smear = config.embedding.smear
            self.smear = Smear(d_in, config.embedding.smear_channels) if smear else None
            blocks: list[Block] = []
            for index, layer in enumerate(config.layers()):
                blocks.append(Block(layer, d_in, causal=config.causal, index=index, vocab_rows=rows))
                d_in = blocks[-1].d_out
            # typed as what it holds: a ModuleList is only known to hold modules
            self.blocks = cast("MutableSequence[Block]", nn.ModuleList(blocks))
            self.backout = self._make_backout(blocks) if config.backout else None
            self.final_norm = make_norm(config.final_norm, d_in)
            self.head = self._make_head(d_in, rows)
        self.d_out = d_in
        parameter_roles(self)
        if config.head.kind == "lm":
            self._require("causal", "a causal language model", "set causal: true, or use head masked_lm")
        if self.embedding.tokens.weight.device.type != "meta":
            init_weights(self)
        if dtype is not None:
            self.to(dtype)

    def _make_backout(self, blocks: list[Block]) -> Backout:
        backout = Backout(len(blocks))
        middle, last = blocks[backout.after].d_out, blocks[-1].d_out
        if middle != last:
            raise BuildError(
                f"backout: layer {backout.after} is {middle} wide but the last one {last}; make them equal"
            )
        return backout

    def _make_head(self, d_in: int, rows: int) -> nn.Module | None:
        config = self.config.head
        if config.kind == "features":
            return None
        if config.kind == "classification":
            return ClassificationHead(config, d_in)
        tied = self.embedding.tokens.weight if config.tie else None
        if tied is not None and tied.shape[1] != d_in:
            raise BuildError(
                f"head: the last layer is {d_in} wide but the embedding {tied.shape[1]}; set head.tie: false"
            )
        return LMHead(config, d_in, self.vocab_size, rows, tied, self.config.norm.eps)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embedding.tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and of conv tails, keys and values."""
        return self.embedding.tokens.weight.dtype

    @property
    def mixers(self) -> list[Mixer]:
        """Everything that mixes along time, in the order of ``Cache.states``: the blocks' mixers, the smear."""
        mixers = [block.mixer for block in self.blocks]
        return mixers if self.smear is None else [*mixers, self.smear]

    @property
    def stateful(self) -> bool:
        """Whether every layer keeps a state, so that generation need not recompute the prefix."""
        return all(mixer.stateful for mixer in self.mixers)

    def materialize(self, device: torch.device | str) -> Model:
        """Allocate and initialise a model that was built on the meta device."""
        self.to_empty(device=device)
        if isinstance(self.head, LMHead) and self.head.unembedding.tied:  # to_empty made two of the one
            self.head.unembedding.weight = cast("nn.Parameter", self.embedding.tokens.weight)
        init_weights(self)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_len: int | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits: bool = False,
    ) -> Output:
        """Logits, and the loss if labels are given; differentiable, through a given cache too.

        input_ids (B, T) with an optional attention_mask (B, T; 0 marks pads anywhere), or one packed row (1, n)
        with cu_seqlens (S+1), whose longest sequence has at most ``max_len`` tokens; or, in their place,
        inputs_embeds (B, T, d) that stand for the rows of the embedding's table. Labels are unshifted ids
        (B, T), -100 ignored, and are shifted once in here for a causal model; (B,) for classification.
        A given cache is left as it was; the one after these tokens is ``output.cache``.
        The loss of many tokens over a large vocabulary is computed in parts, without their logits in memory;
        ``output.logits`` are then computed when they are read, before the weights change, or at once with ``logits``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise DataError("give either input_ids or inputs_embeds")
        tokens = cast("Tensor", inputs_embeds if input_ids is None else input_ids)
        entry = enter(tokens, attention_mask, cu_seqlens, max_len, cache)
        self._check(entry, cache)
        states = [] if cache is None else list(cache.states)

        def run(part: nn.Module, place: int, x: Tensor, *more: Tensor) -> Tensor:
            y, new = part(x, entry.layout, states[place] if states else None, *more)
            if states:
                states[place] = new
            return y

        out = self._finish(self._trunk(entry, token_type_ids, run), entry, labels, logits)
        if cache is not None:
            out.cache = Cache(states, cache.positions.clone(), list(cache.lengths), cache.capacity)
            out.cache.advance(entry.lengths, entry.layout.lengths)
        return out

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        cache: Cache,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of any number of new tokens, the cache updated in place: prefill, chunks and decoding alike.

        (B, T, V), or with ``last_only`` (B, V) of each sequence's last new token. Raises CapacityError before
        anything is written if a sequence would outgrow the cache.
        """
        entry = enter(input_ids, attention_mask, cu_seqlens, None, cache)
        self._check(entry, cache)
        if not isinstance(self.head, LMHead):
            raise BuildError(f"step gives token logits, which a {self.config.head.kind} head does not have")

        def run(part: Any, place: int, x: Tensor, *more: Tensor) -> Tensor:
            y: Tensor = part.step(x, entry.layout, cache.states[place], *more)
            return y

        x = self._body(entry, None, run)
        if last_only:
            x = pool(x, entry.layout, "last")
        # the head before the counting: nothing comes between its kernel and the layers' where steps are recorded
        logits = self.head.step(x, self.final_norm)[..., : self.vocab_size]
        cache.advance(entry.lengths, entry.layout.lengths)
        return logits if last_only else entry.restore_pads(logits)

    def new_cache(self, n_seq: int, capacity: int) -> Cache:
        """An empty cache for ``n_seq`` sequences of at most ``capacity`` tokens each."""
        self._require("causal", "a cache", "it needs layers that look only back")
        self._require("stateful", "a cache", "generate recomputes the prefix for such layers")
        states = [mixer.init_state(n_seq, capacity, self.device, self.dtype) for mixer in self.mixers]
        positions = torch.zeros(n_seq, dtype=torch.int64, device=self.device)
        return Cache(states, positions, [0] * n_seq, capacity)

    def generate(self, prompts: Any, **options: Any) -> Any:
        """Continue token ids (B, T), lists of ids, or texts; see ``plait.inference.generate.generate``."""
        return load_object("plait.inference.generate:generate")(self, prompts, **options)

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Grow or shrink the vocabulary; kept ids keep their vectors, new rows are drawn as at initialisation."""
        resize_vocabulary(self, vocab_size)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; a tied weight counts once, where it is first used."""
        counts = {"embedding": _count(self.embedding)}
        if self.smear is not None:
            counts["smear"] = _count(self.smear)
        for index, block in enumerate(self.blocks):
            counts[f"block {index} ({block.kind})"] = _count(block)
        if self.backout is not None:
            counts["backout"] = _count(self.backout)
        counts["final_norm"] = _count(self.final_norm)
        total = _count(self)
        counts["head"] = total - sum(counts.values())
        counts["total"] = total
        return counts

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Operations of a forward over ``n_new`` tokens of one sequence after ``n_past``."""
        head = 0 if self.head is None else sum(p.numel() for p in self.head.parameters() if p.dim() == 2)
        smear = 0 if self.smear is None else self.smear.flops(n_new, n_past)
        return sum(block.flops(n_new, n_past) for block in self.blocks) + smear + 2 * n_new * head

    def _require(self, quality: str, purpose: str, advice: str) -> None:
        for index, block in enumerate(self.blocks):
            if not getattr(block.mixer, quality):
                raise BuildError(
                    f"layer {index} ({block.kind}) is not {quality}, which {purpose} needs: {advice}"
                )

    def _check(self, entry: Entry, cache: Cache | None) -> None:
        if cache is not None:
            cache.check_room(entry.lengths)
        if self.embedding.positions is None:
            return
        most = self.config.embedding.max_positions
        new = max(entry.lengths, default=entry.layout.max_new)
        longest = (
            new if cache is None else max(map(sum, zip(cache.lengths, entry.lengths, strict=True)), default=0)
        )
        if longest > most:
            raise CapacityError(
                f"{longest} tokens exceed the {most} learned positions: shorten the input or raise "
                "model.embedding.max_positions"
            )

    def _trunk(self, entry: Entry, token_types: Tensor | None, run: Callable[..., Tensor]) -> Tensor:
        """From tokens to the hidden states before the head: (S, T, d) or (1, n, d)."""
        hidden: Tensor = self.final_norm(self._body(entry, token_types, run))
        return hidden

    def _body(self, entry: Entry, token_types: Tensor | None, run: Callable[..., Tensor]) -> Tensor:
        """From tokens to what the final norm is given.

        ``run(part, place, x, ...)`` sends x through a block or the smear, whose state is in that place of the cache.
        """
        types = None if token_types is None else entry.drop_pads(token_types)
        x: Tensor = self.embedding(entry.tokens, entry.layout.positions, types)
        if self.smear is not None:
            x = run(self.smear, len(self.blocks), x)
        embedded = middle = x
        for index, block in enumerate(self.blocks):
            x = run(block, index, x, embedded)
            if self.backout is not None and index == self.backout.after:
                middle = x
        return x if self.backout is None else self.backout(x, middle)

    def _finish(self, hidden: Tensor, entry: Entry, labels: Tensor | None, logits: bool) -> Output:
        out = Output(hidden=entry.restore_pads(hidden))
        if isinstance(self.head, ClassificationHead):
            out.logits = pooled = self.head(hidden, entry.layout)
            if labels is not None:
                out.loss_sum, out.n_targets = self.head.loss(pooled, labels)
        elif isinstance(self.head, LMHead):
            if labels is not None and not logits and self.head.splits_loss(hidden):
                out.loss_sum, out.n_targets = self.head.loss(hidden, self._targets(entry, labels))
                out.logits = later(self.head, hidden, entry)
            else:
                made = self.head(hidden)
                if labels is not None:
                    out.loss_sum, out.n_targets = cross_entropy(made, self._targets(entry, labels))
                out.logits = entry.restore_pads(made)
        elif labels is not None:
            raise DataError("labels were given to a model whose head gives features, which has no loss")
        if out.loss_sum is not None and out.n_targets is not None:
            out.loss = out.loss_sum / out.n_targets.clamp(min=1)
        return out

    def _targets(self, entry: Entry, labels: Tensor) -> Tensor:
        if labels.shape != entry.shape:
            raise DataError(
                f"labels have shape {tuple(labels.shape)}, input_ids {entry.shape}; they must be equal"
            )
        labels = entry.drop_pads(labels)
        return next_token_targets(labels, entry.layout) if self.config.head.kind == "lm" else labels


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
