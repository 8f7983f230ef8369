"""A folder's `tokenizer.json` or `vocab.txt` as a checked WordPiece pipeline.

tokenizer.json wins, and a vocab.txt beside it must list the same entries. Casing and accents follow
tokenizer_config.json even where tokenizer.json's normalizer says otherwise (with a warning): transformers'
BertTokenizer does so, and a model trained there saw those ids.
"""

import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bertpair.errors import CheckpointError, list_faults
from bertpair.settings.files import read_json

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
MASK_TOKEN = "[MASK]"  # not needed for classification, kept special where the vocabulary has it
RESERVED = (*SPECIAL_TOKENS, MASK_TOKEN)
NORMALIZER_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
BERT_CLASSES = tuple(  # one pipeline in transformers; DistilBert's has no token types
    f"{name}Tokenizer{fast}" for name in ("Bert", "Electra", "MobileBert") for fast in ("", "Fast")
)
NETWORKS = ("bert", "electra", "mobilebert")  # whose tokenizer it is where no class is named
STANDARD = {  # what the folder may say of the pipeline; anything else would change ids
    "do_basic_tokenize": (True,),
    "never_split": ([],),
    "word_tokenizer_type": ("basic", "wordpiece"),
    "subword_tokenizer_type": ("wordpiece",),
    "clean_text": (True,),
    "wordpieces_prefix": ("##",),
    "truncation_side": ("right",),
    "fast_tokenizer_files": (["tokenizer.json"],),
    **{f"{token[1:-1].lower()}_token": (token,) for token in RESERVED},
}
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # there tokenizer.json alone rules
MOJIBAKE_SHARE = 0.1  # of the entries that are not ASCII; 0 in Google's vocabularies, 0.98 in a broken copy
MAX_SPARE_ROWS = 127  # rows of the word table beyond the vocabulary: padding to a round number


@dataclass(frozen=True)
class WordPiece:
    """A pipeline ready to encode, and what the folder says about it."""

    backend: tokenizers.Tokenizer
    lower_case: bool
    settings: Mapping[str, Any]  # tokenizer_config.json, empty without one


def read_wordpiece(
    folder: Path, settings: Mapping[str, Any], added: Collection[str], do_lower_case: bool | None = None
) -> WordPiece:
    """Read and check the folder's tokenizer; raises CheckpointError.

    `settings` is its tokenizer_config.json, `added` the tokens that its texts may hold whole. `do_lower_case`
    None follows the settings, then tokenizer.json's normalizer, then the vocabulary: cased if an entry
    outside brackets has an upper-case letter.
    """
    path = folder / "tokenizer.json"
    declared = check_declared(settings, folder, has_json=path.is_file())
    if path.is_file():
        backend = read_tokenizer_json(path)
        if (folder / "vocab.txt").is_file():
            compare_vocabularies(backend, folder)
        refuse_unknown_tokens(backend, added, path)
        if declared in BERT_CLASSES and not is_standard(backend):
            raise CheckpointError(
                f"{path}: its pipeline is another than that of {declared}, which the folder names as "
                "tokenizer_class; PreTrainedTokenizerFast there means tokenizer.json as it stands"
            )
        if declared in GENERIC_CLASSES:
            settings = {name: value for name, value in settings.items() if name not in NORMALIZER_SETTINGS}
    else:
        path = folder / "vocab.txt"
        vocabulary = read_vocabulary(path)
        check_vocabulary(vocabulary, path)
        refuse_added_tokens(added, path)
        backend = build_backend(vocabulary)
    lower_case = set_casing(backend, path, settings, do_lower_case)
    finish_backend(backend, path)
    return WordPiece(backend, lower_case, settings)


def check_declared(settings: Mapping[str, Any], folder: Path, *, has_json: bool) -> str | None:
    """The tokenizer class that the folder names, if any; CheckpointError where it declares another pipeline
    than BERT's WordPiece."""
    place = folder / "tokenizer_config.json"
    declared = settings.get("tokenizer_class")
    special = folder / "special_tokens_map.json"
    faults = _other_pipeline(settings, place) + _other_pipeline(read_if_there(special), special)
    if declared is None:
        place = folder / "config.json"
        config = read_if_there(place)
        declared = config.get("tokenizer_class")
        faults += _own_code(config, place)
        network = config.get("model_type")
        if declared is None and network is not None and network not in NETWORKS:
            faults.append(
                f"{place}: model_type: found {network!r:.80}, whose tokenizer is not BERT's WordPiece"
            )
    allowed = (*BERT_CLASSES, *GENERIC_CLASSES) if has_json else BERT_CLASSES
    if declared is not None and declared not in allowed:
        needs = ", which needs a tokenizer.json" if declared in GENERIC_CLASSES else ""
        faults.append(
            f"{place}: tokenizer_class: found {declared!r:.80}{needs}; only BERT's WordPiece is supported "
            f"({', '.join(allowed)})"
        )
    if faults:
        raise CheckpointError(list_faults(faults))
    return declared


