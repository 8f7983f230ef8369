"""Fine-tune a BERT on pairs of texts: `python train.py --help`."""

import json
import sys

from bertpair.command_line import parse_command_line
from bertpair.console import run_script
from bertpair.training import train


def main() -> int:
    parsed = parse_command_line(sys.argv[1:], "train")
    result = train(parsed.config, explicit=parsed.explicit, notes=parsed.notes)
    print(json.dumps(result.summary(), ensure_ascii=False))
    return 1 if result.save_failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
