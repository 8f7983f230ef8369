import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss

from bertpair import CheckpointError, Config, ConfigError, DataError, PairClassifier, evaluate, train
from bertpair.checkpoints.atomic import Staging
from bertpair.checkpoints.derived import derive
from bertpair.checkpoints.manifest import verify_folder
from bertpair.evaluation.evaluate import EvaluationResult, evaluate_models
from bertpair.evaluation.measure import measure
from bertpair.settings.command_line import parse_command_line

OLD = Path(__file__).parents[1] / "written_by_0_1_0"
LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dev(write_tsv: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(2)
    words = "the cat sat mat good bad food 中文".split()
    rows = [(i, *(" ".join(rng.choice(words, 4)) for _ in "ab"), rng.choice(LABELS)) for i in range(40)]
    return write_tsv("some.tsv", rows, header=("index", "sentence1", "sentence2", "label"))


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def run(*argv: object) -> EvaluationResult:
    parsed = parse_command_line([str(word) for word in argv], "evaluate")
    return evaluate_models(parsed.config, explicit=parsed.explicit)


def test_figures_and_files_of_one_model(hf_folder: Path, dev: Path) -> None:
    result = evaluate(hf_folder, dev)
    gold = [row[3] for row in rows_of(dev)[1:]]
    answers = PairClassifier.from_pretrained(hf_folder).predict([(r[1], r[2]) for r in rows_of(dev)[1:]])
    predicted = [answer.label for answer in answers]
    assert result.metrics["acc"] == pytest.approx(accuracy_score(gold, predicted))
    assert result.metrics["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro"))
    table = [[answer.probabilities[label] for label in LABELS] for answer in answers]
    assert result.metrics["loss"] == pytest.approx(log_loss(gold, table, labels=LABELS), rel=1e-6)
    folder = Path(result.folders[str(hf_folder)])
    assert re.fullmatch(r"some\.tsv-[0-9a-f]{8}", folder.name) and folder.parent == hf_folder / "eval"
    assert {path.name for path in folder.iterdir()} == {
        "confusion_matrix.png",
        "eval_results.json",
        "eval_results.txt",
        "errors.tsv",
        "figures.json",
        "input.json",
        "predictions.tsv",
    }
    wrong = [row for row in rows_of(folder / "predictions.tsv")[1:] if row[1] != row[2]]
    listed = rows_of(folder / "errors.tsv")[1:]
    assert sorted(row[1:5] for row in listed) == sorted(row[:4] for row in wrong)
    assert [row[4] for row in listed] == sorted((row[4] for row in listed), reverse=True)
    said = json.loads((folder / "input.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(dev.read_bytes()).hexdigest()
    assert said["data"] == [{"path": str(dev.resolve()), "sha256": digest, "rows": 40}]
    assert said["model"] == str(hf_folder.resolve()) and said["predict"] is False
    assert json.loads((folder / "eval_results.json").read_text()) == pytest.approx(result.metrics)
    lines = (folder / "eval_results.txt").read_text().splitlines()
    assert lines == sorted(lines) and f"acc = {result.metrics['acc']}" in lines
    found = rows_of(folder / "predictions.tsv")
    assert [row[:3] for row in found[1:]] == [
        [str(i + 2), g, p] for i, (g, p) in enumerate(zip(gold, predicted, strict=True))
    ]


def test_all_checkpoints_in_numeric_order_each_kept(hf_folder: Path, dev: Path) -> None:
    for step in (1000, 200, 30):
        hf_folder.joinpath(f"checkpoint-{step}").mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            hf_folder.joinpath(f"checkpoint-{step}", name).write_bytes((hf_folder / name).read_bytes())
    result = run("--model_dir", hf_folder, "--data_file", dev, "--all_checkpoints")
    assert list(result.by_model) == ["checkpoint-30", "checkpoint-200", "checkpoint-1000", "final"]
    order = [result.text.index(name) for name in result.by_model]
    assert order == sorted(order)
    for name in list(result.by_model)[:3]:
        folder = Path(result.folders[name])
        assert folder.parent == hf_folder / "eval" and folder.name.startswith(f"{name}-some.tsv-")
        assert (folder / "eval_results.txt").is_file()
    assert len(set(result.folders.values())) == 4


def test_what_was_derived_from_a_model_is_not_evaluated(tmp_path: Path) -> None:
    def make(staging: Staging) -> dict[str, object]:
        for path in Path("finished").iterdir():  # another model, to all appearances
            if path.is_file() and path.name != "manifest.json":
                staging.write_bytes(path.name, path.read_bytes())
        return {}

    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    shutil.copytree("stopped/checkpoint-16", "finished/checkpoint-16", dirs_exist_ok=True)
    words = ("--model_dir", "finished", "--data_file", "dev.tsv", "--all_checkpoints")
    before = run(*words)
    parts = [derive(Path(folder), "part", {}, make)[0] for folder in ("finished", "finished/checkpoint-16")]
    digests = [verify_folder(part) for part in parts]
    after = run(*words)
    assert (after.by_model, after.folders, after.text) == (before.by_model, before.folders, before.text)
    assert [verify_folder(part) for part in parts] == digests
    with pytest.raises(ConfigError, match="is a model folder; name another one"):
        run("--model_dir", "finished", "--data_file", "dev.tsv", "--output_dir", parts[0])


def test_predicting_a_file_without_labels(hf_folder: Path, dev: Path) -> None:
    bare = Path("bare.tsv")
    bare.write_text("".join("\t".join(row[:3]) + "\n" for row in rows_of(dev)), encoding="utf-8")
    labelled = evaluate(hf_folder, dev)
    result = run("--model_dir", hf_folder, "--data_file", bare, "--predict", "--output_dir", "here")
    assert result.metrics == {} and result.num_rows == 40
    assert {path.name for path in Path("here").iterdir()} == {"predictions.tsv", "input.json"}
    without = rows_of(Path("here/predictions.tsv"))
    with_gold = rows_of(Path(labelled.folders[str(hf_folder)]) / "predictions.tsv")
    assert without == [[row[0], *row[2:]] for row in with_gold]


def test_a_presets_test_file_has_its_own_columns(hf_folder: Path) -> None:
    Path("test.tsv").write_text("index\tsentence1\tsentence2\n0\tthe cat\tsat\n1\tgood\tbad food\n")
    result = run("--model_dir", hf_folder, "--data_file", "test.tsv", "--predict", "--task_name", "rte")
    assert result.num_rows == 2


def test_two_models_side_by_side_whatever_their_label_order(hf_folder: Path, dev: Path) -> None:
    other = Path("other")
    other.mkdir()
    for path in hf_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "positive", "1": "neutral", "2": "negative"}
    config["label2id"] = {"positive": 0, "neutral": 1, "negative": 2}
    (other / "config.json").write_text(json.dumps(config))
    result = run("--model_dir", hf_folder, "--data_file", dev, "--compare", "other")
    mine, theirs = result.by_model[str(hf_folder)], result.by_model["other"]
    assert result.metrics == mine
    gold = [row[3] for row in rows_of(dev)[1:]]
    swap = {"positive": "negative", "negative": "positive", "neutral": "neutral"}
    predicted = [row[2] for row in rows_of(Path(result.folders[str(hf_folder)]) / "predictions.tsv")[1:]]
    assert theirs["acc"] == pytest.approx(accuracy_score(gold, [swap[label] for label in predicted]))


def test_refusals(hf_folder: Path, dev: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate("./nowhere", dev)
    with pytest.raises(DataError, match=r"none\.tsv"):
        evaluate(hf_folder, "none.tsv")
    with pytest.raises(ConfigError, match="trained for"):
        run("--model_dir", hf_folder, "--data_file", dev, "--labels", "good", "bad")
    with pytest.raises(CheckpointError, match="checkpoint"):
        run("--model_dir", hf_folder, "--data_file", dev, "--all_checkpoints")
    Path("wrong.tsv").write_text(dev.read_text(encoding="utf-8").replace("neutral", "mixed"))
    with pytest.raises(DataError, match="mixed"):
        evaluate(hf_folder, "wrong.tsv")


def test_measure_of_a_regression() -> None:
    rng = np.random.default_rng(0)
    gold = rng.normal(size=50).astype(np.float32)
    logits = (gold + rng.normal(size=50)).astype(np.float32)[:, None]
    found = measure(logits, gold, None, None)
    assert found["loss"] == pytest.approx(np.mean((logits[:, 0].astype(float) - gold) ** 2))
    assert found["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], gold)[0, 1], rel=1e-6)


@pytest.mark.slow
def test_a_checkpoint_that_was_evaluated_is_still_whole(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    before = {path.name for path in Path("stopped/checkpoint-16").iterdir()}
    result = evaluate("stopped/checkpoint-16", "dev.tsv")
    assert Path(result.folders["stopped/checkpoint-16"]).parent == tmp_path / "stopped" / "eval"
    Path("stopped/checkpoint-16/notes.txt").write_text("mine")  # a stray file is no damage either
    assert {path.name for path in Path("stopped/checkpoint-16").iterdir()} == {*before, "notes.txt"}
    for name in ("added_tokens.json", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.model"):
        Path("stopped/checkpoint-16", name).write_text('{"<x>": 1}')
    assert evaluate("stopped/checkpoint-16", "dev.tsv").metrics == result.metrics
    config = Config(output_dir="stopped", resume="auto")
    assert train(config, explicit={"output_dir", "resume"}).global_step == 24


def test_results_never_go_into_a_model_folder(tmp_path: Path) -> None:
    """Its manifest names the results of its training: others in their place would be damage."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    base = {"model_name_or_path": "base", "from_scratch": True, "train_file": ["train.tsv"], "amp": "off"}
    train(Config(**base, output_dir="out", dev_file=["dev.tsv"], max_steps=2, max_seq_length=16))
    for place in ("out", "out/checkpoint-2", "finished"):
        for model in ("out", "out/checkpoint-2"):
            with pytest.raises(ConfigError, match="is a model folder; name another one"):
                run("--model_dir", model, "--data_file", "dev.tsv", "--predict", "--output_dir", place)
    shutil.copytree("stopped", "half")  # a run without a final model
    with pytest.raises(ConfigError, match="half/checkpoint-16 is a model folder"):
        run("--model_dir", "stopped", "--data_file", "dev.tsv", "--all_checkpoints", "--output_dir", "half")
    assert verify_folder(Path("out")) and verify_folder(Path("half/checkpoint-16"))
    assert list(evaluate("out", "dev.tsv").folders)


@pytest.mark.slow
def test_every_model_has_a_row_of_its_own_in_the_table(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    shutil.copytree("finished", "final")
    shutil.copytree("finished", "whole")
    shutil.copytree("stopped/checkpoint-16", "whole/checkpoint-16")
    words = ["--data_file", "dev.tsv", "--compare", "final", "whole", "whole"]
    result = run("--model_dir", "whole", "--all_checkpoints", *words)
    assert list(result.by_model) == ["checkpoint-16", "final", "final (2)", "whole", "whole (2)"]
    assert all(name in result.text for name in result.by_model)
    result = run("--model_dir", "whole", "--data_file", "dev.tsv", "--compare", "whole")
    assert list(result.folders) == ["whole", "whole (2)"] and len(set(result.folders.values())) == 2


def test_files_of_one_name_do_not_meet(hf_folder: Path, dev: Path) -> None:
    for folder in ("a", "b"):
        Path(folder).mkdir()
        shutil.copy(dev, f"{folder}/dev.tsv")
    Path("b/dev.tsv").write_text("".join(dev.read_text(encoding="utf-8").splitlines(keepends=True)[:20]))
    found = [
        run("--model_dir", hf_folder, "--data_file", *words)
        for words in (["a/dev.tsv"], ["b/dev.tsv"], ["a/dev.tsv", "--predict"], ["a/dev.tsv", "b/dev.tsv"])
    ]
    folders = [Path(each.folders[str(hf_folder)]) for each in found]
    assert len(set(folders)) == 4 and folders[2].name.endswith("-predict")
    both = rows_of(folders[3] / "predictions.tsv")
    assert both[0][:2] == ["file", "line"]
    assert [row[:2] for row in both[1:]] == [["a/dev.tsv", str(i + 2)] for i in range(40)] + [
        ["b/dev.tsv", str(i + 2)] for i in range(19)
    ]
    again = run("--model_dir", hf_folder, "--data_file", "a/dev.tsv")
    assert Path(again.folders[str(hf_folder)]) == folders[0]


def test_a_file_that_has_changed_has_results_of_its_own(hf_folder: Path, dev: Path) -> None:
    (first,) = evaluate(hf_folder, dev).folders.values()
    predictions = Path(first, "predictions.tsv").read_bytes()
    dev.write_text(dev.read_text(encoding="utf-8").replace("cat", "mat"), encoding="utf-8")
    (second,) = evaluate(hf_folder, dev).folders.values()
    assert first != second and Path(first, "predictions.tsv").read_bytes() == predictions
    assert list(evaluate(hf_folder, dev).folders.values()) == [second]


def test_nothing_of_an_earlier_evaluation_stands_beside_a_new_one(hf_folder: Path, dev: Path) -> None:
    Path("here").mkdir()
    Path("here/notes.txt").write_text("mine")
    run("--model_dir", hf_folder, "--data_file", dev, "--output_dir", "here")
    run("--model_dir", hf_folder, "--data_file", dev, "--predict", "--output_dir", "here")
    assert {path.name for path in Path("here").iterdir()} == {"notes.txt", "predictions.tsv", "input.json"}
    shutil.copytree(hf_folder, "other")
    run("--model_dir", hf_folder, "--data_file", dev, "--compare", "other", "--output_dir", "here")
    Path("here/checkpoint-mine").mkdir()
    (compared,) = Path("here").glob("compare-*")
    (compared / "mine.txt").write_text("mine")
    run("--model_dir", hf_folder, "--data_file", dev, "--predict", "--output_dir", "here")
    left = {str(path.relative_to("here")) for path in Path("here").rglob("*") if path != compared}
    assert left == {
        "notes.txt",
        "predictions.tsv",
        "input.json",
        "checkpoint-mine",
        f"{compared.name}/mine.txt",
    }


def test_the_results_of_some_rows_stand_beside_those_of_all(hf_folder: Path, dev: Path) -> None:
    (all_rows,) = evaluate(hf_folder, dev).folders.values()
    some = run("--model_dir", hf_folder, "--data_file", dev, "--max_eval_samples", "7")
    (folder,) = some.folders.values()
    assert folder == f"{all_rows}-first7" and some.num_rows == 7
    assert len(rows_of(Path(all_rows, "predictions.tsv"))) == 41


def test_a_folder_to_compare_with_that_is_none_is_found_before_the_data_are_read(
    hf_folder: Path, dev: Path
) -> None:
    Path("empty").mkdir()
    for wrong, message in (
        ("empty", "no such file; a model folder holds one"),
        (str(dev), "a file; expected a model folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run("--model_dir", hf_folder, "--data_file", "nowhere.tsv", "--compare", wrong)
        with pytest.raises(CheckpointError, match=message):
            run("--model_dir", wrong, "--data_file", dev)


def test_models_of_one_name_are_compared_in_places_of_their_own(hf_folder: Path, dev: Path) -> None:
    for name in ("x/m", "y/m"):
        shutil.copytree(hf_folder, name)
    result = run("--model_dir", hf_folder, "--data_file", dev, "--compare", "x/m", "y/m")
    assert len(set(result.folders.values())) == 3
    for name in ("x/m", "y/m"):
        said = json.loads((Path(result.folders[name]) / "input.json").read_text())
        assert said["model"] == str(Path(name).resolve())


@pytest.mark.slow
def test_a_new_run_takes_the_results_of_the_old_ones_model_away(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    old = Path(evaluate("finished", "dev.tsv").folders["finished"])
    assert old.is_dir()
    base = {"model_name_or_path": "base", "from_scratch": True, "train_file": ["train.tsv"], "amp": "off"}
    train(Config(**base, output_dir="finished", overwrite_output_dir=True, max_seq_length=16, max_steps=1))
    assert not old.exists()
    assert Path(evaluate("finished", "dev.tsv").folders["finished"]) == old


@pytest.mark.slow
def test_limits_of_the_training_end_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    with caplog.at_level("INFO", "bertpair"):
        train(
            Config(
                **{"model_name_or_path": "base", "from_scratch": True, "output_dir": "out", "amp": "off"},
                **{"train_file": ["train.tsv"], "dev_file": ["dev.tsv"], "max_seq_length": 16},
                **{"max_steps": 1, "max_train_samples": 30, "max_eval_samples": 5, "on_bad_row": "skip"},
            )
        )
    assert "train.tsv: only the first 30 of 40 rows" in caplog.text
    assert "dev.tsv: only the first 5 of 16 rows" in caplog.text
    assert evaluate("out").num_rows == evaluate("out", "dev.tsv").num_rows == 16
    assert run("--model_dir", "out", "--data_file", "dev.tsv", "--predict").num_rows == 16
    Path("bad.tsv").write_text(Path("dev.tsv").read_text(encoding="utf-8") + "9\tonly two\n")
    with pytest.raises(DataError, match="bad.tsv:18"):
        evaluate("out", "bad.tsv")
    caplog.clear()
    with caplog.at_level("INFO", "bertpair"):
        limited = run("--model_dir", "out", "--max_eval_samples", "7")
    assert limited.num_rows == 7 and "dev.tsv: only the first 7 of 16 rows" in caplog.text


def test_a_model_of_pairs_is_not_scored_on_single_texts(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="text_b_column: found None; finished takes pairs"):
        run("--model_dir", "finished", "--data_file", "dev.tsv", "--text_b_column", "null")
