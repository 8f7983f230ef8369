"""What evaluate.py scores, measures, compares and finds."""

from functools import partial
from typing import Literal

from bertpair.settings.engine import EngineSettings
from bertpair.settings.fields import NamedColumns, Path, Paths, Switch, setting

_free = partial(setting, resume="free")


class EvaluateSettings(EngineSettings):
    """What evaluate.py scores."""

    model_dir: Path = _free(
        None,
        "Folder of the trained model. Not given: the output_dir of the settings file, or of config.yaml.",
        example="my_model",
    )
    data_file: Paths = _free(
        None,
        "TSV, CSV or JSONL files with the rows to score. With predict, - is the standard input. "
        "Not given: the dev file of the training.",
        example="new_answers.tsv",
    )
    keep_columns: NamedColumns = _free(
        None,
        "Columns of data_file that are written into the predictions too. Not given: none.",
        example="id question",
    )
    predictions_format: Literal["tsv", "jsonl"] = _free(
        "tsv",
        "How predict writes the predictions. tsv: predictions.tsv. jsonl: predictions.jsonl, where each line "
        "is a JSON object.",
        example="jsonl",
    )
    predict: Switch = _free(
        False,
        "Score rows that have no labels, in files of any size: write predictions and measure nothing. A run "
        "that was stopped goes on where it was. Without data_file, the rows of the test file are scored.",
        example="--data_file new_answers.tsv",
    )
    all_checkpoints: Switch = _free(
        False,
        "Evaluate each checkpoint in the folder too. One table shows all and marks the best.",
        example="",
    )
    compare: Paths = _free(
        None,
        "Folders of other trained models. They are evaluated on the same rows, and one table shows all. "
        "Not given: none.",
        example="other_model",
    )
    all_figures: Switch = _free(
        False,
        "Measure more: 95 % intervals of acc and macro_f1, AUC and average precision of each label, and how "
        "far the probabilities can be trusted.",
        example="",
    )
    report: Switch = _free(
        False,
        "Write report.html too: a page with all figures, pictures, and the worst errors with their texts.",
        example="",
    )
    fit_temperature: Switch = _free(
        False,
        "Find the temperature that suits these rows best, and keep it in the model folder, for --temperature "
        "stored.",
        example="",
    )
    fit_threshold: Switch = _free(
        False,
        "With two labels: find the threshold that gives the best f1 on these rows, and keep it in the model "
        "folder, for --threshold stored.",
        example="",
    )
    eval_output_dir: Path = _free(
        None,
        "Folder for the results. Not given: a folder under eval/ in the model folder.",
        example="results",
    )
