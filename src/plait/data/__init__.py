"""Text to token shards to packed batches; the order of the data is a pure function, a loader's state one
integer. What makes tensors, and so imports torch, is in the modules loader, packing, masking, classification.
"""

from plait.data.documents import Document, read_documents
from plait.data.prepare import open_data, prepare
from plait.data.shards import TokenShards, write_shards
from plait.data.sources import held_out

__all__ = [
    "Document",
    "TokenShards",
    "held_out",
    "open_data",
    "prepare",
    "read_documents",
    "write_shards",
]
