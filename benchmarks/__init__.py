"""Side-by-side measurements; each suite writes one file of benchmarks/results."""
