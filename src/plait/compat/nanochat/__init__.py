"""nanochat and its hybrid of attention and Mamba: replace the import root ``nanochat`` by ``plait.compat.nanochat``.

gpt                 GPT, GPTConfig
blocks              BaseBlock, create_block, register_block, TransformerBlock, MambaBlock
checkpoint_manager  save and load checkpoints in nanochat's layout
engine, tokenizer   Engine, KVCache; get_tokenizer
scripts             base_train and its siblings, run with ``python -m`` or torchrun
configs             the hybrid's Python configs
"""
