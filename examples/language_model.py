"""Train a small Mamba on text, byte by byte; load what was saved; generate; the loss of a batch from Python."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import plait

TEXT = "one two three four five six seven eight nine ten. " * 200


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "numbers.txt").write_text(TEXT)
        result = plait.train(
            {
                "model": {"d_model": 64, "pattern": "M*2", "mlp": "none"},
                "data": {
                    "train": str(folder / "numbers.txt"),
                    "sequence_length": 128,
                    "cache": str(folder / "cache"),
                },
                "training": {"steps": 60, "batch_tokens": 1024, "lr": 1e-2, "out": str(folder / "run")},
            },
            quiet=True,
        )
        print(f"after {result.step} steps: {result.validation.bits_per_byte:.3f} bits per byte held out")

        model = plait.load(folder / "run")
        print("greedy:", repr(model.generate("one two three ", max_new_tokens=24, temperature=0.0)))

    ids = torch.tensor([model.tokenizer.encode("one two three four five six")])
    out = model(ids, labels=ids)  # labels are the ids themselves: the shift happens inside
    print(f"loss {out.loss:.3f} nats a byte, logits {tuple(out.logits.shape)}")


if __name__ == "__main__":
    main()
