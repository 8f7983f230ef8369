"""Measure a trained model on a data file: `python evaluate.py --help`."""

import json
import sys

from bertpair.command_line import parse_command_line
from bertpair.console import run_script
from bertpair.scoring import evaluate_models


def main() -> int:
    parsed = parse_command_line(sys.argv[1:], "evaluate")
    result = evaluate_models(parsed.config, explicit=parsed.explicit, notes=parsed.notes)
    print(result.text)
    for name, folder in result.folders.items():
        print(f"{name}: files in {folder}")
    print(json.dumps(result.summary(), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
