"""Depth 20, attention everywhere: what the others are compared with."""

depth = 20
block_pattern = None  # T in every layer

# Steps of half a million tokens, 20 tokens a parameter; rows of 2048 tokens, 32 of them a forward on one device.
max_seq_len = 2048
device_batch_size = 32
total_batch_size = 524288
target_param_data_ratio = 20

# AdamW for embedding and output (at width 768), Muon for the matrices.
embedding_lr = 0.2
unembedding_lr = 0.004
matrix_lr = 0.02
weight_decay = 0.0
grad_clip = 1.0
