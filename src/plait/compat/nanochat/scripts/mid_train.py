"""Midtraining: a base model goes on with conversations, at the rates of pretraining.

python -m plait.compat.nanochat.scripts.mid_train --data.train=conversations.jsonl
"""

from __future__ import annotations

import sys

from plait.compat.nanochat.common import run_script
from plait.compat.nanochat.scripts.fine_tuning import FineTuning, fine_tune

if __name__ == "__main__":
    sys.exit(run_script(lambda: fine_tune(sys.argv[1:], FineTuning, "mid")))
