"""Commands that need the training package; `sparse-hf` finds them through the entry points of the installed wheel."""
