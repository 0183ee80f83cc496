"""Studies: recipes that choose heads, side by side at equal bytes, on real models and on planted ones."""
