"""What must hold on a CUDA device. Each body that a CPU can run is run there too: so it is known to work.

Tests marked `cuda` are skipped without such a device.
"""

import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_hf_folder, write_tiny_bert
from live_server import make_predictor
from server_process import ROOT, ask
from torch.nn.attention import SDPBackend, sdpa_kernel

from bertpair import Config, PairClassifier, StoppedError, TrainingError, train
from bertpair.checkpoints.atomic import staged_folder
from bertpair.checkpoints.checkpoint import load_tensors
from bertpair.checkpoints.manifest import verify_folder
from bertpair.console import stop_flag
from bertpair.data.batching import Batch
from bertpair.data.tokenizer import Tokens, offsets_of
from bertpair.evaluation.scorer import Scorer
from bertpair.model.bert import BertClassifier, BertConfig
from bertpair.model.families import FAMILIES
from bertpair.model.pooling import Pooling
from bertpair.runtime import (
    LossScaler,
    Precision,
    PrecisionName,
    random_state,
    resolve_device,
    set_deterministic,
)
from bertpair.serving.batcher import MicroBatcher, QueueLimits, Worker
from bertpair.serving.predictor import Predictor
from bertpair.serving.server import warm_up
from bertpair.training.optim import AdamW, clip_scale, gradient_norm, parameter_groups, state_tensors
from bertpair.training.step import Objective, Stepper

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch looks once, at the first product
pytestmark = pytest.mark.usefixtures("fresh_process")

