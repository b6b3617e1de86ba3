"""A model as data: a preset, what is changed in it, what a wrong key says, files that load again."""

from pathlib import Path
from tempfile import TemporaryDirectory

import plait


def main() -> None:
    config = plait.load_config(
        {"model": {"preset": "minimamba", "d_model": 64, "n_layer": 4, "vocab_size": 1000}},
        ["--model.mamba.d_state=8", "--training.lr=2e-3"],
    )
    model = plait.Model(config.model, device="meta")  # nothing is allocated
    print(f"{len(model.blocks)} layers of {model.blocks[0].kind}, d_state {model.blocks[0].mixer.d_state}")
    print(f"{model.parameter_counts()['total']:,} parameters, learning rate {config.training.lr}")

    hybrid = config.replace(model=config.model.replace(n_layer=None, pattern="M*2 T M"))
    print("a hybrid:", " ".join(layer.kind for layer in hybrid.model.layers()))

    try:
        plait.load_config({"model": {"d_modle": 64}})
    except plait.PlaitError as error:
        print("a wrong key:", error)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "hybrid.yaml"
        plait.save_config(hybrid, path)
        print("the file gives the same config:", plait.load_config(path) == hybrid)


if __name__ == "__main__":
    main()
