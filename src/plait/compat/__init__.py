"""Floor 9: the four originals' names and commands, as thin faces over the one model, trainer and tokenizers."""