CUDA = pytest.param(
    "cuda:0",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
on_each = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
on_cuda = pytest.mark.parametrize("device", [CUDA], indirect=True)
every_precision = pytest.mark.parametrize("name", ["off", "bf16", "fp16"])
CYCLES = 10**8  # of `torch.cuda._sleep`: 50 ms at 2 GHz
PAIRS = [("the cat", "sat"), ("the mat", "good food"), ("мир", "hello the the cat"), ("café", "sat mat")]
SIZES = BertConfig(
    vocab_size=200,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=256,
    max_position_embeddings=128,
    initializer_range=0.1,
    num_labels=3,
)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """As a run resolves it; the process is as before in the end."""
    yield resolve_device(request.param)
    if torch.cuda.is_available():
        watch_for_waits("default")
        torch.cuda.set_per_process_memory_fraction(1.0)


def watch_for_waits(mode: str) -> None:
    """What PyTorch does when something waits for the device: default, warn or error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def make_model(device: torch.device) -> BertClassifier:
    torch.manual_seed(3)
    return BertClassifier(SIZES).to(device)


def make_stepper(device: torch.device, name: PrecisionName = "off") -> Stepper:
    model = make_model(device).train()
    optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-3)
    precision = Precision(name, "test")
    return Stepper(model, optimizer, Objective(False), device=device, precision=precision, max_grad_norm=0.5)


def make_batch(length: int = 24, num_rows: int = 6, padding: int = 5) -> Batch:
    """The second half of the rows has `padding` positions without a token."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(5, SIZES.vocab_size, (num_rows, length), generator=draw)
    mask = torch.ones(num_rows, length, dtype=torch.bool)
    if padding:
        mask[num_rows // 2 :, -padding:] = False
    return Batch(
        rows=np.arange(num_rows),
        input_ids=ids * mask,
        token_type_ids=torch.zeros_like(ids),
        attention_mask=mask if padding else None,
        targets=torch.arange(num_rows) % 3,
        num_tokens=int(mask.sum()),
    )


def run_step(stepper: Stepper, number: int, denominator: float = 6.0) -> None:
    batch = make_batch(16 + 8 * (number % 3))
    stepper.step(number, batch.rows, [batch], denominator=denominator, learning_rate=1e-3)


def make_tokens(lengths: list[int]) -> Tokens:
    draw = np.random.default_rng(5)
    return Tokens(
        ids=draw.integers(5, SIZES.vocab_size, sum(lengths)).astype(np.int32),
        offsets=offsets_of(np.array(lengths, np.int64)),
        first_lengths=np.array(lengths, np.int32),
        truncated=np.zeros(len(lengths), np.bool_),
    )


def make_scorer(device: torch.device, name: PrecisionName = "off") -> Scorer:
    return Scorer(make_model(device), 0, device, Precision(name, "test"), 128, max_batch_tokens=128)


def optimizer_state(stepper: Stepper) -> dict[str, torch.Tensor]:
    names = dict(stepper.model.named_parameters())
    found = {**names, **state_tensors(stepper.optimizer, names)}
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


# Training


@every_precision
@on_cuda
def test_a_step_never_waits_for_the_device(device: torch.device, name: PrecisionName) -> None:
    stepper = make_stepper(device, name)
    for number in range(1, 11):
        if number == 3:
            watch_for_waits("error")
        run_step(stepper, number)
    watch_for_waits("default")
    assert stepper.meter.verdicts() == ()


@on_each
def test_the_fused_update_equals_the_plain_one(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 updates by the same gradients, which clipping makes smaller."""
    states = []
    for is_fused in (True, False):
        if not is_fused:
            monkeypatch.setattr("bertpair.training.optim._has_kernel", lambda *_: False)
        draw = torch.Generator().manual_seed(8)
        model = make_model(device)
        names = dict(model.named_parameters())
        optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-3)
        for _ in range(20):
            for parameter in names.values():
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
            norm = gradient_norm(names.values())
            optimizer.step(grad_scale=clip_scale(norm, 1.0), found_inf=torch.zeros((), device=device))
        states.append({**names, **state_tensors(optimizer, names)})
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-5, atol=1e-6, msg=name)
        assert not name.startswith("step.") or (tensor.item() == states[1][name].item() == 20)


@every_precision
@on_each
def test_a_step_that_is_not_finite_changes_nothing(device: torch.device, name: PrecisionName) -> None:
    stepper = make_stepper(device, name)
    run_step(stepper, 1)
    run_step(stepper, 2)
    before = optimizer_state(stepper)
    run_step(stepper, 3, denominator=float("nan"))
    after = optimizer_state(stepper)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [skipped.number for skipped in stepper.meter.verdicts()] == [3]


@on_each
def test_the_loss_scale_goes_as_torchs(device: torch.device) -> None:
    ours = LossScaler(True, device, growth_interval=3)
    theirs = torch.amp.GradScaler(device.type, growth_interval=3)
    theirs.scale(torch.ones((), device=device))  # makes its lazy tensors
    parameter = torch.nn.Parameter(torch.zeros(2, device=device))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for flag in np.random.default_rng(2).random(50) < 0.2:
        parameter.grad = torch.full((2,), torch.inf if flag else 1.0, device=device)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(flag), device=device))
        assert ours.scale.item() == theirs.get_scale()
        assert ours.growth_tracker.item() == theirs.state_dict()["_growth_tracker"]


def write_material(folder: Path, num_rows: int = 64) -> dict[str, object]:
    """Rows of many lengths, a network with heads of 64, and the settings of a run on them."""
    draw = np.random.default_rng(4)
    rows = ["index\tsentence1\tsentence2\tlabel"]
    for number in range(num_rows):
        words = " ".join(draw.choice(["the", "cat", "sat", "mat", "good"], int(draw.integers(4, 40))))
        answer, label = ("bad food", "yes") if number % 2 else ("good", "no")
        rows.append(f"{number}\t{words}\t{answer}\t{label}")
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = write_tiny_bert(folder / "bert", hidden_size=128, num_attention_heads=2, intermediate_size=256)
    return {
        "train_file": [str(folder / "train.tsv")],
        "model_name_or_path": str(model),
        "from_scratch": True,
        "output_dir": "out",
        "max_seq_length": 60,
        "max_steps": 10,
        "per_device_train_batch_size": 128,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "no",
        "num_threads": 1,
    }


@pytest.mark.slow
@on_each
def test_fp16_gradients_that_are_never_finite_end_the_run(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss stays finite all the while; the scale stops at its floor."""
    monkeypatch.setattr(
        "bertpair.training.setup.resolve_precision", lambda *_, **__: Precision("fp16", "test")
    )
    monkeypatch.setattr(
        "bertpair.training.step.gradient_norm", lambda _: torch.full((), float("nan"), device=device)
    )
    scales = []
    original = Stepper.step

    def noted(self: Stepper, *given: object, **settings: object) -> None:
        original(self, *given, **settings)  # type: ignore[arg-type]
        scales.append(self.scaler.scale.item())

    monkeypatch.setattr(Stepper, "step", noted)
    material = {**write_material(tmp_path, 8), "per_device_train_batch_size": 8, "max_steps": 200}
    with pytest.raises(TrainingError, match="11 steps in a row"):
        train(Config(**material, device=str(device)))  # type: ignore[arg-type]
    assert scales[0] == 2.0**15 and scales[-1] == min(scales) == LossScaler.FLOOR > 0
    assert len(scales) == 16 + 11  # halvings from 2 ** 16 to the floor, then ten that may be and one more


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@on_each
def test_stopped_and_resumed_is_bitwise_the_same(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    """With dropout, padding, and more than 3,072 tokens a batch, where CUDA's sums take another way."""
    if device.type == "cpu" and amp == "fp16":
        pytest.skip("fp16 is not offered on a CPU")
    rows = 24 if device.type == "cpu" else 256
    material = {**write_material(tmp_path, rows), "amp": amp, "deterministic": True, "device": str(device)}
    original = Stepper.step

    def stopping(self: Stepper, number: int, *given: object, **settings: object) -> None:
        original(self, number, *given, **settings)  # type: ignore[arg-type]
        if number == 5 and settings_of["stop"]:
            stop_flag.request(15)

    settings_of = {"stop": False}
    monkeypatch.setattr(Stepper, "step", stopping)
    try:
        train(Config(**{**material, "output_dir": "whole"}))  # type: ignore[arg-type]
        settings_of["stop"] = True
        with pytest.raises(StoppedError):
            train(Config(**material))  # type: ignore[arg-type]
        stop_flag.clear()
        settings_of["stop"] = False
        train(Config(**material, resume="auto"))  # type: ignore[arg-type]
    finally:
        set_deterministic(False)
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


@on_cuda
def test_a_logged_rate_includes_the_device(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BertClassifier.forward

    def slow(self: BertClassifier, *given: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(CYCLES)
        return original(self, *given)

    monkeypatch.setattr(BertClassifier, "forward", slow)
    train(Config(**write_material(tmp_path), device=str(device)))  # type: ignore[arg-type]
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["step_seconds"] for line in lines]
    assert len(seconds) == 10 and min(seconds) > 0.04


@on_each
def test_a_checkpoint_has_the_devices_tensors(device: torch.device, tmp_path: Path) -> None:
    stepper = make_stepper(device)
    run_step(stepper, 1)
    names = dict(stepper.model.named_parameters())
    live = {**names, **state_tensors(stepper.optimizer, names)}
    with staged_folder(tmp_path / "checkpoint-1", versions={}, meta={"step": 1}) as staging:
        staging.write_tensors("all.safetensors", live, {"format": "pt"})
    folder = tmp_path / "checkpoint-1"
    saved = load_tensors(folder, "all.safetensors", verify_folder(folder))
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name].detach().cpu()) for name in live)


# Attention and copies


@on_cuda
def test_cudnns_attention_is_not_chosen(device: torch.device) -> None:
    """A plan of cuDNN's for every shape would show as calls of its own, and as a slow first run of each."""
    model, precision = make_model(device).eval(), Precision("bf16", "test")
    seconds = []
    with (
        warnings.catch_warnings(action="ignore"),
        torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile,
        torch.inference_mode(),
        precision.autocast(device),
    ):
        for length in range(16, 116):
            batch = make_batch(length).to(device)
            torch.cuda.synchronize()
            began = time.perf_counter()
            model(batch.input_ids, batch.token_type_ids, batch.attention_mask)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    called = {event.key for event in profile.key_averages()}
    assert any("attention" in name for name in called)
    assert not [name for name in called if "cudnn_attention" in name]
    assert max(seconds[1:]) < 5 * statistics.median(seconds)


def test_cudnns_attention_is_switched_off_where_a_cuda_device_is_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    try:
        assert resolve_device("auto").type == "cuda"
        assert torch.backends.cuda.cudnn_sdp_enabled() is False
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@on_each
def test_a_backward_without_dropout_is_finite(device: torch.device) -> None:
    """One query over 64 places, some masked, at logits of about -120; beside the plain formula."""
    draw = torch.Generator().manual_seed(1)

    def tensor(num_places: int, mean: float) -> torch.Tensor:
        values = mean + 0.1 * torch.randn(2, 2, num_places, 64, generator=draw)
        return values.to(device, torch.bfloat16).requires_grad_()

    inputs = [tensor(1, 15**0.5), tensor(64, -(15**0.5)), tensor(64, 0.0)]
    mask = torch.ones(2, 1, 1, 64, dtype=torch.bool, device=device)
    mask[1, ..., 50:] = False

    def gradients() -> list[torch.Tensor]:
        mixed = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
        return list(torch.autograd.grad(mixed.float().sum(), inputs))

    found = gradients()
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradients()
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05)


@on_cuda
def test_pinned_memory_is_not_reused_too_early(device: torch.device) -> None:
    batches = [make_batch(16 + number % 50) for number in range(200)]
    torch.cuda._sleep(CYCLES)  # all copies are queued before the first is made
    copies = [batch.to(device) for batch in batches]
    for batch, copied in zip(batches, copies, strict=True):
        assert torch.equal(copied.input_ids.cpu(), batch.input_ids)
        assert copied.attention_mask is not None and batch.attention_mask is not None
        assert torch.equal(copied.attention_mask.cpu(), batch.attention_mask)


# Evaluation and the service


@on_cuda
def test_an_evaluation_waits_for_the_device_once(device: torch.device) -> None:
    scorer, tokens = make_scorer(device), make_tokens([64, 64, 64, 64, 64, 60, 60, 60, 60, 60])
    scorer.logits(tokens)
    watch_for_waits("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scorer.logits(tokens)
    watch_for_waits("default")
    assert len([one for one in said if "called a synchronizing" in str(one.message)]) == 1


@on_each
def test_an_evaluation_copies_to_the_host_once_and_keeps_the_order(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, lengths = make_scorer(device), [5, 64, 17, 33, 64, 9, 60, 31]
    tokens = make_tokens(lengths)
    alone = []
    for i, (begin, end) in enumerate(itertools.pairwise(tokens.offsets)):
        one = Tokens(
            tokens.ids[begin:end],
            np.array([0, end - begin]),
            tokens.first_lengths[i : i + 1],
            tokens.truncated[i : i + 1],
        )
        alone.append(scorer.logits(one))
    calls = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: calls.append(self.shape) or original(self))
    np.testing.assert_allclose(scorer.logits(tokens), np.concatenate(alone), atol=2e-5)
    assert calls == [(len(lengths), 3)]
    assert scorer.logits(make_tokens([])).shape == (0, 3)


@on_each
def test_an_evaluation_leaves_the_generators_alone(device: torch.device) -> None:
    scorer = make_scorer(device)
    before = random_state(device)
    scorer.logits(make_tokens([8, 30, 12]))
    after = random_state(device)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("length", [1, 24, 125])
@pytest.mark.parametrize(("name", "tolerance"), [("off", 1e-4), ("bf16", 2e-2)])
@on_each
def test_logits_are_those_of_float32_on_a_cpu(
    device: torch.device, name: PrecisionName, tolerance: float, length: int, padding: int
) -> None:
    batch = make_batch(length, padding=min(padding, length - 1))
    expected = _logits(make_model(torch.device("cpu")), batch, Precision("off", "test"))
    found = _logits(make_model(device), batch.to(device), Precision(name, "test"))
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, scale))


