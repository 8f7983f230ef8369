"""Serve a trained model over HTTP: `python serve.py --help`."""

import logging
import os
import signal
import sys


def main() -> int:
    from bertpair.console import install_signal_handlers
    from bertpair.settings.serve import parse_serve_command_line

    config, notes = parse_serve_command_line(sys.argv[1:])  # before torch is imported
    from bertpair.serving.server import configure_serve_logging, serve

    install_signal_handlers()
    configure_serve_logging()
    try:
        for note in notes:
            logging.getLogger("bertpair").info("%s", note)
        return serve(config)
    finally:
        logging.shutdown()  # the lines before the one that says why it ended


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):  # until torch is loaded, which takes seconds
        signal.signal(each, lambda signum, frame: os._exit(128 + signum))
    from bertpair.console import run_script

    sys.exit(run_script(main))
