"""Learning which attention heads may read sparsely."""
