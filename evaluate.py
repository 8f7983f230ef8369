"""Measure a trained model on a data file: `python evaluate.py --help`."""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> int:
    from bertpair.console import install_signal_handlers, say
    from bertpair.settings.command_line import parse_command_line

    def settings_folder(model_dir: Path) -> Path:
        from bertpair.checkpoints.checkpoint import settings_folder

        return settings_folder(model_dir)

    parsed = parse_command_line(sys.argv[1:], "evaluate", settings_folder)  # before torch is imported
    from bertpair.evaluation.evaluate import evaluate_models

    install_signal_handlers()
    result = evaluate_models(parsed.config, explicit=parsed.explicit, notes=parsed.notes)
    say(result.text)
    for name, folder in result.folders.items():
        say(f"{name}: files in {folder}")
    say(json.dumps(result.summary(), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):  # until torch is loaded, which takes seconds
        signal.signal(each, lambda signum, frame: os._exit(128 + signum))
    from bertpair.console import run_script

    sys.exit(run_script(main))
