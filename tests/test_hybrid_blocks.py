"""The nanochat hybrid's ten tests, written anew: ``pytest tests/test_hybrid_blocks.py -v``, or run as a script.

tests/compat/test_nanochat.py and its neighbours go into the depth.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from plait.compat.nanochat.blocks import BaseBlock, create_block
from plait.compat.nanochat.blocks.mamba_block import MambaBlock
from plait.compat.nanochat.blocks.transformer_block import TransformerBlock
from plait.compat.nanochat.gpt import GPT, GPTConfig


def config(pattern: list[str] | None, n_embd: int = 64, vocab_size: int = 1000) -> GPTConfig:
    n_layer = 4 if pattern is None else len(pattern)
    sizes = {"sequence_len": 32, "vocab_size": vocab_size, "n_head": 2, "n_kv_head": 2, "n_embd": n_embd}
    return GPTConfig(n_layer=n_layer, block_pattern=pattern, mamba_d_state=8, **sizes)


def types(pattern: list[str] | None) -> str:
    with torch.device("meta"):
        blocks = GPT(config(pattern)).transformer.h
    for block in blocks:
        transformer = isinstance(block, TransformerBlock)
        assert hasattr(block, "attn") == transformer and isinstance(block, TransformerBlock | MambaBlock)
    return "".join("T" if isinstance(block, TransformerBlock) else "M" for block in blocks)


def trained(model: GPT) -> GPT:
    """With the zeros of the beginning drawn anew, so that every block takes part."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_backward_compatibility_default_config() -> None:
    assert types(None) == "TTTT"


def test_explicit_transformer_pattern() -> None:
    assert types(["T"] * 4) == types(["transformer"] * 4) == "TTTT"
    default, explicit = trained(GPT(config(None))), trained(GPT(config(["T"] * 4)))
    explicit.load_state_dict(default.state_dict())
    x = torch.randint(1000, (2, 16))
    assert torch.equal(default(x), explicit(x))


def test_hybrid_pattern() -> None:
    assert types(["T", "T", "M", "M"]) == "TTMM"


def test_alternating_pattern() -> None:
    assert types(["T", "M"] * 3) == "TMTMTM"


def test_block_pattern_validation() -> None:
    with pytest.raises(ValueError, match="must match"):
        GPT(GPTConfig(n_layer=4, block_pattern=["T", "T"]))
    with pytest.raises(ValueError, match="Unknown block type"):
        GPT(GPTConfig(n_layer=2, block_pattern=["T", "X"]))


def test_block_factory() -> None:
    for name, cls in (
        ("T", TransformerBlock),
        ("transformer", TransformerBlock),
        ("M", MambaBlock),
        ("mamba", MambaBlock),
    ):
        block = create_block(name, config(None), 0)
        assert type(block) is cls and isinstance(block, BaseBlock)
    with pytest.raises(ValueError, match="Unknown block type"):
        create_block("X", config(None), 0)


def test_forward_pass_transformer() -> None:
    check_forward(GPT(config(["T", "T"])), "cpu")


def test_forward_pass_hybrid() -> None:
    check_forward(GPT(config(["T", "M", "T", "M"])), "cpu")


@pytest.mark.gpu
def test_forward_pass_hybrid_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    check_forward(GPT(config(["T", "M", "T", "M"])).to("cuda"), "cuda")


def check_forward(model: GPT, device: str) -> None:
    """At first every token is as likely; later what comes after a token changes nothing before it."""
    x = torch.randint(1000, (2, 16), device=device)
    with torch.no_grad():
        assert torch.equal(model(x), torch.zeros(2, 16, 1000, device=device))
        logits = trained(model)(x)
        other = x.clone()
        other[:, 9] = (other[:, 9] + 1) % 1000
        changed = model(other)
    assert logits.shape == (2, 16, 1000) and logits.std() > 0.01 and logits.abs().max() < 15
    assert torch.allclose(changed[:, :9], logits[:, :9], atol=1e-5)
    assert (changed[:, 9:] - logits[:, 9:]).abs().max() > 1e-3


def test_model_config_serialization() -> None:
    given = config(["T", "T", "M", "M"])
    assert GPTConfig(**json.loads(json.dumps(given.__dict__))) == given


def test_parameter_count_consistency() -> None:
    counts = [create_block(name, config(None, n_embd=128), 0).get_num_params() for name in ("T", "M")]
    assert max(counts) < 2 * min(counts)
    with torch.device("meta"):
        model = GPT(config(["T", "M"], n_embd=128))
    assert sum(p.numel() for p in model.parameters()) == sum(counts) + 2 * 1000 * 128


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", __file__]))
