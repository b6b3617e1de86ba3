"""The cache: all layers' states, made by the model and held by you. Prefill, decode, fork, rewind."""

import torch

import plait


def main() -> None:
    torch.manual_seed(0)
    model = plait.build({"d_model": 64, "pattern": "M*3 T", "vocab_size": 100}).eval()
    ids = torch.randint(100, (1, 12))
    whole = model(ids).logits

    cache = model.new_cache(n_seq=1, capacity=64)
    first = model.step(ids[:, :8], cache)  # the prompt in one go
    more = [model.step(ids[:, t : t + 1], cache) for t in range(8, 12)]  # then token by token
    error = (torch.cat([first, *more], 1) - whole).abs().max().item()
    print(f"{cache.lengths[0]} tokens read, {cache.nbytes:,} bytes; off the whole run by {error:.0e}")

    for layer, state in enumerate(cache.states):
        print(f"  layer {layer}:", {name: tuple(tensor.shape) for name, tensor in state.items()})

    fork = cache.clone()
    model.step(torch.tensor([[1]]), cache)
    model.step(torch.tensor([[2]]), fork)  # another continuation
    print("the fork went its own way:", cache.lengths == fork.lengths and not same_states(cache, fork))

    point = cache.clone()
    before = model.step(torch.tensor([[6]]), cache.clone())
    model.step(torch.tensor([[3, 4, 5]]), cache)
    cache = point  # three tokens back
    after = model.step(torch.tensor([[6]]), cache)
    print("rewound, the same token gives the same logits:", torch.equal(before, after))

    longer = plait.generate(model, ids, max_new_tokens=20, temperature=0.0)
    slow = plait.generate(model, ids, max_new_tokens=20, temperature=0.0, use_cache=False)
    print("generation without the cache gives the same tokens:", torch.equal(longer, slow))


def same_states(one: plait.Cache, other: plait.Cache) -> bool:
    """Whether two caches hold equal numbers."""
    pairs = zip(one.states, other.states, strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


if __name__ == "__main__":
    main()