def _logits(model: BertClassifier, batch: Batch, precision: Precision) -> torch.Tensor:
    model.eval()
    with torch.inference_mode(), precision.autocast(batch.input_ids.device):
        logits = model(batch.input_ids, batch.token_type_ids, batch.attention_mask)
    return logits.float().cpu()


@on_each
def test_the_workers_thread_gives_the_same_logits(device: torch.device, tmp_path: Path) -> None:
    classifier = PairClassifier.from_pretrained(write_hf_folder(tmp_path / "model"), device=str(device))

    async def on_thread() -> object:
        worker = Worker("inference")
        logits = await worker.call(lambda: classifier.logits(PAIRS))
        await worker.end(5)
        return logits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread's own setting begins at the process's
    try:
        np.testing.assert_array_equal(asyncio.run(on_thread()), classifier.logits(PAIRS))
    finally:
        torch.set_num_threads(threads)


class Room:
    """Memory for four blocks of 64 MiB: on CUDA the device's own limit, on a CPU a count of those alive."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.blocks = device, list[weakref.ref[torch.Tensor]]()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(device).total_memory
            allowed = torch.cuda.memory_reserved(device) + 300 * 2**20
            torch.cuda.set_per_process_memory_fraction(allowed / total, device)

    def take(self) -> torch.Tensor:
        if self.device.type == "cpu" and sum(block() is not None for block in self.blocks) >= 4:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        size = 64 * 2**20 if self.device.type == "cuda" else 1
        block = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.blocks.append(weakref.ref(block))
        return block


@on_each
def test_a_batch_out_of_memory_is_halved_and_answered(device: torch.device) -> None:
    """There is room for its halves only once what the failed batch held is let go."""
    room = Room(device)

    def run(rows: list[int]) -> list[int]:
        held = []
        for _ in rows:
            held.append(room.take())
        return [2 * row for row in rows]

    async def ask() -> list[int]:
        batcher = MicroBatcher[int, int](run, QueueLimits())
        try:
            return (await batcher.submit(list(range(8)), [8] * 8)).values
        finally:
            await batcher.close(5)

    assert asyncio.run(ask()) == [2 * row for row in range(8)]


@on_each
def test_a_warm_up_survives_running_out_of_memory(device: torch.device, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "model")
    predictor, config = make_predictor(folder, device=str(device), max_seq_length=16)
    predictor.time_batch([16] * 4)
    room = Room(device)

    def time_batch(lengths: list[int]) -> float:
        held = [room.take() for _ in lengths]
        seconds = Predictor.time_batch(predictor, lengths)
        return seconds * len(held) / len(lengths)

    predictor.time_batch = time_batch  # type: ignore[method-assign,assignment]

    async def warm(given: int | None) -> int:
        batcher = MicroBatcher[object, object](predictor.run, QueueLimits(max_queue_rows=64))  # type: ignore[arg-type]
        await warm_up(predictor, batcher, given)
        await batcher.close(5)
        return batcher.limits.max_batch_tokens

    assert 16 <= asyncio.run(warm(None)) <= 4 * 16
    assert 16 <= asyncio.run(warm(512)) <= 8 * 16


ASSERTING = """
import sys
import torch
from bertpair.serving.predictor import Predictor
from bertpair.serving.server import serve
from bertpair.settings.serve import parse_serve_command_line
from bertpair.console import configure_logging

