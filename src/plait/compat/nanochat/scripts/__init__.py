"""nanochat's scripts, as ``python -m plait.compat.nanochat.scripts.NAME``; each hands over to ``plait``.

    base_train   pretraining                     tok_train, tok_eval   the tokenizer
    base_loss    bits per byte of a checkpoint   mid_train, chat_sft   training on conversations
    base_eval    CORE, from local files          chat_cli              talk to a checkpoint

Not there yet: chat_eval (its tasks), chat_web. Not taken over: chat_rl.
"""
