"""Adapt chat LLMs to text emotion recognition and measure them honestly.

Importing this package loads no torch: the text half of the program (corpora,
prompts, recipes, parsing, metrics, protocols) stands on its own.
"""

__version__ = "0.1.0"
