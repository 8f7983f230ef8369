"""Every family of networks on the embedded sample, from random weights: accuracy, resume, and transformers.

    pip install transformers
    python benchmarks/families.py [--families roberta albert] [--seeds 42 43 44] [--kill_at 1500]
    python benchmarks/families.py --max_steps 1000 --kill_at 400

Each family has the shape of data/tiny-bert, and a tokenizer of its own kind that is trained on the sample.
A run is `python train.py` with config.yaml. A second run is killed (SIGKILL) once its checkpoint of step
`--kill_at` is there, and resumed: it must end with the same bytes of weights. Then transformers reads the
model folder and scores the dev file, one row at a time.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data"
TINY = json.loads((SAMPLE / "tiny-bert" / "config.json").read_text())
ROBERTA = {**TINY, "type_vocab_size": 1, "max_position_embeddings": 67}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": TINY,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "distilbert": {
        **{
            "dim": 128,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 512,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        **{"seq_classif_dropout": 0.0, "max_position_embeddings": 64, "initializer_range": 0.08},
    },
    "albert": {**TINY, "embedding_size": 64, "hidden_act": "gelu_new", "classifier_dropout_prob": 0.0},
    "modernbert": {
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
        **{
            "max_position_embeddings": 64,
            "initializer_range": 0.08,
            "local_attention": 16,
            "pad_token_id": 0,
        },
        **{"layer_types": ["sliding_attention", "full_attention"]},  # the last of the base model is full too
    },
}
MARKS = {  # the special tokens at the start and the end of a row, for padding, and for what is unknown
    "roberta": ("<s>", "</s>", "<pad>", "<unk>"),
    "xlm-roberta": ("<s>", "</s>", "<pad>", "<unk>"),
    "camembert": ("<s>", "</s>", "<pad>", "<unk>"),
    "albert": ("[CLS]", "[SEP]", "[PAD]", "[UNK]"),
    "modernbert": ("<bos>", "<eos>", "<pad>", "<unk>"),
}
SIZE = 2500
# Entries of several Chinese characters would hide from so small a network which characters two texts share.
HAN_ALONE = pre_tokenizers.Split(tokenizers.Regex(r"\p{Han}"), "isolated")


def sample_texts() -> list[str]:
    rows = [line.split("\t") for line in (SAMPLE / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    return [text for row in rows for text in row[1:3]]


def train_tokenizer(kind: str, texts: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A tokenizer of the kind that this family's models have, and its special tokens by role."""
    first, last, pad, unk = MARKS[kind]
    trainer: Any
    if kind == "roberta":
        backend = tokenizers.Tokenizer(models.BPE())
        steps, splits = [], [HAN_ALONE, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=[*MARKS[kind]], initial_alphabet=alphabet
        )
    elif kind == "modernbert":
        backend = tokenizers.Tokenizer(models.BPE(unk_token=unk, byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Replace(" ", "▁")]
        splits = [pre_tokenizers.Split("▁", "merged_with_next"), HAN_ALONE]
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=[*MARKS[kind], *every_byte])
    else:
        backend = tokenizers.Tokenizer(models.Unigram())
        steps, splits = [], [pre_tokenizers.Metaspace(), HAN_ALONE]
        trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=[*MARKS[kind]], unk_token=unk)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *steps])
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    trainer.show_progress = False
    backend.train_from_iterator(texts, trainer)
    if kind == "modernbert":  # a byte is a plain entry, which no text holds whole
        content = json.loads(backend.to_str())
        content["added_tokens"] = content["added_tokens"][: len(MARKS[kind])]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    between, second = {"albert": ("", 1), "modernbert": ("", 0)}.get(kind, (f"{last} ", 0))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {between}$B:{second} {last}:{second}",
        special_tokens=[(mark, backend.token_to_id(mark)) for mark in (first, last)],
    )
    return backend, {"pad_token": pad, "unk_token": unk, "cls_token": first, "sep_token": last}


def write_family(kind: str, folder: Path, texts: list[str]) -> Path:
    """What `from_scratch` trains from: config.json and a tokenizer."""
    folder.mkdir()
    config = {**CONFIGS[kind], "model_type": kind}
    config.pop("architectures", None)
    if kind in ("bert", "distilbert"):
        (folder / "vocab.txt").write_bytes((SAMPLE / "tiny-bert" / "vocab.txt").read_bytes())
        config["vocab_size"] = TINY["vocab_size"]
    else:
        backend, roles = train_tokenizer(kind, texts)
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config |= {
            "vocab_size": backend.get_vocab_size(),
            "pad_token_id": backend.token_to_id(roles["pad_token"]),
        }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def command(folder: Path, output: Path, *more: object) -> list[str]:
    given = "--config", ROOT / "config.yaml", "--model_name_or_path", folder, "--output_dir", output
    return [sys.executable, str(ROOT / "train.py"), *map(str, (*given, *more))]


def run(arguments: list[str]) -> dict[str, Any]:
    """The last line of a whole run."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def killed_and_resumed(arguments: list[str], whole: Path, output: Path, kill_at: int) -> bool:
    """Whether a run that was killed and resumed ends with the same weights as the one that was not."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (output / f"checkpoint-{kill_at}" / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1.0)  # some steps further on
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise SystemExit(f"{output}: the run had ended before step {kill_at} was saved")
    run([*arguments, "--resume"])
    return (whole / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def largest_change(output: Path) -> float:
    """The largest difference between predictions.tsv and transformers' probabilities for the dev rows."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    rows = [line.split("\t") for line in (SAMPLE / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    lines = [line.split("\t") for line in (output / "predictions.tsv").read_text().splitlines()]
    names = [f"prob_{model.config.id2label[i]}" for i in range(model.config.num_labels)]
    columns = [lines[0].index(name) for name in names]
    largest = 0.0
    with torch.inference_mode():
        for row, line in zip(rows, lines[1:], strict=True):
            encoded = tokenizer(row[1], row[2], truncation="longest_first", return_tensors="pt")
            expected = model(**encoded).logits[0].double().softmax(-1).tolist()
            found = [float(line[column]) for column in columns]
            largest = max(largest, *(abs(a - b) for a, b in zip(expected, found, strict=True)))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--kill_at", type=int, default=1500, help="0: no run is killed")
    parser.add_argument("--max_steps", type=int, default=-1, help="shorter runs, which learn less")
    args = parser.parse_args()
    texts = sample_texts()
    print(
        "| model_type | seed | acc | macro_f1 | seconds | resumed the same | largest change in transformers |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in args.families:
            folder = write_family(kind, Path(temporary, kind), texts)
            for seed in args.seeds:
                output, start = Path(temporary, f"{kind}-{seed}"), time.monotonic()
                settings = "--seed", seed, "--max_steps", args.max_steps
                metrics = run(command(folder, output, *settings))["metrics"]
                seconds, same = time.monotonic() - start, "not asked"
                if args.kill_at and seed == args.seeds[0]:
                    again = Path(temporary, f"{kind}-{seed}-killed")
                    start_again = command(folder, again, *settings, "--save_steps", args.kill_at)
                    same = "yes" if killed_and_resumed(start_again, output, again, args.kill_at) else "NO"
                figures = f"{metrics['acc']:.4f} | {metrics['macro_f1']:.4f} | {seconds:.0f}"
                print(f"| {kind} | {seed} | {figures} | {same} | {largest_change(output):.1e} |", flush=True)


if __name__ == "__main__":
    main()
