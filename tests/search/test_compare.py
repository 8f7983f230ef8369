"""Two folders of several seeds, compared by the predictions that they kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny_bert
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, matthews_corrcoef

from bertpair import CheckpointError, Config, ConfigError, run_seeds
from bertpair.__main__ import evaluate
from bertpair.evaluation.evaluate import evaluate_models
from bertpair.search.compare import compare_seeds

pytestmark = [pytest.mark.usefixtures("fresh_process"), pytest.mark.slow]
ORDER = ["wrong", "partly", "right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three seeds in `one`, of four in `two`, and of two on other dev rows in `three`."""
    folder, rng = tmp_path_factory.mktemp("seeds"), np.random.default_rng(4)
    lines = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(90):
        a, b = (" ".join(rng.choice("the cat sat mat good bad food".split(), 3)) for _ in "ab")
        lines.append(f"{i}\t{a}\t{b}\t{ORDER[('good' in a) + ('cat' in b)]}")
    for name, rows in ("train", lines[1:50]), ("dev", lines[50:]), ("other", lines[51:]):
        (folder / f"{name}.tsv").write_text("\n".join([lines[0], *rows]) + "\n")
    recipe = Config(
        model_name_or_path=str(write_tiny_bert(folder / "tiny")),
        from_scratch=True,
        train_file=[str(folder / "train.tsv")],
        dev_file=[str(folder / "dev.tsv")],
        label_order=ORDER,
        max_seq_length=24,
        learning_rate=5e-3,
        max_steps=30,
        save_steps=0,
        amp="off",
        num_threads=1,
        output_dir=str(folder / "one"),
    )
    run_seeds(recipe, 3)
    changes = {"output_dir": str(folder / "two"), "learning_rate": 1e-2}
    run_seeds(recipe.model_copy(update=changes), 4)
    changes = {"output_dir": str(folder / "three"), "dev_file": [str(folder / "other.tsv")]}
    run_seeds(recipe.model_copy(update=changes), 2)
    return folder


def ask(folder: Path, first: str = "one", *others: str, **changes: object) -> Config:
    compared = [str(folder / name) for name in others] or None
    values = {"model_dir": str(folder / first), "compare": compared, "label_order": ORDER, **changes}
    return Config(**values)  # type: ignore[arg-type]


def kept(run: Path) -> tuple[list[str], list[str]]:
    """Gold and predicted labels, from a run's predictions.tsv."""
    rows = [line.split("\t") for line in (run / "predictions.tsv").read_text().splitlines()[1:]]
    return [row[1] for row in rows], [row[2] for row in rows]


def test_the_test_is_scipys_on_figures_of_scikit_learn(folder: Path) -> None:
    result = compare_seeds(ask(folder, "one", "two"))
    found = result.comparisons[str(folder / "two")]
    assert set(found) == {"acc", "macro_f1", "mcc", "qwk"}
    measures = {
        "acc": accuracy_score,
        "macro_f1": lambda gold, said: f1_score(gold, said, average="macro", zero_division=0),
        "mcc": matthews_corrcoef,
        "qwk": lambda gold, said: cohen_kappa_score(gold, said, labels=ORDER, weights="quadratic"),
    }
    num_tested = 0
    for name, measure in measures.items():
        ours, theirs = (
            [measure(*kept(folder / which / f"seed-{seed}")) for seed in (42, 43, 44)]
            for which in ("one", "two")
        )
        if len({a - b for a, b in zip(ours, theirs, strict=True)}) == 1:
            assert found[name].difference.low == found[name].difference.high  # scipy gives NaN
            continue
        wanted = ttest_rel(ours, theirs)
        low, high = wanted.confidence_interval(0.95)
        assert found[name].p_value == pytest.approx(wanted.pvalue)
        assert found[name].difference == pytest.approx((np.subtract(ours, theirs).mean(), low, high))
        num_tested += 1
    assert num_tested >= 2


def test_figures_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_dir", str(folder / "one"), "--compare", str(folder / "two"), "--report"]
    assert evaluate(words) == 0
    text, last = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert text.startswith("3 seeds, seed-42 to seed-44\n")
    said = json.loads(last)[str(folder / "two")]
    place = Path(text.rsplit("files in ", 1)[1])
    assert place.parent == folder / "one" / "eval" and {each.name for each in place.iterdir()} == {
        "comparison.json",
        "report.html",
    }
    assert json.loads((place / "comparison.json").read_text()) == said
    assert set(said["acc"]) == {"value", "low", "high", "p_value"}
    assert b"The paired t test over seeds" in (place / "report.html").read_bytes()


def test_other_rows_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="three was not measured on the same dev rows as .*one"):
        compare_seeds(ask(folder, "one", "three"))


def test_a_folder_that_does_not_say_its_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "old")
    said = json.loads((tmp_path / "old" / "runs.json").read_text())
    del said["dev_data"]
    (tmp_path / "old" / "runs.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="does not say on which rows its runs were measured"):
        compare_seeds(ask(folder, "one", compare=[str(tmp_path / "old")]))


def test_too_few_seeds_in_common_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "two", tmp_path / "few")
    said = json.loads((tmp_path / "few" / "runs.json").read_text())
    said["runs"] = {name: said["runs"][name] for name in ("seed-44", "seed-45")}
    (tmp_path / "few" / "runs.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="have 1 seeds in common; 2 are needed"):
        compare_seeds(ask(folder, "one", compare=[str(tmp_path / "few")]))


def test_a_damaged_predictions_file_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "two", tmp_path / "damaged")
    (tmp_path / "damaged" / "seed-43" / "predictions.tsv").write_text("line\tgold\n1\ta\n")
    with pytest.raises(CheckpointError, match="seed-43/predictions.tsv: cannot be read"):
        compare_seeds(ask(folder, "one", compare=[str(tmp_path / "damaged")]))


def test_one_folder_of_seeds_alone_says_what_to_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds several runs: name the model of one, such as .*seed-42"):
        compare_seeds(ask(folder))
    with pytest.raises(CheckpointError, match="holds several runs; name the model of one, such as .*seed-42"):
        evaluate_models(ask(folder))
