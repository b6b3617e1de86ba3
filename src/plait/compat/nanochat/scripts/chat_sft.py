"""Supervised fine-tuning: a model goes on with conversations, at small rates that go down to 0 from the beginning.

python -m plait.compat.nanochat.scripts.chat_sft --source=base --data.train=conversations.jsonl
"""

from __future__ import annotations

import sys

from pydantic import Field

from plait.compat.nanochat.common import run_script
from plait.compat.nanochat.scripts.fine_tuning import FineTuning, fine_tune


class ChatSFT(FineTuning):
    """nanochat's defaults of this stage; a step has 32 rows."""

    source: str = Field("mid", description="the stage that the model comes from: base, mid, sft")
    device_batch_size: int = Field(4, gt=0, description="rows of a forward on one device")
    total_batch_size: int = Field(32 * 2048, gt=0, description="tokens of a step")
    init_lr_frac: float = Field(0.02, gt=0, description="share of these rates to begin with")
    warmdown_ratio: float = Field(
        1.0, gt=0, le=1, description="share of the run in which the rates go down to 0"
    )
    eval_every: int = Field(100, description="steps between evaluations; -1: at the end alone")


if __name__ == "__main__":
    sys.exit(run_script(lambda: fine_tune(sys.argv[1:], ChatSFT, "sft")))