def _other_pipeline(said: Mapping[str, Any], place: Path) -> list[str]:
    """What a settings file of the folder says that is not BERT's WordPiece."""
    faults = _own_code(said, place)
    for name, usual in STANDARD.items():
        value = said.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and value not in usual:
            faults.append(f"{place}: {name}: found {value!r:.80}; only {usual[0]!r} is supported")
    inputs = said.get("model_input_names")
    if inputs is not None and not (isinstance(inputs, list) and "token_type_ids" in inputs):
        faults.append(
            f"{place}: model_input_names: found {inputs!r:.80}; only a model that was trained with "
            "token_type_ids is supported"
        )
    return faults


def _own_code(said: Mapping[str, Any], place: Path) -> list[str]:
    names = said.get("auto_map")
    if not names or (isinstance(names, dict) and "AutoTokenizer" not in names):
        return []
    return [f"{place}: auto_map: names a tokenizer in code of its own, which is never run"]


def read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


def read_vocabulary(path: Path) -> list[str]:
    """The lines of a vocab.txt, in id order; blank lines at the end are not entries."""
    if not path.exists():
        raise CheckpointError(f"{path.parent}: no tokenizer.json and no vocab.txt; one of them is needed")
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise CheckpointError(f"{path}:{line}: not UTF-8 ({e.reason}); save the vocabulary as UTF-8") from e
    # Only \n ends a line: bert-base-chinese has U+2028 as an entry, which str.splitlines would break.
    entries = [strip_entry(line) for line in text.rstrip("\r\n").split("\n")]
    if entries == [""]:
        raise CheckpointError(f"{path}: empty; a vocabulary with one entry a line is expected")
    return entries


def strip_entry(line: str) -> str:
    """Blanks at a line's end are no part of an entry, unless the entry is nothing else."""
    stripped = line.rstrip()
    return line.rstrip("\r") if stripped in ("", "##") else stripped


def check_vocabulary(entries: Sequence[str], path: Path) -> None:
    """Refuse a list of entries that cannot be what a BERT was trained with."""
    refuse_missing_specials(entries, path)
    broken = find_mojibake(entries)
    if broken:
        example, meant = broken
        raise CheckpointError(
            f"{path}: UTF-8 read as Windows-1252 and saved again: {example!r} was {meant!r}; "
            "get an undamaged copy of the vocabulary"
        )
    repeated = {entry for entry, count in Counter(entries).items() if count > 1}
    if not repeated:
        return
    first: dict[str, int] = {}
    faults = []
    for line, entry in enumerate(entries, start=1):
        if entry in repeated and first.setdefault(entry, line) != line:
            faults.append(f"{path}:{line}: {entry!r} stands already in line {first[entry]}")
    raise CheckpointError(list_faults(faults) + "\neach entry of a vocabulary may stand there once")


def refuse_missing_specials(entries: Sequence[str], path: Path) -> None:
    present = set(entries)
    missing = [token for token in SPECIAL_TOKENS if token not in present]
    if not missing:
        return
    lowered = [token.lower() for token in missing if token.lower() in present]
    hint = f" (it has {', '.join(lowered)}: a lower-cased copy?)" if lowered else ""
    raise CheckpointError(
        f"{path}: {', '.join(missing)} not in the vocabulary{hint}; "
        "a BERT vocabulary has [PAD], [UNK], [CLS] and [SEP], spelt like this"
    )


