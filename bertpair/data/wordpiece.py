"""A folder's `tokenizer.json` or `vocab.txt` as a checked WordPiece pipeline.

tokenizer.json wins, and a vocab.txt beside it must list the same entries. Casing and accents follow
tokenizer_config.json even where tokenizer.json's normalizer says otherwise (with a warning): transformers'
BertTokenizer does so, and a model trained there saw those ids.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bertpair.errors import CheckpointError, list_faults, show
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


def read_wordpiece(
    folder: Path, do_lower_case: bool | None = None
) -> tuple[tokenizers.Tokenizer, bool, dict[str, Any]]:
    """The folder's pipeline, whether it lower-cases, and its tokenizer_config.json; raises CheckpointError.

    `do_lower_case` None follows tokenizer_config.json, then tokenizer.json's normalizer, then the vocabulary:
    cased if an entry outside brackets has an upper-case letter.
    """
    settings = _read_if_there(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    declared = _check_declared(settings, folder, has_json=path.is_file())
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
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if missing := sorted(_added_tokens(folder, settings) - known):
        raise CheckpointError(
            f"{folder}: {len(missing)} tokens are added to {path.name} ({show(missing[0])}, …) by other "
            "files; save_pretrained of transformers' AutoTokenizer writes a tokenizer.json that has them"
        )
    if declared in BERT_CLASSES and not is_standard(backend):
        raise CheckpointError(
            f"{path}: its pipeline is another than that of {declared}, which the folder names as "
            "tokenizer_class; PreTrainedTokenizerFast there means tokenizer.json as it stands"
        )
    if declared in GENERIC_CLASSES:
        settings = {name: value for name, value in settings.items() if name not in NORMALIZER_SETTINGS}
    lower_case = _set_casing(backend, path, settings, do_lower_case)
    _finish_backend(backend, path)
    return backend, lower_case, settings


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _check_declared(settings: Mapping[str, Any], folder: Path, *, has_json: bool) -> str | None:
    """The tokenizer class that the folder names, if any; CheckpointError for another than BERT's pipeline."""
    place, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    faults = _other_pipeline(settings, place) + _other_pipeline(_read_if_there(special), special)
    for name in NORMALIZER_SETTINGS:
        if not isinstance(settings.get(name), bool | None):
            faults.append(f"{place}: {name} is {show(settings[name])}; true, false or null is allowed")
    declared = settings.get("tokenizer_class")
    if declared is None:
        place = folder / "config.json"
        config = _read_if_there(place)
        declared, network = config.get("tokenizer_class"), config.get("model_type")
        faults += _other_pipeline(config, place)
        if declared is None and network not in (None, *NETWORKS):
            faults.append(
                f"{place}: model_type: found {show(network)}, whose tokenizer is not BERT's WordPiece"
            )
    allowed = (*BERT_CLASSES, *GENERIC_CLASSES) if has_json else BERT_CLASSES
    if declared is not None and declared not in allowed:
        needs = ", which needs a tokenizer.json" if declared in GENERIC_CLASSES else ""
        faults.append(
            f"{place}: tokenizer_class: found {show(declared)}{needs}; only BERT's WordPiece is supported "
            f"({', '.join(allowed)})"
        )
    if faults:
        raise CheckpointError(list_faults(faults))
    return declared


def _other_pipeline(said: Mapping[str, Any], place: Path) -> list[str]:
    """What a settings file of the folder says that is not BERT's WordPiece."""
    faults = []
    own = said.get("auto_map")
    if own and not (isinstance(own, dict) and "AutoTokenizer" not in own):
        faults.append(f"{place}: auto_map: names a tokenizer in code of its own, which is never run")
    for name, usual in STANDARD.items():
        value = said.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and value not in usual:
            faults.append(f"{place}: {name}: found {show(value)}; only {usual[0]!r} is supported")
    inputs = said.get("model_input_names")
    if inputs is not None and not (isinstance(inputs, list) and "token_type_ids" in inputs):
        faults.append(
            f"{place}: model_input_names: found {show(inputs)}; only a model that was trained with "
            "token_type_ids is supported"
        )
    return faults


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> set[str]:
    """Tokens beside BERT's own five that the folder's small files say texts may hold whole."""
    is_ours = (folder / "manifest.json").is_file()  # which never names such a file, so it is not read
    found = set() if is_ours else set(_read_if_there(folder / "added_tokens.json"))
    try:
        found |= {token["content"] for token in settings.get("added_tokens_decoder", {}).values()}
        for said in (settings, _read_if_there(folder / "special_tokens_map.json")):
            for name in ("additional_special_tokens", "extra_special_tokens"):
                extra = said.get(name) or []
                tokens = extra.values() if isinstance(extra, dict) else extra
                found |= {token if isinstance(token, str) else token["content"] for token in tokens}
    except (AttributeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: its added tokens cannot be read ({e!r})") from e
    return found - set(RESERVED)


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
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        content = json.loads(backend.to_str())
        own = [t for t in content["added_tokens"] if t["special"] and t["content"] not in RESERVED]
        for token in own:
            token["special"] = False
        backend = tokenizers.Tokenizer.from_str(json.dumps(content)) if own else backend
    except Exception as e:  # the library raises bare Exception for whatever it cannot parse
        raise CheckpointError(f"{path}: not a tokenizer: {e}") from e
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
    """No padding, no truncation, BERT's template, and user text that stays text."""
    if (backend.truncation or {}).get("direction", "right") != "right":
        raise CheckpointError(f"{path}: its truncation cuts texts at the left; only right is supported")
    backend.no_padding()
    backend.no_truncation()
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
