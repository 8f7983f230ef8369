"""Serve a trained model over HTTP: `python serve.py --help`."""

import logging
import sys

from bertpair.console import run_script
from bertpair.serve_command_line import parse_serve_command_line
from bertpair.server import configure_serve_logging, serve


def main() -> int:
    call = parse_serve_command_line(sys.argv[1:])
    configure_serve_logging()
    try:
        for note in call.notes:
            logging.getLogger("bertpair").info("%s", note)
        return serve(call.config)
    finally:
        logging.shutdown()  # the lines before the one that says why it ended


if __name__ == "__main__":
    sys.exit(run_script(main))