def find_mojibake(entries: Sequence[str]) -> tuple[str, str] | None:
    """One (entry, what it was) if many entries look like UTF-8 bytes read in a one-byte encoding."""
    foreign = [entry for entry in entries if not entry.isascii()]
    sample = foreign[:: len(foreign) // 4000 + 1]
    pairs = [(entry, meant) for entry in sample if (meant := undo_mojibake(entry)) is not None]
    return pairs[0] if len(pairs) >= max(3, MOJIBAKE_SHARE * len(sample)) else None


def undo_mojibake(text: str) -> str | None:
    for encoding in ("cp1252", "latin-1"):
        try:
            return text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
    return None


def refuse_added_tokens(added: Collection[str], path: Path) -> None:
    """Tokens that a tokenizer adds to vocab.txt: leaving them out would change ids silently."""
    if added:
        raise CheckpointError(
            f"{path.parent}: {len(added)} tokens are added to vocab.txt ({min(added)!r}, …), which "
            "only a tokenizer.json says in full; save_pretrained of transformers' AutoTokenizer writes one"
        )


def refuse_unknown_tokens(backend: tokenizers.Tokenizer, added: Collection[str], path: Path) -> None:
    """Tokens that the folder adds in another file, and tokenizer.json does not."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = sorted(set(added) - known)
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} tokens that other files of the folder add ({missing[0]!r}, …); "
            "save_pretrained of transformers' AutoTokenizer writes one that has them"
        )


def build_backend(vocabulary: Sequence[str]) -> tokenizers.Tokenizer:
    numbers = {entry: number for number, entry in enumerate(vocabulary)}
    backend = tokenizers.Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = read_markers(tokenizers.Tokenizer.from_buffer(read_bytes(path)))
    except CheckpointError:
        raise
    except Exception as e:  # the library raises bare Exception for whatever it cannot parse
        raise CheckpointError(f"{path}: not a tokenizer: {e}") from e
    model = backend.model
    if not isinstance(model, models.WordPiece) or model.unk_token != "[UNK]":
        kind = type(model).__name__
        raise CheckpointError(f"{path}: a {kind} model; WordPiece with the unknown token [UNK] is expected")
    by_number = entries_by_number(backend)
    entries = [by_number.get(number, "") for number in range(max(by_number, default=-1) + 1)]
    check_vocabulary([entry for entry in entries if entry], path)
    refuse_other_template(backend, path)
    return backend


def read_markers(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same with special tokens of the folder's own (<e1>) as plain added ones: texts may hold them."""
    content = json.loads(backend.to_str())
    own = [t for t in content["added_tokens"] if t["special"] and t["content"] not in RESERVED]
    for token in own:
        token["special"] = False
    return tokenizers.Tokenizer.from_str(json.dumps(content)) if own else backend


def refuse_other_template(backend: tokenizers.Tokenizer, path: Path) -> None:
    """CheckpointError where tokenizer.json cuts at the left, or joins texts otherwise than
    [CLS] a [SEP] b [SEP]."""
    if (backend.truncation or {}).get("direction", "right") != "right":
        raise CheckpointError(f"{path}: its truncation cuts texts at the left; only right is supported")
    if backend.post_processor is None:
        return
    backend.no_truncation()
    backend.no_padding()
    cls, sep = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    a, b = (backend.encode(text, add_special_tokens=False) for text in "ab")
    types = [0] * (len(a) + 2) + [1] * (len(b) + 1)
    single, pair = backend.encode("a"), backend.encode("a", "b")
    for found, ids in ((pair, [cls, *a.ids, sep, *b.ids, sep]), (single, [cls, *a.ids, sep])):
        if (found.ids, found.type_ids) != (ids, types[: len(ids)]):
            names = ["[CLS]", *a.tokens, "[SEP]", *b.tokens, "[SEP]"]
            expected = " ".join(names[: len(ids)])
            raise CheckpointError(
                f"{path}: its post_processor makes {' '.join(found.tokens)} (ids {found.ids}, types "
                f"{found.type_ids}); only BERT's is supported: {expected} (ids {ids}, types "
                f"{types[: len(ids)]})"
            )


def entries_by_number(backend: tokenizers.Tokenizer) -> dict[int, str]:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return {number: entry for entry, number in vocabulary.items()}


def compare_vocabularies(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """vocab.txt beside tokenizer.json must list the same entries (blanks at their ends aside)."""
    listed = read_vocabulary(folder / "vocab.txt")
    by_number = entries_by_number(backend)
    faults = []
    if len(listed) != max(by_number) + 1:
        faults.append(f"vocab.txt has {len(listed)} entries, tokenizer.json has {max(by_number) + 1}")
    for number, entry in sorted(by_number.items()):
        if number < len(listed) and listed[number].strip() != entry.strip():
            faults.append(f"id {number}: vocab.txt has {listed[number]!r}, tokenizer.json has {entry!r}")
    if faults:
        raise CheckpointError(
            f"{folder}: tokenizer.json and vocab.txt disagree; "
            f"remove the one that the model was not trained with\n{list_faults(faults)}"
        )


def set_casing(
    backend: tokenizers.Tokenizer, path: Path, settings: Mapping[str, Any], do_lower_case: bool | None
) -> bool:
    """Settle lower-casing, accents and Chinese characters in the pipeline; returns whether it lower-cases."""
    normalizer = backend.normalizer
    built_in = None
    if path.name == "tokenizer.json":
        built_in = normalizer is not None and normalizer.normalize_str("A") == "a"
    said = settings.get("do_lower_case")
    lower_case, source = choose_casing(backend, built_in, said, do_lower_case)
    if said is not None and lower_case != said:
        logger.warning("%s: do_lower_case is %s; the setting overrules it", path.parent, said)
    logger.info("%s: %s, says %s", path, "lower-cased" if lower_case else "cased", source)
    if built_in is not None and lower_case != built_in:
        logger.warning("%s: lower-casing is %s in its normalizer; %s overrules it", path, built_in, source)
    if isinstance(normalizer, normalizers.BertNormalizer):
        chinese = settings.get("tokenize_chinese_chars")
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=normalizer.clean_text,
            handle_chinese_chars=normalizer.handle_chinese_chars if chinese is None else chinese,
            strip_accents=settings.get("strip_accents", normalizer.strip_accents),
            lowercase=lower_case,
        )
    elif lower_case != built_in:
        raise CheckpointError(
            f"{path}: lower-casing is {built_in} in its normalizer, which is no BertNormalizer and cannot "
            f"follow {source}; change one of the two"
        )
    return lower_case


def choose_casing(
    backend: tokenizers.Tokenizer, built_in: bool | None, said: bool | None, do_lower_case: bool | None
) -> tuple[bool, str]:
    """Whether to lower-case, and who says so: the setting, the folder, tokenizer.json, the vocabulary."""
    if do_lower_case is not None:
        return do_lower_case, "the setting do_lower_case"
    if said is not None:
        return said, "tokenizer_config.json"
    if built_in is not None:
        return built_in, "its normalizer"
    entries = entries_by_number(backend).values()
    cased = any(entry != entry.lower() and entry[0] + entry[-1] not in ("[]", "<>") for entry in entries)
    return not cased, f"the vocabulary ({'with' if cased else 'without'} upper-case entries)"


def finish_backend(backend: tokenizers.Tokenizer, path: Path) -> None:
    """No padding, no truncation, BERT's template, and user text that stays text."""
    backend.no_padding()
    backend.no_truncation()
    numbers = {token: backend.token_to_id(token) for token in RESERVED}
    backend.add_special_tokens([token for token, number in numbers.items() if number is not None])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    backend.encode_special_tokens = True  # not serialised: has to be set at every load
    typed = backend.encode("[PAD] [CLS] [SEP]", add_special_tokens=False).ids
    if {numbers["[PAD]"], numbers["[CLS]"], numbers["[SEP]"]} & set(typed):
        raise CheckpointError(
            f"{path}: its pre-tokenizer keeps a typed [SEP] whole, so that user text could act as a "
            "separator; BertPreTokenizer takes brackets apart"
        )


def is_standard(backend: tokenizers.Tokenizer) -> bool:
    """Whether transformers' BertTokenizer, which builds its own pipeline, gives the same ids."""
    normalizer, model = backend.normalizer, backend.model
    return (
        isinstance(normalizer, normalizers.BertNormalizer)
        and normalizer.clean_text
        and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(model, models.WordPiece)
        and (model.continuing_subword_prefix, model.max_input_chars_per_word) == ("##", 100)
    )


def check_size(size: int, word_table: int, folder: Path) -> None:
    """The vocabulary against the rows of the model's word table."""
    what = f"{folder}: a vocabulary of {size} entries for a word table of {word_table} rows"
    if size > word_table:
        raise CheckpointError(f"{what}; it may not be longer")
    if word_table - size > MAX_SPARE_ROWS:
        raise CheckpointError(f"{what}; it may be at most {MAX_SPARE_ROWS} shorter")
    if size < word_table:
        logger.info("%s", what)
