"""The entry point: `llm-emo` and `python -m llm_emo`."""

from llm_emo.cli import main

if __name__ == "__main__":
    main()
