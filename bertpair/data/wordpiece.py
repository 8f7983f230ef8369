"""A folder's `tokenizer.json` or `vocab.txt` as a checked WordPiece pipeline.

tokenizer.json wins, and a vocab.txt beside it must list the same entries. Casing and accents follow
tokenizer_config.json even where tokenizer.json's normalizer says otherwise (with a warning): transformers'
BertTokenizer does so, and a model trained there saw those ids.
"""

import contextlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bertpair.data.pipeline import (
    GENERIC_CLASSES,
    SUPPORTED,
    Pipeline,
    check_added_tokens,
    drop_padding_and_cut,
    foreign_settings,
    named_class,
    read_if_there,
    read_tokenizer_json,
    with_special_tokens,
)
from bertpair.data.template import read_templates
from bertpair.errors import CheckpointError, list_faults, show

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MASK_TOKEN = "[MASK]"  # not needed for classification, kept special where the vocabulary has it
RESERVED = (*SPECIAL_TOKENS, MASK_TOKEN)
ROLE_OF = {token: f"{token[1:-1].lower()}_token" for token in RESERVED}
NORMALIZER_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
BERT_CLASSES = tuple(  # one pipeline in transformers
    f"{name}Tokenizer{fast}"
    for name in ("Bert", "Electra", "MobileBert", "DistilBert")
    for fast in ("", "Fast")
)
NETWORKS = ("bert", "electra", "mobilebert", "distilbert")  # whose tokenizer it is where no class is named
UNTYPED_NETWORKS = ("distilbert", "roberta", "xlm-roberta", "camembert", "modernbert")
STANDARD = {  # what the folder may say of the pipeline; anything else would change ids
    "do_basic_tokenize": (True,),
    "never_split": ([],),
    "clean_text": (True,),
    "wordpieces_prefix": ("##",),
    **SUPPORTED,
    **{role: (token,) for token, role in ROLE_OF.items()},
}
MOJIBAKE_SHARE = 0.1  # of the entries that are not ASCII; 0 in Google's vocabularies, 0.98 in a broken copy


def is_wordpiece(folder: Path) -> bool:
    """Whether the folder's tokenizer is BERT's: its class or network says so, or else what is there."""
    declared, network, _ = named_class(folder)
    if declared is not None and declared not in GENERIC_CLASSES:
        return declared in BERT_CLASSES
    if declared is None and network is not None:
        return network in NETWORKS
    if not (path := folder / "tokenizer.json").is_file():
        return declared is None and not ((folder / "vocab.json").is_file() or any(folder.glob("*.model")))
    backend = read_tokenizer_json(path)
    backend.no_padding()
    backend.no_truncation()
    row = backend.encode("a", "a")
    marks = zip(row.tokens, row.type_ids, row.sequence_ids, strict=True)
    added = [(token, kind) for token, kind, text in marks if text is None]
    is_bert = added == [("[CLS]", 0), ("[SEP]", 0), ("[SEP]", 1)]
    is_bert &= None not in map(backend.token_to_id, SPECIAL_TOKENS)
    return isinstance(backend.model, models.WordPiece) and (is_bert or not added)


