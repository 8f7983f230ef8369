"""The engine OpenVINO: the network's own answers in float32, nearly those in int8, kept and served."""

import dataclasses
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_hf_folder
from live_server import PAIR, make_predictor, serving

from bertpair import BertpairError, CheckpointError, ConfigError, PairClassifier
from bertpair.checkpoints.derived import DERIVED
from bertpair.console import stop_flag
from bertpair.data.tokenizer import Tokens, offsets_of
from bertpair.errors import StoppedError
from bertpair.evaluation import conversion, openvino
from bertpair.evaluation.openvino import REQUEST_TOKENS, OpenVINOScorer
from bertpair.evaluation.scorer import softmax
from bertpair.model.config import read_folder
from bertpair.runtime import has_vnni

WORDS = "the The cat sat mat good bad food service 中 文 数 据 库 进 程 мир hello".split()
PAIRS = [
    tuple(" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(2))
    for rng in [np.random.default_rng(3)]
    for _ in range(600)
]


def copied(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to / "model"))


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose network is converted in float32."""
    folder = write_hf_folder(tmp_path_factory.mktemp("openvino") / "hf-tiny")
    PairClassifier.from_pretrained(folder, engine="openvino")
    return folder


@pytest.fixture(scope="module")
def int8(float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose network is quantised too."""
    folder = copied(float32, tmp_path_factory.mktemp("int8"))
    PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=PAIRS)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """PAIRS laid out like training data, with labels that the model does not have."""
    path = tmp_path / "pairs.tsv"
    rows = [f"{i}\t{a}\t{b}\tnobody looks\n" for i, (a, b) in enumerate(PAIRS)]
    path.write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(network: object) -> None:
        raise AssertionError("it was converted again")

    monkeypatch.setattr(openvino, "convert", convert)


def test_float32_gives_the_networks_own_answers(float32: Path) -> None:
    exact = PairClassifier.from_pretrained(float32, optimize=False)
    model = PairClassifier.from_pretrained(float32, engine="openvino")
    assert model.agreement is None and model.predict([]) == []
    for rows in (PAIRS, PAIRS[:1], PAIRS[:7], PAIRS[::-1]):
        assert np.abs(softmax(model.logits(rows)) - softmax(exact.logits(rows))).max() < 1e-5
        assert [p.label for p in model.predict(rows)] == [p.label for p in exact.predict(rows)]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_of_any_lengths_come_back_in_their_order(float32: Path, num_threads: int) -> None:
    before, generator = torch.get_num_threads(), np.random.default_rng(1)
    try:
        model = PairClassifier.from_pretrained(float32, engine="openvino", num_threads=num_threads)
    finally:
        torch.set_num_threads(before)
    exact = PairClassifier.from_pretrained(float32, optimize=False)
    assert isinstance(model.scorer, OpenVINOScorer)
    for lengths in ([1], [64, 1, 63], generator.integers(1, 65, 200), [5] * 90):
        lengths = np.asarray(lengths)
        ids = generator.integers(0, 100, lengths.sum(), np.int32)
        tokens = Tokens(ids, offsets_of(lengths), lengths // 2, np.zeros(len(lengths), np.bool_))
        counted: list[int] = []
        found = model.scorer.logits(tokens, counted.append)
        assert np.abs(found - exact.scorer.logits(tokens)).max() < 2e-5
        assert sum(counted) == len(lengths)


def test_requests_have_few_shapes_and_little_padding(float32: Path) -> None:
    scorer = PairClassifier.from_pretrained(float32, engine="openvino").scorer
    assert isinstance(scorer, OpenVINOScorer)
    generator, shapes, padded, used = np.random.default_rng(2), set(), 0, 0
    for _ in range(3000):
        lengths = generator.integers(1, 513, generator.integers(1, 40))
        pieces = scorer._pieces(lengths, num_parallel=2)
        assert sorted(np.concatenate(pieces)) == [*range(len(lengths))]
        for rows in pieces:
            length = openvino.fill_up(int(lengths[rows].max()), 2)
            shapes.add((len(rows), length))
            assert (len(rows) - 1) * length < REQUEST_TOKENS
            padded, used = padded + len(rows) * length, used + lengths[rows].sum()
    assert len(shapes) < 450
    assert padded / used < 1.2


def test_int8_agrees_with_float32_and_says_how_well(int8: Path, no_conversion: None) -> None:
    exact = PairClassifier.from_pretrained(int8)
    model = PairClassifier.from_pretrained(int8, quantize="int8")  # nobody has to give the pairs again
    found = model.agreement
    assert found is not None and found.num_rows == 256 and found.is_enough
    change = np.abs(softmax(model.logits(PAIRS)) - softmax(exact.logits(PAIRS)))
    assert 0 < change.max() < 0.2 and 0 < found.largest_change <= change.max() + 1e-6
    operations = {each.get_type_name() for each in openvino.read(int8 / DERIVED / "openvino-int8").get_ops()}
    assert "FakeQuantize" in operations


def test_the_agreement_is_that_of_pairs_that_int8_was_not_calibrated_with(
    float32: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[str, ...]]] = {}

    def choose(self: conversion.Conversion) -> Any:
        seen["calibration"], seen["check"] = real(self)
        return seen["calibration"], seen["check"]

    real = conversion.Conversion._choose
    monkeypatch.setattr(conversion.Conversion, "_choose", choose)
    monkeypatch.setattr(openvino, "quantise", lambda model, *given, **more: model)  # float32: exact
    folder = copied(float32, tmp_path)
    for given in (
        {"calibration_pairs": file},
        {"calibration_pairs": iter(PAIRS[:200] * 2), "quantize_check": file},
    ):
        model = PairClassifier.from_pretrained(folder, quantize="int8", **given)
        assert model.agreement is not None and model.agreement.largest_change < 1e-5
        assert len(seen["calibration"]) == 200 and len(seen["check"]) == 256
        assert not {*seen["calibration"]} & {*seen["check"]} and {*seen["check"]} <= {*PAIRS}


