"""Fine-tune a BERT on pairs of texts: `python train.py --help`."""

import json
import os
import signal
import sys


def main() -> int:
    from bertpair.console import install_signal_handlers, say
    from bertpair.settings.command_line import parse_command_line

    parsed = parse_command_line(sys.argv[1:], "train")  # before torch, whose import takes a second
    from bertpair.evaluation.evaluate import evaluate_models
    from bertpair.training.train import train

    install_signal_handlers()
    if not parsed.config.runs_training:  # --do_eval alone: the model that stands in output_dir
        config = parsed.config.model_copy(update={"model_dir": parsed.config.output_dir})
        result = evaluate_models(config, explicit=parsed.explicit, notes=parsed.notes)
        say(result.text)
        say(json.dumps(result.summary(), ensure_ascii=False))
        return 0
    trained = train(parsed.config, explicit=parsed.explicit, notes=parsed.notes)
    say(json.dumps(trained.summary(), ensure_ascii=False))
    return 1 if trained.save_failed else 0


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):  # until torch is loaded, which takes seconds
        signal.signal(each, lambda signum, frame: os._exit(128 + signum))
    from bertpair.console import run_script

    sys.exit(run_script(main))
