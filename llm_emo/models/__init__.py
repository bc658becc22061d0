"""Base models: any causal LM that transformers loads, and the one that is bundled."""
