"""Train a small byte-level GPT on flash_attn and on standard attention, side by side: `python -m demo`."""
