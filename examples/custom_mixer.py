"""A mixer of one's own: a plain torch module in a hybrid, and in a model of MiniMamba's classes."""

import warnings

import torch
from torch import nn

import plait
from plait.compat.minimamba import MambaForCausalLM, MambaLMConfig
from plait.mixers.adapter import register_module


class RunningMean(nn.Module):
    """(B, T, d) -> a map of the mean of all tokens so far."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.map = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: torch.Tensor, inference_params: None = None) -> torch.Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.map(x.cumsum(1) / count)


def main() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # it keeps no state, so generation recomputes, and says so once
    ids = torch.randint(50, (2, 9))

    # In a hybrid: a name for the pattern, and how to build the module.
    register_module(
        "running_mean", lambda values, d_model, layer_index: RunningMean(MambaLMConfig(d_model=d_model))
    )
    hybrid = plait.build({"d_model": 32, "pattern": "M running_mean T", "vocab_size": 50})
    hybrid(ids, labels=ids).loss.backward()
    trained = hybrid.blocks[1].mixer.module.map.weight.grad
    print("in a hybrid:", [block.kind for block in hybrid.blocks], "gradient:", bool(trained.abs().sum() > 0))
    print("generated:", tuple(hybrid.generate(ids, max_new_tokens=3).shape))

    # As MiniMamba takes it: a class that is called with the config.
    model = MambaForCausalLM(MambaLMConfig(d_model=32, n_layer=2, vocab_size=50), mixer_cls=RunningMean)
    print("as mixer_cls:", type(model.backbone.layers[0].mixer).__name__)
    print("generated:", tuple(model.generate(ids, max_new_tokens=3).shape))


if __name__ == "__main__":
    main()
