"""Whatever a user can get wrong: one clear error before anything is written."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bertpair import BertpairError, train
from bertpair.settings.command_line import parse_command_line

ROOT = Path(__file__).parent.parent
HEADER = "index\tsentence1\tsentence2\tlabel\n"
ROWS = "".join(f"{i}\tthe cat\tsat {i}\t{label}\n" for i, label in enumerate(["good", "bad"] * 6))


pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def flags(tiny_config_folder: Path) -> list[str]:
    Path("data").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        Path("data", name).write_text(HEADER + ROWS)
    named = "--data_dir data --from_scratch --output_dir out --max_seq_length 16 --max_steps 1 --amp off"
    return [*named.split(), "--model_name_or_path", str(tiny_config_folder)]


def fault(flags: list[str], *more: str) -> str:
    """The message with which train.py refuses; nothing may have been written."""
    with pytest.raises(BertpairError) as caught:
        parsed = parse_command_line([*flags, *more], "train")
        train(parsed.config, explicit=parsed.explicit)
    assert not Path("out").exists()
    return str(caught.value)


def test_the_flags_alone_are_fine(flags: list[str]) -> None:
    parsed = parse_command_line(flags, "train")
    assert train(parsed.config, explicit=parsed.explicit).global_step == 1


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ("--learing_rate 1", "learning_rate"),
        ("--max_steps many", "many"),
        ("--weight_decay -1", "weight_decay"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size"),
        ("--max_seq_length 65", "64 positions"),
        ("--amp fp16 --device cpu", "fp16"),
        ("--task_name mmli", "mnli"),
        ("--model_type xlnet", "tiny-bert is a bert model"),
        ("--text_a_column sentence9", "sentence9"),
        ("--label_column 9", "9"),
        ("--dev_file nowhere.tsv", "nowhere.tsv"),
        ("--train_file nowhere.tsv", "nowhere.tsv"),
        ("--train_file data", "folder"),
        ("--labels good awful", "bad"),
        ("--model_name_or_path ./nowhere", "nowhere"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--class_weights balanced --problem_type regression", "class"),
        ("--resume nowhere", "nowhere"),
    ],
)
def test_settings(flags: list[str], more: str, found: str) -> None:
    assert found in fault(flags, *more.split())


def test_all_faults_come_at_once(flags: list[str]) -> None:
    message = fault(flags, *"--learing_rate 1 --max_steps x --weight_decay -1".split())
    assert all(name in message for name in ("learing_rate", "max_steps", "weight_decay"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (HEADER.encode(), "train.tsv"),
        ((HEADER + ROWS + "12\tonly two\n").encode(), "train.tsv:14"),
        ((HEADER + ROWS + "12\ta\tb\t\n").encode(), "train.tsv:14"),
        ((HEADER + ROWS + "12\ta\t \tgood\n").encode(), "train.tsv:14"),
        ((HEADER + ROWS + "12\ta\0\tb\tgood\n").encode(), "NUL"),
        ((HEADER + ROWS).encode() + b"12\t\xff\xfe\tb\tgood\n", "UTF-8"),
        ((HEADER + "0\ta\tb\tgood\n" * 5).encode(), "good"),
        ((HEADER + "".join(f"{i}\ta\tb\t{i / 7}\n" for i in range(30))).encode(), "problem_type"),
    ],
    ids="empty header short nolabel notext nul bytes oneclass floats".split(),
)
def test_training_files(flags: list[str], content: bytes, found: str) -> None:
    Path("data/train.tsv").write_bytes(content)
    assert found in fault(flags)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        (
            "train.csv",
            HEADER.replace("\t", ",").encode() + b"0,a,b,good\n1,a\n",
            "train.csv:3: expected at le",
        ),
        ("train.csv", HEADER.replace("\t", ";").encode() + b"0;a;b;good\n", "a semicolon between them"),
        (
            "train.jsonl",
            b'{"index": 0, "sentence1": "a", "sentence2": "b", "label": []}\n',
            "train.jsonl:1: label",
        ),
        ("train.jsonl", b'[{"index": 0}]', "jq -c '.[]'"),
        (
            "train.tsv.gz",
            gzip.compress((HEADER + ROWS).encode())[:-9],
            "train.tsv.gz: a gzip file that is dam",
        ),
        ("train.tsv.gz", gzip.compress((HEADER + ROWS + "12\ta\n").encode()), "train.tsv.gz:14: expected at"),
    ],
)
def test_training_files_of_other_formats(flags: list[str], name: str, content: bytes, found: str) -> None:
    Path(name).write_bytes(content)
    assert found in fault(flags, "--train_file", name)


def test_an_unknown_label_in_dev(flags: list[str]) -> None:
    Path("data/dev.tsv").write_text(HEADER + ROWS + "12\ta\tb\tugly\n")
    message = fault(flags)
    assert "dev.tsv:14" in message and "ugly" in message and "'bad', 'good'" in message


def test_ten_bad_rows_and_a_count_of_the_rest(flags: list[str]) -> None:
    Path("data/train.tsv").write_text(HEADER + ROWS + "12\tshort\n" * 25)
    message = fault(flags)
    assert message.count("train.tsv:") == 10 and "15 more" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(flags: list[str]) -> None:
    Path("data/train.tsv").chmod(0)
    assert "train.tsv" in fault(flags)


def test_an_output_folder_that_cannot_be(flags: list[str]) -> None:
    Path("file").write_text("")
    assert "file" in fault(flags, "--output_dir", "file/out")
    assert "file" in fault(flags, "--output_dir", "file")


def test_an_output_folder_that_is_not_empty(flags: list[str]) -> None:
    Path("other").mkdir()
    Path("other/thesis.txt").write_text("years of work")
    message = fault(flags, "--output_dir", "other")
    assert all(
        flag in message for flag in ("--overwrite_output_dir", "--resume", "--output_dir", "thesis.txt")
    )
    parsed = parse_command_line([*flags, "--output_dir", "other", "--overwrite_output_dir"], "train")
    train(parsed.config, explicit=parsed.explicit)
    assert Path("other/thesis.txt").read_text() == "years of work"


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("config.json", None, "config.json"),
        ("config.json", lambda text: text[:-5], "config.json"),
        ("config.json", lambda text: text.replace('"bert"', '"roberta"'), "roberta"),
        (
            "config.json",
            lambda text: text.replace('"num_attention_heads": 4', '"num_attention_heads": 5'),
            "5",
        ),
        ("vocab.txt", None, "vocab"),
        ("vocab.txt", lambda text: text + "".join(f"more{i}\n" for i in range(3)), "vocab"),
        ("vocab.txt", lambda text: text.replace("[CLS]", "[cls]"), "[CLS]"),
        ("vocab.txt", lambda text: text.replace("[SEP]\n", ""), "[SEP]"),
        ("config.json", lambda text: text.replace('"vocab_size": ', '"vocab_size": 9'), "vocab"),
    ],
    ids="noconfig notjson notbert heads novocab longvocab lowercased absent shortvocab".split(),
)
def test_model_folders(
    flags: list[str], tiny_config_folder: Path, name: str, change: Callable[[str], str] | None, found: str
) -> None:
    if change is None:
        (tiny_config_folder / name).unlink()
    else:
        rewrite(tiny_config_folder / name, change)
    assert found in fault(flags)


def test_no_weights_without_from_scratch(flags: list[str]) -> None:
    assert "from_scratch" in fault(flags, "--from_scratch", "false")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (Path("ran.txt"), "this code ran"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "surplus", "shape", "nan", "pickle"])
def test_weights(flags: list[str], hf_folder: Path, damage: str) -> None:
    for name in ("train.tsv", "dev.tsv"):
        rewrite(
            Path("data", name),
            lambda text: text.replace("\tgood", "\tpositive").replace("\tbad", "\tneutral"),
        )
    file = hf_folder / "model.safetensors"
    weights = load_file(file)
    key = "bert.encoder.layer.0.output.dense.weight"
    if damage == "missing":
        del weights[key]
    elif damage == "surplus":
        weights["bert.encoder.layer.7.output.dense.weight"] = weights[key].clone()
    elif damage == "shape":
        weights[key] = weights[key][:, :3].contiguous()
    elif damage == "nan":
        weights[key][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "pickle":
        file.unlink()
        file = hf_folder / "pytorch_model.bin"
        file.write_bytes(pickle.dumps(Evil()))
    labels = ["--labels", "negative", "neutral", "positive"]
    message = fault([*flags, "--model_name_or_path", str(hf_folder), "--from_scratch", "false", *labels])
    assert file.name in message
    if damage in ("missing", "surplus", "shape", "nan"):
        assert "dense.weight" in message
    assert not Path("ran.txt").exists()


def test_labels_that_are_not_the_models(flags: list[str], hf_folder: Path) -> None:
    message = fault([*flags, "--model_name_or_path", str(hf_folder), "--from_scratch", "false"])
    assert "new_head" in message and "good" in message and "positive" in message


def test_a_hub_name_without_network(flags: list[str]) -> None:
    message = fault([*flags, "--model_name_or_path", "bert-base-multilingual-cased"])
    assert "bert-base-multilingual-cased" in message and "folder" in message


@pytest.mark.slow
def test_the_scripts_say_error_and_exit_with_2(flags: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for script, more in (
        ("train.py", [*flags, "--max_steps", "x"]),
        ("evaluate.py", ["--model_dir", "nowhere"]),
    ):
        command = [sys.executable, str(ROOT / script), *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert not Path("out").exists()


def test_the_settings_of_a_folder_that_are_damaged(flags: list[str]) -> None:
    parsed = parse_command_line(flags, "train")
    train(parsed.config, explicit=parsed.explicit)
    Path("out/training_args.yaml").write_text("max_seq_length: many\n")
    with pytest.raises(BertpairError, match=r"training_args\.yaml"):
        parse_command_line(["--model_dir", "out"], "evaluate")


def test_a_damaged_final_model_is_refused(flags: list[str]) -> None:
    from bertpair import PairClassifier

    parsed = parse_command_line(flags, "train")
    train(parsed.config, explicit=parsed.explicit)
    weights = bytearray(Path("out/model.safetensors").read_bytes())
    weights[-1] ^= 1
    Path("out/model.safetensors").write_bytes(weights)
    with pytest.raises(BertpairError, match=r"model\.safetensors"):
        PairClassifier.from_pretrained("out")
    assert json.loads(Path("out/config.json").read_text())["label2id"] == {"bad": 0, "good": 1}