def test_it_is_made_anew_where_anything_differs(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(openvino, "quantise", lambda model, *given, **more: made.append("x") or model)
    folder = copied(int8, tmp_path)

    def again(**given: Any) -> bool:
        made.clear()
        PairClassifier.from_pretrained(folder, quantize="int8", **given)
        return bool(made)

    assert not again()
    assert not again(calibration_pairs=PAIRS)  # those it was made with
    assert again(calibration_pairs=PAIRS[1:]) and not again(calibration_pairs=PAIRS[1:])
    assert again(quantize_check=PAIRS[-256:], calibration_pairs=PAIRS[:300])
    assert again(max_seq_length=32, calibration_pairs=PAIRS)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "hidden_act": "relu"}))
    assert again(max_seq_length=32, calibration_pairs=PAIRS)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # the last bits of one number
    weights.write_bytes(data)
    assert again(max_seq_length=32, calibration_pairs=PAIRS)
    monkeypatch.setattr(conversion, "version", lambda name: "2030.1")
    assert again(max_seq_length=32, calibration_pairs=PAIRS)
    assert not again(max_seq_length=32)
    there = has_vnni()
    monkeypatch.setattr(conversion, "has_vnni", lambda: not there)
    assert again(max_seq_length=32, calibration_pairs=PAIRS)
    (folder / DERIVED / "openvino-int8" / "model.bin").write_bytes(b"damaged")
    assert again(max_seq_length=32, calibration_pairs=PAIRS)


def test_what_cannot_be_is_said(
    float32: Path, int8: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path = float32, **given: Any) -> str:
        with pytest.raises(BertpairError) as caught:
            PairClassifier.from_pretrained(folder, **given)
        return str(caught.value)

    assert "engine: expected one of torch, openvino, or null, found 'onnx'" in refused(engine="onnx")
    assert "quantize: expected int8, or null, found 'int4'" in refused(quantize="int4")
    assert "needs engine openvino, found engine torch" in refused(engine="torch", quantize="int8")
    assert "on the CPU only, found device cuda:1" in refused(engine="openvino", device="cuda:1")
    assert "no effect without quantize int8" in refused(engine="openvino", calibration_pairs=PAIRS)
    assert "fp16 does not run on cpu" in refused(engine="openvino", amp="fp16")
    message = refused(quantize="int8")
    assert message.startswith("quantize int8 needs pairs to be calibrated with: no train data")
    assert "--calibration_file" in message and "calibration_pairs" in message
    assert "absent.tsv: No such file" in refused(quantize="int8", calibration_pairs="absent.tsv")
    few = tmp_path / "few.tsv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    few.write_text("".join(lines[:300]), encoding="utf-8")
    for given in ({"calibration_pairs": few}, {"calibration_pairs": PAIRS, "quantize_check": few}):
        message = refused(quantize="int8", **given)
        assert "quantize_check: " in message and "at least 256 pairs besides those" in message
    assert not (float32 / DERIVED / "openvino-int8").exists()
    monkeypatch.setitem(sys.modules, "openvino", None)
    for given in ({"engine": "openvino"}, {"quantize": "int8", "calibration_pairs": PAIRS}):
        assert 'pip install "bertpair[openvino]"' in refused(int8, **given)