def read_wordpiece(folder: Path, do_lower_case: bool | None = None) -> Pipeline:
    """The folder's pipeline, which is BERT's; raises CheckpointError.

    `do_lower_case` None follows tokenizer_config.json, then tokenizer.json's normalizer, then the vocabulary:
    cased if an entry outside brackets has an upper-case letter.
    """
    settings = read_if_there(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    declared, input_names = _check_declared(settings, folder)
    if path.is_file():
        backend = _read_tokenizer_json(path)
        if (folder / "vocab.txt").is_file():
            _compare_vocabularies(backend, folder)
    else:
        path = folder / "vocab.txt"
        vocabulary = _read_vocabulary(path)
        _check_vocabulary(vocabulary, path)
        numbers = {entry: number for number, entry in enumerate(vocabulary)}
        backend = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
    check_added_tokens(backend, path, settings, RESERVED)
    if declared in BERT_CLASSES and not _is_standard(backend):
        raise CheckpointError(
            f"{path}: its pipeline is another than that of {declared}, which the folder names as "
            "tokenizer_class; PreTrainedTokenizerFast there means tokenizer.json as it stands"
        )
    if declared in GENERIC_CLASSES:
        settings = {name: value for name, value in settings.items() if name not in NORMALIZER_SETTINGS}
    lower_case = _set_casing(backend, path, settings, do_lower_case)
    drop_padding_and_cut(backend, path, settings)
    _finish_backend(backend, path)
    config: dict[str, Any] = {
        "model_max_length": settings.get("model_max_length"),
        "truncation": settings.get("truncation"),
        "tokenizer_class": "BertTokenizer" if _is_standard(backend) else "PreTrainedTokenizerFast",
        "model_input_names": input_names,
        "do_lower_case": lower_case,
        **{ROLE_OF[token]: token for token in SPECIAL_TOKENS},
        # Left out, transformers would add a [MASK] beyond the vocabulary.
        "mask_token": MASK_TOKEN if backend.token_to_id(MASK_TOKEN) is not None else None,
    }
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        config["strip_accents"] = normalizer.strip_accents
        config["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
    templates = read_templates(backend, path, input_names)
    return Pipeline(backend, backend.to_str(), config, lower_case, templates)


def _check_declared(settings: Mapping[str, Any], folder: Path) -> tuple[str | None, list[str]]:
    """The tokenizer class that the folder names, if any, and what it gives a network; or CheckpointError."""
    place = folder / "tokenizer_config.json"
    declared, network, found = named_class(folder)
    files = ["tokenizer_config.json", "special_tokens_map.json"]
    files += [] if settings.get("tokenizer_class") else ["config.json"]
    faults = [
        fault
        for name in files
        for fault in foreign_settings(read_if_there(folder / name), folder / name, STANDARD)
    ]
    for name in NORMALIZER_SETTINGS:
        if not isinstance(settings.get(name), bool | None):
            faults.append(f"{place}: {name} is {show(settings[name])}; true, false or null is allowed")
    has_types = network not in UNTYPED_NETWORKS and not (declared or "").startswith("DistilBert")
    usual = ["input_ids", *["token_type_ids"] * has_types, "attention_mask"]
    inputs = settings.get("model_input_names") or usual
    if not isinstance(inputs, list) or (
        "token_type_ids" not in inputs and network not in (None, *UNTYPED_NETWORKS)
    ):
        said = found if inputs is usual else f"{place}: model_input_names: found {show(inputs)}"
        faults.append(f"{said}; only a model that was trained with token_type_ids is supported")
    if faults:
        raise CheckpointError(list_faults(faults))
    return declared, inputs


def _read_vocabulary(path: Path) -> list[str]:
    """The lines of a vocab.txt, in id order; blank lines at the end are not entries."""
    if not path.exists():
        raise CheckpointError(f"{path.parent}: no tokenizer.json and no vocab.txt; one of them is needed")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise CheckpointError(f"{path}:{line}: not UTF-8 ({e.reason}); save the vocabulary as UTF-8") from e
    # Only \n ends a line: bert-base-chinese has U+2028 as an entry, which str.splitlines would break.
    # Blanks at a line's end are no part of an entry, unless the entry is nothing else.
    lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    entries = [line if line.rstrip() in ("", "##") else line.rstrip() for line in lines]
    if entries == [""]:
        raise CheckpointError(f"{path}: empty; a vocabulary with one entry a line is expected")
    return entries


def _check_vocabulary(entries: Sequence[str], path: Path) -> None:
    """Refuse a list of entries that cannot be what a BERT was trained with."""
    first: dict[str, int] = {}
    again = [each for each in enumerate(entries, start=1) if first.setdefault(each[1], each[0]) != each[0]]
    if missing := [token for token in SPECIAL_TOKENS if token not in first]:
        lowered = [token.lower() for token in missing if token.lower() in first]
        hint = f" (it has {', '.join(lowered)}: a lower-cased copy?)" if lowered else ""
        raise CheckpointError(
            f"{path}: {', '.join(missing)} not in the vocabulary{hint}; "
            "a BERT vocabulary has [PAD], [UNK], [CLS] and [SEP], spelt like this"
        )
    foreign = [entry for entry in entries if not entry.isascii()]
    sample = foreign[:: len(foreign) // 4000 + 1]
    broken = []
    for entry, encoding in itertools.product(sample, ("cp1252", "latin-1")):
        with contextlib.suppress(UnicodeError):
            broken.append((entry, entry.encode(encoding).decode("utf-8")))
    if len(dict(broken)) >= max(3, MOJIBAKE_SHARE * len(sample)):
        raise CheckpointError(
            f"{path}: UTF-8 read as Windows-1252 and saved again: {broken[0][0]!r} was {broken[0][1]!r}; "
            "get an undamaged copy of the vocabulary"
        )
    if again:
        faults = [f"{path}:{line}: {entry!r} stands already in line {first[entry]}" for line, entry in again]
        raise CheckpointError(list_faults(faults) + "\neach entry of a vocabulary may stand there once")


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Its pipeline; the folder's own special tokens (<e1>) become plain added ones: texts may hold them."""
    backend = with_special_tokens(read_tokenizer_json(path), RESERVED)
    if not isinstance(backend.model, models.WordPiece) or backend.model.unk_token != "[UNK]":
        kind = type(backend.model).__name__
        raise CheckpointError(f"{path}: a {kind} model; WordPiece with the unknown token [UNK] is expected")
    _check_vocabulary([entry for entry in entries_of(backend) if entry], path)
    return backend


def entries_of(backend: tokenizers.Tokenizer) -> list[str]:
    """The vocabulary in id order, without added tokens; "" for an id that no entry has."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    entries = [""] * (max(vocabulary.values(), default=-1) + 1)
    for entry, number in vocabulary.items():
        entries[number] = entry
    return entries


def _compare_vocabularies(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """vocab.txt beside tokenizer.json must list the same entries (blanks at their ends aside)."""
    ours, theirs = entries_of(backend), _read_vocabulary(folder / "vocab.txt")
    faults = [
        f"id {number}: vocab.txt has {line!r}, tokenizer.json has {entry!r}"
        for number, (entry, line) in enumerate(zip(ours, theirs, strict=False))
        if entry and line.strip() != entry.strip()
    ]
    if len(theirs) != len(ours):
        faults.insert(0, f"vocab.txt has {len(theirs)} entries, tokenizer.json has {len(ours)}")
    if faults:
        raise CheckpointError(
            f"{folder}: tokenizer.json and vocab.txt disagree; "
            f"remove the one that the model was not trained with\n{list_faults(faults)}"
        )


def _set_casing(
    backend: tokenizers.Tokenizer, path: Path, settings: Mapping[str, Any], do_lower_case: bool | None
) -> bool:
    """Settle lower-casing, accents and Chinese characters in the pipeline; returns whether it lower-cases."""
    normalizer = backend.normalizer
    built_in = None
    if path.name == "tokenizer.json":
        built_in = normalizer is not None and normalizer.normalize_str("A") == "a"
    asked = (do_lower_case, "the setting"), (settings.get("do_lower_case"), "tokenizer_config.json")
    said = [(value, who) for value, who in (*asked, (built_in, "its normalizer")) if value is not None]
    if not said:
        upper = [entry for entry in entries_of(backend) if entry != entry.lower()]
        is_lower = all(entry[0] + entry[-1] in ("[]", "<>") for entry in upper)
        said = [(is_lower, f"the vocabulary, which has {'no ' * is_lower}upper-case entries")]
    lower_case, source = said[0]
    logger.info("%s: %s, by %s", path, "uncased" if lower_case else "cased", source)
    for value, who in said:
        if value != lower_case:
            logger.warning("%s: lower-casing is %s in %s; %s overrules it", path, value, who, source)
    if isinstance(normalizer, normalizers.BertNormalizer):
        if (chinese := settings.get("tokenize_chinese_chars")) is not None:
            normalizer.handle_chinese_chars = chinese
        normalizer.strip_accents = settings.get("strip_accents", normalizer.strip_accents)
        normalizer.lowercase = lower_case
        backend.normalizer = normalizer
    elif lower_case != built_in:
        raise CheckpointError(
            f"{path}: lower-casing is {built_in} in its normalizer, which is no BertNormalizer and cannot "
            f"follow {source}; change one of the two"
        )
    return lower_case


def _finish_backend(backend: tokenizers.Tokenizer, path: Path) -> None:
    """BERT's template, and user text that stays text."""
    has_template = backend.post_processor is not None
    theirs = backend.encode("a", "b"), backend.encode("a")
    numbers = {token: backend.token_to_id(token) for token in RESERVED}
    backend.add_special_tokens([token for token, number in numbers.items() if number is not None])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    made = [  # of a pair and of a single text
        [f"{' '.join(row.tokens)} (ids {row.ids}, types {row.type_ids})" for row in rows]
        for rows in zip(theirs, (backend.encode("a", "b"), backend.encode("a")), strict=True)
    ]
    for found, expected in made if has_template else ():
        if found != expected:
            raise CheckpointError(
                f"{path}: its post_processor makes {found}; only BERT's is supported: {expected}"
            )
    backend.encode_special_tokens = True  # not serialised: has to be set at every load
    if not {numbers[token] for token in SPECIAL_TOKENS if token != "[UNK]"}.isdisjoint(
        backend.encode("[PAD] [CLS] [SEP]", add_special_tokens=False).ids
    ):
        raise CheckpointError(
            f"{path}: its pre-tokenizer keeps a typed [SEP] whole, so that user text could act as a "
            "separator; BertPreTokenizer takes brackets apart"
        )


def _is_standard(backend: tokenizers.Tokenizer) -> bool:
    """Whether transformers' BertTokenizer, which builds its own pipeline, gives the same ids."""
    normalizer, model = backend.normalizer, backend.model
    return (
        isinstance(normalizer, normalizers.BertNormalizer)
        and normalizer.clean_text
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(model, models.WordPiece)
        and (model.continuing_subword_prefix, model.max_input_chars_per_word) == ("##", 100)
    )
