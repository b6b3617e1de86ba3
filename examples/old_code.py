"""Code that was written for MiniMamba: only the import root changes. Its trained weights come along."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from plait.compat.minimamba import (
    InferenceParams,
    Mamba,
    MambaConfig,
    MambaForCausalLM,
    MambaLMConfig,
)
from plait.formats.native import save_model


def main() -> None:
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, n_layer=2, vocab_size=1001)
    old = Mamba(config)  # its first name
    input_ids = torch.randint(0, 1001, (1, 10))
    print("logits:", tuple(old(input_ids).shape))

    model = MambaForCausalLM(MambaLMConfig(**config))
    model.load_state_dict(old.state_dict())
    model.eval()
    generated = model.generate(input_ids, max_new_tokens=5, temperature=0.8)
    print("generated:", tuple(generated.shape))

    inference_params = InferenceParams()
    logits = model(input_ids, inference_params)  # fills the cache
    token = logits[:, -1:].argmax(-1)
    model(token, inference_params)
    info = model.get_cache_info(inference_params)
    print(f"{info['seqlen_offset']} tokens in {info['cached_layers']} layers, {info['memory_mb']:.3f} MB")
    print("streamed:", len(list(model.generate_streaming(input_ids, max_new_tokens=4))), "tokens")

    with TemporaryDirectory() as folder:
        config.save_to_json(Path(folder) / "config.json")
        print("config read again:", MambaConfig.from_json(Path(folder) / "config.json") == config)
        save_model(model.model, folder)  # from here on a model like any other: plait.load(folder)


if __name__ == "__main__":
    main()
