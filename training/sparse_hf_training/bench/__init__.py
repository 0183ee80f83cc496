"""Time and memory of training steps: dense attention, sparse heads and mask learning, on one GPU or many."""