def run(self, rows):
    if sys.argv[2] == "cpu":
        raise RuntimeError("CUDA error: device-side assert triggered\\nCompile with TORCH_USE_CUDA_DSA")
    table = torch.zeros(4, 4, device=sys.argv[2])
    table[torch.tensor([9], device=sys.argv[2])].cpu()

Predictor.run = run
configure_logging()
flags = ["--model_dir", sys.argv[1], "--device", sys.argv[2], "--port", "0"]
sys.exit(serve(parse_serve_command_line(flags)[0]))
"""


@pytest.mark.slow
@on_each
def test_a_device_assert_ends_the_server(device: torch.device, tmp_path: Path) -> None:
    """With one line, and a code that tells whoever watches it to start it anew."""
    folder = write_hf_folder(tmp_path / "model")
    command = [sys.executable, "-c", ASSERTING, str(folder), str(device)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line.rstrip())
                if line.startswith("ready"):
                    break
            (place,) = [line for line in said if line.startswith("listening on")]
            with pytest.raises((ConnectionError, IndexError, ValueError)):
                ask(int(place.rsplit(":", 1)[1]), "/v1/predict", {"text_a": "the cat", "text_b": "sat"})
            assert process.wait(30) not in (0, None)
            lost = [line for line in process.stderr.read().splitlines() if "the device is lost" in line]
        finally:
            process.kill()
    assert len(lost) == 1 and "device-side assert" in lost[0]


@on_each
@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_same_logits_and_gradients_on_a_device(
    device: torch.device, model_type: str, pooling: Pooling
) -> None:
    family, sizes = FAMILIES[model_type], {"vocab_size": 200, "pad_token_id": 0}
    config = family.config(**sizes).model_copy(
        update={
            **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
            **{"num_labels": 3, "pooling": pooling, "local_attention": 8, "embedding_size": 32},
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0},
        }
    )
    torch.manual_seed(3)
    model = family.network(config)
    twin = family.network(config).to(device)
    twin.load_state_dict(model.state_dict())
    batch = make_batch()
    results = []
    for network, here in ((model, batch), (twin, batch.to(device))):
        if device.type == "cuda":
            watch_for_waits("error" if network is twin else "default")
        logits = network(here.input_ids, here.token_type_ids, here.attention_mask)
        logits.square().sum().backward()
        if device.type == "cuda":
            watch_for_waits("default")
        results.append([logits, *(each.grad for each in network.parameters() if each.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(
            theirs.cpu(), ours, rtol=1e-4, atol=1e-4 * float(ours.detach().abs().max())
        )
