"""The training loop in plain sight: data, model, AdamW, loop, evaluation, saved folder, from top to bottom.

`python examples/minimal_train.py` trains the embedded sample; flags name your own files. The folder that it
writes is read by evaluate.py, serve.py and Hugging Face. With the same settings, on a CPU, train.py ends with
the same weights, bit for bit. It adds what long runs need: checkpoints, resume, mixed precision and more.
Shapes: B rows of a batch, L tokens of its longest row, C labels.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bertpair need not be installed

from bertpair.data.batching import epoch_batches, pad_batch, padded_lengths
from bertpair.data.columns import Columns
from bertpair.data.tokenizer import Tokenizer
from bertpair.data.tsv import read_pairs
from bertpair.model.bert import BertClassifier
from bertpair.model.config import config_json, read_folder
from bertpair.model.pretrained import load_model, resolve_folder, state_tensors
from bertpair.training.optim import AdamW


@dataclasses.dataclass
class Settings:
    """The names are train.py's. Each setting is also a flag."""

    train_file: str = "data/train.tsv"
    dev_file: str = "data/dev.tsv"
    text_a_column: str = "sentence1"
    text_b_column: str = "sentence2"
    label_column: str = "label"
    model_name_or_path: str = "data/tiny-bert"  # this folder has no weights: training starts from random ones
    output_dir: str = "minimal"
    max_seq_length: int = 40
    per_device_train_batch_size: int = 32
    num_train_epochs: int = 16
    learning_rate: float = 5e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 42


def main(settings: Settings) -> float:
    """Train, write the model of the best epoch, and return its accuracy on the dev file."""
    output = Path(settings.output_dir)
    if (output / "manifest.json").exists():  # it holds checksums of what train.py wrote
        sys.exit(f"error: {output} was written by train.py; choose another --output_dir")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # Data: text → token ids, label → its place in `labels`. Rows of like length share a batch, so that little
    # of a batch is padding (up to a multiple of 8 tokens).
    columns = Columns(settings.text_a_column, settings.text_b_column, settings.label_column)
    train = read_pairs([settings.train_file], columns)
    labels = sorted(set(train.labels))
    dev = read_pairs([settings.dev_file], columns, labels=labels)  # an unknown label is an error
    cut, folder = settings.max_seq_length, read_folder(resolve_folder(settings.model_name_or_path))
    tokenizer = Tokenizer.from_folder(folder.path, word_table=folder.config.vocab_size)
    pad_id = tokenizer.pad_id
    train_tokens, dev_tokens = (tokenizer.encode(each.text_a, each.text_b, cut) for each in (train, dev))
    train_ids, dev_ids = (np.array([labels.index(label) for label in each.labels]) for each in (train, dev))
    lengths = padded_lengths(train_tokens.lengths, 8, cut)

    # The seed decides everything random: here the first weights, later dropout. Only the order of the rows
    # has a generator of its own, with the same seed.
    torch.manual_seed(settings.seed)
    model, notes = load_model(folder, num_labels=len(labels), new_head=True, from_scratch=True)
    print(*notes, sep="\n")
    model.to(device).train()

    # Weight decay moves each weight towards 0 at every step. Biases and LayerNorm do not decay.
    groups = [{"params": [], "weight_decay": settings.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[name.endswith("bias") or "norm" in name]["params"].append(parameter)
    parameters = groups[0]["params"] + groups[1]["params"]
    optimizer = AdamW(groups, lr=settings.learning_rate)

    batch_size = settings.per_device_train_batch_size
    total_steps = settings.num_train_epochs * math.ceil(len(train) / batch_size)
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    step, best_accuracy, best_weights = 0, -1.0, {}
    for epoch in range(settings.num_train_epochs):
        losses = []
        for rows in epoch_batches(lengths, batch_size, seed=settings.seed, epoch=epoch, group_by_length=True):
            # The learning rate rises from 0 during the warm-up, while Adam's averages are still of few
            # gradients. Then it falls to 0 in a straight line.
            factor = step / warmup if step < warmup else (total_steps - step) / (total_steps - warmup)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor

            batch = pad_batch(train_tokens, rows, pad_id=pad_id, targets=train_ids, max_length=cut).to(device)
            logits = model(batch.input_ids, batch.token_type_ids, batch.attention_mask)  # (B, L) → (B, C)
            loss = F.cross_entropy(logits, batch.targets)  # mean over the B rows
            loss.backward()

            # Clipping: one unusual batch must not change the weights too much. The norm is that of all
            # gradients as one vector. A longer one than max_grad_norm is scaled down to it.
            norms = [torch.linalg.vector_norm(parameter.grad) for parameter in parameters]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            clip = torch.clamp(settings.max_grad_norm / (norm + 1e-6), max=1.0)
            optimizer.step(grad_scale=1 / clip)  # it divides the gradients by grad_scale
            model.zero_grad()
            losses.append(loss.detach())  # stays on the device: reading it would wait for the GPU
            step += 1

        accuracy = evaluate(model, dev_tokens, dev_ids, pad_id, device)
        print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.4f}, dev accuracy {accuracy:.4f}")
        if accuracy > best_accuracy:  # the last epoch is not always the best
            best_accuracy, best_weights = accuracy, {n: t.clone() for n, t in model.state_dict().items()}

    model.load_state_dict(best_weights)
    output.mkdir(parents=True, exist_ok=True)
    save_file(state_tensors(model), output / "model.safetensors", metadata={"format": "pt"})
    config = config_json(model.config, labels, folder.raw, takes_pairs=True, header=train.header)
    files = {"config.json": config, **tokenizer.files(cut)}  # config.json has the labels in id order too
    files["training_args.yaml"] = yaml.safe_dump({**vars(settings), "amp": "off"}).encode()  # for evaluate.py
    for name, content in files.items():
        (output / name).write_bytes(content)
    print(f"{output}: dev accuracy {best_accuracy:.4f}")
    return best_accuracy


@torch.inference_mode()
def evaluate(model: BertClassifier, tokens, targets, pad_id: int, device: torch.device) -> float:
    """The part of the rows whose largest logit is that of their label."""
    model.eval()  # no dropout
    num_right = 0
    for rows in np.split(np.arange(len(tokens)), range(64, len(tokens), 64)):
        batch = pad_batch(tokens, rows, pad_id=pad_id, targets=targets).to(device)
        logits = model(batch.input_ids, batch.token_type_ids, batch.attention_mask)  # (B, C)
        num_right += (logits.argmax(dim=1) == batch.targets).sum().item()
    model.train()
    return num_right / len(tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Each setting, and its default:")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help="%(default)s")
    main(Settings(**vars(parser.parse_args())))
