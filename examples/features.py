"""Hidden states instead of logits, from token ids or from vectors of one's own."""

import torch

import plait


def main() -> None:
    torch.manual_seed(0)
    model = plait.build(
        {"d_model": 48, "pattern": "M*2 T", "vocab_size": 100, "head": {"kind": "features"}}
    ).eval()
    ids = torch.randint(100, (2, 15))
    with torch.no_grad():
        features = model(ids).hidden
        vectors = model.embedding.tokens(ids)
        same = model(inputs_embeds=vectors).hidden
        mask = torch.arange(15) < torch.tensor([[15], [9]])
        short = model(ids, attention_mask=mask).hidden
    print("features:", tuple(features.shape))
    print("from the embedding's own vectors the same:", torch.allclose(features, same))
    print("a masked row is the shorter row:", torch.allclose(short[1, :9], features[1, :9], atol=1e-5))
    print("one vector a sequence:", tuple(features.mean(1).shape))


if __name__ == "__main__":
    main()