def test_int8_without_nncf_is_refused_unless_it_is_there(
    float32: Path, int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert PairClassifier.from_pretrained(int8, quantize="int8").agreement is not None
    with pytest.raises(ConfigError, match=r'needs the package nncf: pip install "bertpair\[openvino\]"'):
        PairClassifier.from_pretrained(float32, quantize="int8", calibration_pairs=PAIRS)


def test_a_network_that_does_not_convert_says_so(
    float32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(float32, tmp_path)
    shutil.rmtree(folder / DERIVED)
    network = read_folder(folder).family.network
    forward = network.forward

    def constant(self: Any, input_ids: Any, *others: Any) -> Any:  # as if a size were fixed in the conversion
        return forward(self, input_ids, *others) * (1 + torch.tensor(input_ids.tolist()).sum())

    monkeypatch.setattr(network, "forward", constant)
    with pytest.raises(ConfigError, match="engine openvino: converted, this network gives other answers"):
        PairClassifier.from_pretrained(folder, engine="openvino")

    def failing(self: Any, *given: Any) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(network, "forward", failing)
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    with pytest.raises(ConfigError, match="OpenVINO cannot convert BertClassifier; use engine torch"):
        PairClassifier.from_pretrained(folder, engine="openvino")
    assert (root.level, root.filters, root.handlers) == before  # a failed conversion left it at ERROR
    assert [each.name for each in (folder / DERIVED).iterdir()] == [".lock"]


def test_a_network_with_other_labels_is_refused(
    float32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(float32, tmp_path)
    real = read_folder(folder)
    other = dataclasses.replace(real, config=real.config.model_copy(update={"num_labels": 2}))
    tokenizer = PairClassifier.from_pretrained(folder).tokenizer
    samples = conversion.Samples(None, None, True)
    for each, matches in ((real, True), (other, False)):
        asked = conversion.Conversion(each, tokenizer, conversion.EXACT, 40, None, samples)
        if matches:
            asked.open(4096)
            continue
        with pytest.raises(CheckpointError, match="found 3 labels, the model has 2"):
            asked.open(4096)


def test_nothing_is_reported_to_the_librarys_maker(float32: Path, int8: Path) -> None:
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert sys.modules["openvino_telemetry"] is None
    assert logging.getLoggerClass() is logging.Logger


def test_a_stop_ends_a_conversion_and_leaves_nothing(float32: Path, tmp_path: Path) -> None:
    folder = copied(float32, tmp_path)
    stop_flag.request(signal.SIGTERM)
    try:
        with pytest.raises(StoppedError):
            PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=PAIRS)
    finally:
        stop_flag.clear()
    assert not [path for path in (folder / DERIVED).iterdir() if "int8" in path.name]


def test_bf16_and_int8_warn_where_the_processor_has_no_instructions(
    int8: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(int8, tmp_path)  # it is made anew there: for other instructions
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with caplog.at_level(logging.WARNING):
        PairClassifier.from_pretrained(folder, amp="bf16")
        assert "amp bf16: this processor has no fast bf16 instructions" in caplog.text
        caplog.clear()
        PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=PAIRS)
        assert "quantize int8: this processor has no instructions for it (VNNI)" in caplog.text


def test_a_forked_child_and_a_pickle_answer_alike(int8: Path) -> None:
    model = PairClassifier.from_pretrained(int8, quantize="int8")
    expected = model.logits(PAIRS)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).logits(PAIRS), expected)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if np.allclose(model.logits(PAIRS), expected, atol=1e-4) else 3)
    assert os.waitpid(child, 0) == (child, 0)


