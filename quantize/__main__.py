"""`python -m quantize`, and the `quantize` command."""

import os
import sys

from quantize.cli import main


def run() -> None:
    """The command line, with text and file names in UTF-8.

    In another encoding, a path in a recipe is not the bytes that a shell would send, and tokenizers refuses it. So
    the interpreter starts again in UTF-8 mode (PEP 540), which its own processes inherit. The bytes of arguments stay.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    main(prog_name="quantize")


if __name__ == "__main__":
    run()
