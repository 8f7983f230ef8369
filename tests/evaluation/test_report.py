"""The bytes of the evaluation files, and the tables for the terminal."""

import csv
import json

import numpy as np
import pytest

from bertpair.data.dataset import Pairs
from bertpair.evaluation.classifier import Prediction
from bertpair.evaluation.figures import class_figures
from bertpair.evaluation.metrics import confusion_matrix
from bertpair.evaluation.report import (
    class_table,
    comparison_table,
    confusion_table,
    display_width,
    figure_lines,
    format_errors,
    format_eval_results,
    format_predictions,
    group_table,
    significance_table,
    text_table,
)
from bertpair.evaluation.significance import Comparison, Difference


def test_eval_results_are_sorted_lines_and_flat_json() -> None:
    files = format_eval_results({"n": np.int64(3), "acc": np.float64(0.1), "loss": 0.25, "split": "开发集"})
    assert files == {
        "eval_results.txt": "acc = 0.1\nloss = 0.25\nn = 3\nsplit = 开发集\n".encode(),
        "eval_results.json": files["eval_results.json"],
    }
    assert json.loads(files["eval_results.json"]) == {"acc": 0.1, "loss": 0.25, "n": 3, "split": "开发集"}
    assert list(json.loads(files["eval_results.json"])) == ["acc", "loss", "n", "split"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_loss_that_is_not_finite_is_null_in_json(value: float) -> None:
    files = format_eval_results({"loss": value})
    assert json.loads(files["eval_results.json"], parse_constant=pytest.fail) == {"loss": None}
    assert files["eval_results.txt"].decode() == f"loss = {float(value)}\n"


def predicted(label: str | None, score: float, *probabilities: float, cut: bool = False) -> Prediction:
    return Prediction(label, score, dict(zip(("错", "对"), probabilities, strict=False)), cut, num_tokens=8)


def some_pairs(lines: list[int], gold: list[str] | None = None, files: tuple[str, ...] = ("x.tsv",)) -> Pairs:
    """Rows in these lines of the first file, each with a tab in its second text."""
    n = len(lines)
    places = np.zeros(n, np.int32), np.array(lines, np.int32)
    texts = [f"a{i}" for i in range(n)], [f"b\t{i}" for i in range(n)]
    return Pairs(*texts, gold, files, *places, None)


def test_predictions_have_a_row_each_in_the_order_given() -> None:
    predictions = [predicted("对", 0.75, 0.25, 0.75, cut=True), predicted("对", 0.5, 0.5, 0.5)]
    pairs = some_pairs([2, 5], ["对", "错"])
    head, first, second = (
        "line\tgold\tpredicted\tscore\ttruncated\tprob_错\tprob_对",
        "2\t对\t对\t0.750000\t1\t0.250000\t0.750000",
        "5\t错\t对\t0.500000\t0\t0.500000\t0.500000",
    )
    table = format_predictions(predictions, pairs, ("错", "对"))
    assert table.decode() == f"{head}\n{first}\n{second}\n"
    table = format_predictions(predictions, pairs, ("错", "对"), with_texts=True)
    texts = "\ttext_a\ttext_b", "\ta0\tb\\t0", "\ta1\tb\\t1"
    assert table.decode() == f"{head}{texts[0]}\n{first}{texts[1]}\n{second}{texts[2]}\n"


def test_predictions_without_gold_leave_the_column_out() -> None:
    table = format_predictions([predicted("a", 1.0)], some_pairs([1], files=("x.tsv", "y.tsv")))
    assert table.decode() == "file\tline\tpredicted\tscore\ttruncated\nx.tsv\t1\ta\t1\t0\n"


def test_predictions_of_a_regression_are_values() -> None:
    values = [predicted(None, float(value)) for value in np.array([4.25, -1e-7], dtype=np.float32)]
    table = format_predictions(values, some_pairs([1, 2], ["4.0", "1"]))
    assert table.decode().splitlines()[1:] == ["1\t4.0\t4.25\t4.25\t0", "2\t1\t-1e-07\t-1e-07\t0"]


def test_no_predictions_are_a_header_alone() -> None:
    table = format_predictions([], some_pairs([], []), ("a", "b"))
    assert table == b"line\tgold\tpredicted\tscore\ttruncated\tprob_a\tprob_b\n"


def test_tabs_and_line_breaks_in_labels_cannot_break_a_row() -> None:
    label = "a\tb\r\nc"
    prediction = Prediction(label, 1.0, {label: 1.0}, truncated=False, num_tokens=8)
    pairs = some_pairs([1], [label])
    rows = [
        list(csv.reader(table.decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
        for table in (
            format_predictions([prediction], pairs, [label]),
            format_errors([prediction], pairs, [0]),
        )
    ]
    assert [[len(row) for row in each] for each in rows] == [[6, 6], [8, 8]]
    assert rows[0][1][1] == "a\\tb\\r\\nc" and rows[0][0][5] == "prob_a\\tb\\r\\nc"
    assert rows[1][1][2] == "a\\tb\\r\\nc" and rows[1][1][7] == "b\\t0"


def test_columns_of_unequal_length_are_a_defect() -> None:
    with pytest.raises(ValueError, match="shorter"):
        format_predictions([predicted("a", 1.0)], some_pairs([1, 2]))


def test_errors_say_where_and_how_sure() -> None:
    predictions = [predicted("对", 0.75, 0.25, 0.75), predicted("对", 0.5, 0.5, 0.5)]
    table = format_errors(predictions, some_pairs([2, 5], ["对", "错"], ("d/x.tsv",)), [1])
    assert table.decode().splitlines() == [
        "file\tline\tgold\tpredicted\tscore\tprob_gold\ttext_a\ttext_b",
        "d/x.tsv\t5\t错\t对\t0.500000\t0.500000\ta1\tb\\t1",
    ]
    table = format_errors([predicted(None, 2.5)], some_pairs([7], ["4"]), [0])
    assert table.decode().splitlines()[1] == "x.tsv\t7\t4\t2.5\ta0\tb\\t0"


def test_display_width_counts_terminal_columns() -> None:
    assert display_width("abc") == 3
    assert display_width("正确\uff0c") == 6  # wide letters and a full-width comma
    assert display_width("e\u0301\u200d") == 1  # a combining accent and a joiner
    assert display_width("\uff76") == 1  # half-width katakana


def test_tables_align_by_display_width() -> None:
    table = text_table(
        ["名", "value", "n"], [["正确", 0.5, 12345], ["right", None, 1], ["e\u0301", 0.25, "x"]]
    )
    assert table.split("\n") == [
        "名      value       n",
        "正确   0.5000  12,345",
        "right       -       1",
        "e\u0301      0.2500       x",
    ]
    assert len({display_width(line) for line in table.split("\n")}) == 1


def test_class_table_shows_every_class() -> None:
    classes = class_figures(confusion_matrix([0, 0, 1, 1], [0, 1, 1, 1], 3), ["对", "wrong", "half"])
    assert class_table(classes).split("\n") == [
        "class  precision  recall      f1  rows",
        "对        1.0000  0.5000  0.6667     2",
        "wrong     0.6667  1.0000  0.8000     2",
        "half      0.0000  0.0000  0.0000     0",
    ]


def test_figures_come_with_their_intervals() -> None:
    figures = {"acc": 0.9, "acc_low": 0.87654, "acc_high": 0.93, "n": 20, "positive_label": "a\tb"}
    assert figure_lines(figures).split("\n") == [
        "acc = 0.9 (95 % interval 0.8765 to 0.9300)",
        "n = 20",
        "positive_label = a\\tb",
    ]


def test_a_table_of_many_groups_is_cut() -> None:
    groups = [{"group": f"q{i}", "rows": 3, "acc": 1 / 3, "macro_f1": None} for i in range(30)]
    lines = group_table(groups).split("\n")
    assert lines[0].split() == ["group", "rows", "acc", "macro_f1"] and len(lines) == 22
    assert lines[1].split() == ["q0", "3", "0.3333", "-"]
    assert lines[-1] == "and 10 more groups, in figures.json"


def test_differences_are_a_line_for_each_figure() -> None:
    differences = {"acc": Difference(0.1, -0.02, 0.22), "macro_f1": Difference(-0.2, -0.3, -0.1)}
    comparison = Comparison(won=12, lost=2, p_value=1e-9, differences=differences)
    assert significance_table({"other": comparison}).split("\n") == [
        "against    figure  difference       95 % interval  rows won  rows lost        p",
        "other         acc     +0.1000  -0.0200 to +0.2200        12          2  <0.0001",
        "other    macro_f1     -0.2000  -0.3000 to -0.1000        12          2  <0.0001",
    ]


def test_confusion_table_has_gold_down_and_predicted_across() -> None:
    matrix = confusion_matrix([0, 0, 1], [1, 1, 1], 2)
    assert confusion_table(["no", "yes"], matrix).split("\n") == [
        "gold \\ predicted  no  yes",
        "no                 0    2",
        "yes                0    1",
    ]


def test_confusion_table_heads_many_columns_with_ids() -> None:
    labels = [f"a long class name {k}" for k in range(12)]
    first, second, *_ = confusion_table(labels, np.eye(12, dtype=int)).split("\n")
    assert first.split() == ["gold", "\\", "predicted", *map(str, range(12))]
    assert second.startswith("0 a long class name 0 ")


def test_comparison_marks_the_best_and_keeps_the_order() -> None:
    results = {
        "checkpoint-2": {"acc": 0.5, "loss": 0.75, "n": 1500},
        "checkpoint-10": {"acc": 0.75, "loss": 1.0, "n": 1500},
        "final": {"acc": 0.75, "loss": 0.875},
    }
    assert comparison_table(results, "acc").split("\n") == [
        "                    acc    loss      n",
        "checkpoint-2     0.5000  0.7500  1,500",
        "checkpoint-10 *  0.7500  1.0000  1,500",
        "final            0.7500  0.8750      -",
    ]
    assert "checkpoint-2 *" in comparison_table(results, "loss")
    assert "*" not in comparison_table(results)
    assert "*" not in comparison_table(results, "pearson")
