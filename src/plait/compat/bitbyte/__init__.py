"""BitByte: replace the import roots ``models`` and ``training`` by those below ``plait.compat.bitbyte``.

models     BitByteLM, MambaMLM, HybridLM; Block, MambaBlock, MambaSSM, SelectiveSSM, S4Kernel, BitLinear
training   Trainer, on Plait's training step, with checkpoints in BitByte's form
data       ByteShardDataset
train, validate, demo_generate, demo_mamba: commands, run with ``python -m``
"""
