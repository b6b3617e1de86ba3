"""The mixers, one file a kind; `contract.py` says what each must do."""
