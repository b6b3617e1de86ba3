"""A classifier of whole sequences: pooling that no pad reaches, a few steps of training, a regression."""

import torch

import plait


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences of three to ten ids, padded on the right, and whether id 7 is in each."""
    ids = torch.randint(8, 20, (16, 10), generator=generator)
    lengths = torch.randint(3, 11, (16,), generator=generator)
    mask = torch.arange(10) < lengths[:, None]
    labels = torch.randint(2, (16,), generator=generator)
    ids[labels == 1, 1] = 7
    return ids, mask, labels


def main() -> None:
    torch.manual_seed(0)
    head = {"kind": "classification", "num_labels": 2, "pooling": "mean"}
    config = {"d_model": 32, "pattern": "M*2", "mlp": "none", "vocab_size": 20, "head": head}
    model = plait.build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids, mask, labels = batch(data)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    ids, mask, labels = batch(data)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        right = (logits.argmax(-1) == labels).float().mean()
        other_pads = model(ids.masked_fill(~mask, 19), attention_mask=mask).logits
    print(f"{100 * right:.0f} % right; pads change nothing: {torch.equal(logits, other_pads)}")

    regression = plait.build({**config, "head": {**head, "num_labels": 1}})
    out = regression(ids, attention_mask=mask, labels=torch.linspace(-1, 1, 16))
    print(f"one label is a regression: mean squared error {out.loss:.3f}, outputs {tuple(out.logits.shape)}")


if __name__ == "__main__":
    main()
