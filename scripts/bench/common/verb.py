"""Run one verb of the program in a process of its own; the last line printed is its JSON."""

import contextlib
import io
import json
import sys

from llm_emo import cli

if __name__ == "__main__":
    printed = io.StringIO()
    code: object = 0
    sys.argv = ["llm-emo", *sys.argv[1:], "--json"]
    try:
        with contextlib.redirect_stdout(printed):
            cli.main()
    except SystemExit as end:
        code = end.code
    if code:
        raise SystemExit(code)
    print(json.dumps(json.loads(printed.getvalue())))
