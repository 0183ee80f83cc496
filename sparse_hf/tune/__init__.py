"""Measures on the user's GPU what tables hold: tile configurations of the kernels, and break-even lengths."""
