"""What `scripts/gpu/check.py` measures; one module a concern, the parts in `parts`."""
