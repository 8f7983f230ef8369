"""The commands: `bertpair train`, `bertpair evaluate`, `bertpair serve`. The three scripts call them too.

Each reads its command line, calls one function and ends with an exit code. The settings are read before
torch is imported, which takes seconds, so that --help and errors come at once.
"""

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from bertpair.settings.config import Config
    from bertpair.settings.several import SeveralRuns

USAGE = """usage: bertpair train | evaluate | serve [--name value …]

  bertpair train      fine-tune a model on a file with pairs of texts and their labels
  bertpair evaluate   measure a trained model on a data file, or label new pairs with it
  bertpair serve      answer HTTP requests with a trained model

`bertpair train --help` shows the settings of `bertpair train`, and so on.
`bertpair --version` shows the version."""


def train(argv: Sequence[str]) -> int:
    """Fine-tune a BERT on pairs of texts."""
    from bertpair.console import install_signal_handlers, program, say
    from bertpair.settings.command_line import parse_command_line

    parsed = parse_command_line(argv, "train")
    _log(parsed.notes)
    from bertpair.evaluation.evaluate import evaluate_models
    from bertpair.training.train import train

    install_signal_handlers()
    if not parsed.config.runs_training:  # --do_eval alone: the model that stands in output_dir
        config = parsed.config.model_copy(update={"model_dir": parsed.config.output_dir})
        result = evaluate_models(config, explicit=parsed.explicit)
        say(result.text)
        say(json.dumps(result.summary(), ensure_ascii=False))
        return 0
    if parsed.several.is_asked:
        return _several(parsed.config, parsed.several)
    trained = train(parsed.config, explicit=parsed.explicit)
    if not trained.save_failed:
        folder, page = shlex.quote(trained.output_dir), Path(trained.output_dir, "report.html")
        look = f"look at {shlex.quote(str(page))}; " if page.exists() else ""  # a full disk may have cost it
        measure, serve = (f"{program(name)} --model_dir {folder}" for name in ("evaluate", "serve"))
        _log([f"the model is in {folder}; {look}next: {measure}, or: {serve}"])
    say(json.dumps(trained.summary(), ensure_ascii=False))
    return 1 if trained.save_failed else 0


def _several(config: "Config", several: "SeveralRuns") -> int:
    from bertpair.console import program, say
    from bertpair.search.folds import cross_validate
    from bertpair.search.seeds import run_seeds

    keep = several.keep_all_weights
    result: Any
    if several.sweep:
        from bertpair.search.sweep import sweep

        result = sweep(config, several.sweep, keep_all_weights=keep)
    elif several.seeds:
        result = run_seeds(config, several.seeds, keep_all_weights=keep)
    else:
        assert several.folds
        result = cross_validate(config, several.folds, keep_all_weights=keep)
    if result.best_model:
        folder = shlex.quote(result.best_model)
        _log([f"the best model is in {folder}; next: {program('serve')} --model_dir {folder}"])
    say(result.table)
    say(json.dumps(result.summary(), ensure_ascii=False))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Measure a trained model on a data file."""
    from bertpair.console import install_signal_handlers, say
    from bertpair.settings.command_line import parse_command_line

    def settings_folder(model_dir: Path) -> Path:
        from bertpair.checkpoints.checkpoint import settings_folder

        return settings_folder(model_dir)

    parsed = parse_command_line(argv, "evaluate", settings_folder)
    _log(parsed.notes)
    from bertpair.checkpoints.checkpoint import list_runs
    from bertpair.evaluation.evaluate import evaluate_models
    from bertpair.runtime import keep_freed_memory

    install_signal_handlers()
    keep_freed_memory()
    result: Any
    if list_runs(Path(str(parsed.config.model_dir))):
        from bertpair.search.compare import compare_seeds

        result = compare_seeds(parsed.config)
    else:
        result = evaluate_models(parsed.config, explicit=parsed.explicit)
    say(result.text)
    for name, folder in result.folders.items():
        say(f"{name}: files in {folder}")
    say(json.dumps(result.summary(), ensure_ascii=False))
    return 0


def serve(argv: Sequence[str]) -> int:
    """Serve a trained model over HTTP."""
    from bertpair.console import check_alone, install_signal_handlers
    from bertpair.settings.serve import parse_serve_command_line

    config, notes = parse_serve_command_line(argv)
    from bertpair.serving.server import configure_serve_logging, serve

    check_alone("a server")
    install_signal_handlers()
    configure_serve_logging()
    try:
        _log(notes)
        return serve(config)
    finally:
        logging.shutdown()  # the lines before the one that says why it ended


def _log(lines: Sequence[str]) -> None:
    for line in lines:
        logging.getLogger("bertpair").info("%s", line)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "serve": serve,
}


def main(command: str | None = None) -> NoReturn:
    """Run a command, by default the one that the command line names, and exit with its code."""
    for each in (signal.SIGINT, signal.SIGTERM):  # until torch is loaded
        signal.signal(each, lambda signum, frame: os._exit(128 + signum))
    from bertpair.console import run_script

    argv = sys.argv[1:]
    sys.exit(run_script(lambda: COMMANDS[command](argv) if command else _named(argv)))


def _named(argv: Sequence[str]) -> int:
    from bertpair import __version__
    from bertpair.console import say
    from bertpair.errors import ConfigError, near_misses, show

    first = argv[0] if argv else "--help"
    if first in COMMANDS:
        return COMMANDS[first](argv[1:])
    if first in ("--help", "-h", "--version"):
        say(f"bertpair {__version__}" if first == "--version" else USAGE)
        return 0
    near = near_misses(first, COMMANDS)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"expected a command: train, evaluate or serve; found {show(first)}{hint}")


if __name__ == "__main__":
    main()