def test_the_service_shows_what_computes_and_how_well(int8: Path, tmp_path: Path) -> None:
    predictor, config = make_predictor(int8, quantize="int8", max_seq_length=64)
    (expected,) = PairClassifier.from_pretrained(int8, quantize="int8").predict([tuple(PAIR.values())])
    with serving(predictor, config) as live:
        info = live.ask("GET", "/info").json
        answer = live.ask("POST", "/v1/predict", PAIR).json
    assert (info["engine"], info["precision"], info["device"]) == ("openvino", "int8", "cpu")
    assert info["agreement_with_float32"]["num_rows"] == 256
    assert answer["label"] == expected.label and answer["score"] == pytest.approx(expected.score, abs=1e-6)


def test_a_slow_machine_still_batches_enough_to_keep_openvino_busy(
    float32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertpair.serving.server.TARGET_SECONDS", 0.0)  # as if every batch took too long
    for engine, least in (("openvino", 256), ("torch", 64)):
        predictor, config = make_predictor(float32, engine=engine, max_seq_length=64)
        assert predictor.full_batch_tokens == (256 if engine == "openvino" else 0)
        with serving(predictor, config) as live:
            assert live.ask("GET", "/info").json["limits"]["max_batch_tokens"] == least


def test_the_service_wants_int8_compared(float32: Path, tmp_path: Path, file: Path) -> None:
    folder = copied(float32, tmp_path)
    few = PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=PAIRS[:200])
    assert few.agreement is None
    with pytest.raises(ConfigError, match="quantize_check must be set: .* not compared with float32 yet"):
        make_predictor(folder, quantize="int8")
    predictor, _ = make_predictor(folder, quantize="int8", calibration_file=str(file))
    assert predictor.agreement is not None and predictor.engine == "openvino"


CONVERT = """
import sys
from bertpair import PairClassifier
model = PairClassifier.from_pretrained(sys.argv[1], quantize="int8", calibration_pairs=sys.argv[2])
print(model.agreement.num_rows)
"""


@pytest.fixture
def start(tmp_path: Path, float32: Path, file: Path) -> Iterator[Any]:
    """Start a process that converts one and the same folder."""
    folder, processes = copied(float32, tmp_path), []

    def begin() -> tuple[Path, subprocess.Popen[str]]:
        command = [sys.executable, "-c", CONVERT, str(folder), str(file)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return folder, processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_in_a_conversion_the_next_start_answers(start: Any) -> None:
    for moment in ("the lock", "a folder under another name", "the network in it"):
        folder, process = start()
        place, end = folder / DERIVED, time.monotonic() + 60
        patterns = {"the lock": ".lock", "the network in it": "openvino-int8.tmp-*/model.xml"}
        pattern = patterns.get(moment, "openvino-int8.tmp-*")
        while not [*place.glob(pattern)] and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (place / "openvino-int8").exists() or moment == "the network in it"
    folder, process = start()
    output, errors = process.communicate(timeout=120)
    assert output == "256\n", errors
    assert {each.name for each in (folder / DERIVED).iterdir()} == {".lock", "openvino", "openvino-int8"}


@pytest.mark.slow
def test_two_processes_convert_once(start: Any) -> None:
    (folder, first), (_, second) = start(), start()
    told = [process.communicate(timeout=120) for process in (first, second)]
    assert [output for output, _ in told] == ["256\n", "256\n"], told
    assert {each.name for each in (folder / DERIVED).iterdir()} == {".lock", "openvino", "openvino-int8"}


def test_a_full_disk_is_said_and_leaves_nothing(
    float32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(float32, tmp_path)
    real = openvino.load_library("openvino", "").save_model

    def full(model: Any, path: Path, **given: Any) -> None:
        real(model, path, **given)
        path.write_bytes(path.read_bytes()[:100])
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino.load_library("openvino", ""), "save_model", full)
    with pytest.raises(CheckpointError, match=r"derived: cannot be written: .* is the disk full\?"):
        PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=PAIRS)
    assert {each.name for each in (folder / DERIVED).iterdir()} == {".lock", "openvino"}
    monkeypatch.undo()
    model = PairClassifier.from_pretrained(folder, quantize="int8", calibration_pairs=PAIRS)
    assert model.agreement is not None and model.agreement.is_enough
