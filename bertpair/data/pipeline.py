"""A model folder's tokenizer.json as it stands: any kind of vocabulary, with its own special tokens.

Text stays text: a special token that a user types is taken apart. Vocabularies of Unigram hold `</s>` as a
piece, and a normalizer can make it of `<` and `／s>`, so a step after the pipeline's own breaks it in two.
The step is not written: transformers has no place for it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from bertpair.data.template import Template, read_templates
from bertpair.errors import CheckpointError, list_faults, show
from bertpair.settings.files import read_json

logger = logging.getLogger(__name__)

ROLES = tuple(f"{role}_token" for role in ("unk", "sep", "pad", "cls", "mask", "bos", "eos"))
USUAL = {  # special tokens by name, where no file says their role
    **{"<unk>": "unk_token", "[UNK]": "unk_token", "<mask>": "mask_token", "[MASK]": "mask_token"},
    **{"<pad>": "pad_token", "[PAD]": "pad_token", "[CLS]": "cls_token", "[SEP]": "sep_token"},
    **{"<s>": "bos_token", "<bos>": "bos_token", "</s>": "eos_token", "<eos>": "eos_token"},
}
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
SUPPORTED = {  # what the folder may say of the pipeline; anything else would change ids
    "word_tokenizer_type": ("basic", "wordpiece"),
    "subword_tokenizer_type": ("wordpiece",),
    "truncation_side": ("right",),
    "fast_tokenizer_files": (["tokenizer.json"],),
}
KEPT = ("additional_special_tokens", "extra_special_tokens", "model_max_length", "truncation")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # there tokenizer.json alone rules
ROBERTA_CLASSES = ("RobertaTokenizer", "RobertaTokenizerFast")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What turns text into token ids, and the files that say so to others."""

    backend: tokenizers.Tokenizer  # pads and cuts nothing, and reads no special token in a text
    document: str  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json; its names of special tokens are those in use
    lower_case: bool
    templates: tuple[Template, Template]  # of single texts and of pairs

    def __reduce__(self) -> tuple[Any, ...]:
        return Pipeline, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True  # not serialised: copies and pickles forget it


def read_pipeline(folder: Path, do_lower_case: bool | None = None) -> Pipeline:
    """The folder's tokenizer.json, or RoBERTa's vocab.json and merges.txt; raises CheckpointError.

    `do_lower_case` may only say what the pipeline does: it cannot be changed in one of another's making.
    """
    path = folder / "tokenizer_config.json"
    settings = read_if_there(path)
    if faults := foreign_settings(settings, path, SUPPORTED):
        raise CheckpointError(list_faults(faults))
    path = folder / "tokenizer.json"
    if not path.is_file():
        path = folder / "vocab.json"
    backend = read_tokenizer_json(path) if path.name == "tokenizer.json" else _read_byte_level(path)
    if _is_roberta(folder) and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        # Whatever tokenizer.json says: transformers' class makes this step itself.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(bool(settings.get("add_prefix_space")))
    said = json.loads(backend.to_str())
    if said["model"].get("dropout"):
        raise CheckpointError(f"{path}: its model has dropout, which gives a text other ids each time")
    config, names = _written(backend, said, folder, settings), settings.get("model_input_names")
    drop_padding_and_cut(backend, path, settings)
    if not isinstance(names, list | None):
        raise CheckpointError(f"{path.parent}: model_input_names: found {show(names)}; expected a list")
    templates = read_templates(backend, path, names)
    usual = ["input_ids", *["token_type_ids"] * templates[1].has_types, "attention_mask"]
    config["model_input_names"] = names or usual
    for role, piece in ("cls_token", templates[0].pieces[0][:1]), ("sep_token", templates[0].pieces[1][-1:]):
        config[role] = config[role] or next(map(backend.id_to_token, piece), None)
    config["tokenizer_class"] = _class_of(named_class(folder)[0], backend, said, config, templates[1])
    roles = {config[name] for name in ROLES if config[name]}
    roles |= {backend.id_to_token(i) for each in templates for piece in each.pieces for i in piece}
    roles |= {t.content for t in backend.get_added_tokens_decoder().values() if t.special} & USUAL.keys()
    check_added_tokens(backend, path, settings, roles)
    document, backend = backend.to_str(), with_special_tokens(backend, roles)
    _take_apart(backend, roles)
    backend.encode_special_tokens = True
    _check_typed(backend, roles - {config["unk_token"]}, path)
    normalizer = backend.normalizer
    lower_case = normalizer is not None and normalizer.normalize_str("A") == "a"
    if do_lower_case not in (None, lower_case):
        raise CheckpointError(
            f"{path}: its normalizer has lower-casing {lower_case}, do_lower_case is {do_lower_case}; "
            "only BERT's WordPiece can follow the setting"
        )
    return Pipeline(backend, document, config, lower_case, templates)


def read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def named_class(folder: Path) -> tuple[str | None, str | None, str]:
    """The tokenizer class and the network that the folder names, and what and where it does."""
    settings, config = (read_if_there(folder / f"{name}.json") for name in ("tokenizer_config", "config"))
    network, place = config.get("model_type"), "tokenizer_config.json"
    declared = settings.get("tokenizer_class")
    if declared is None:
        declared, place = config.get("tokenizer_class"), "config.json"
    found = f"tokenizer_class: found {show(declared)}" if declared else f"model_type: found {show(network)}"
    return declared, network, f"{folder / place}: {found}"


def foreign_settings(said: Mapping[str, Any], place: Path, standard: Mapping[str, Any]) -> list[str]:
    """What a settings file of the folder says that is not supported."""
    faults = []
    own = said.get("auto_map")
    if own and not (isinstance(own, dict) and "AutoTokenizer" not in own):
        faults.append(f"{place}: auto_map: names a tokenizer in code of its own, which is never run")
    for name, usual in standard.items():
        value = said.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and value not in usual:
            faults.append(f"{place}: {name}: found {show(value)}; only {usual[0]!r} is supported")
    return faults


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Raises CheckpointError on a file that the library cannot read."""
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as e:  # the library raises bare Exception for whatever it cannot parse
        raise CheckpointError(f"{path}: not a tokenizer: {e}") from e


def _is_roberta(folder: Path) -> bool:
    declared, network, _ = named_class(folder)
    return declared in ROBERTA_CLASSES or (declared is None and network == "roberta")


def _read_byte_level(path: Path) -> tokenizers.Tokenizer:
    """RoBERTa's pipeline around its vocab.json and merges.txt."""
    folder, merges = path.parent, path.with_name("merges.txt")
    if not (_is_roberta(folder) and path.is_file() and merges.is_file()):
        if pieces := sorted(file.name for file in folder.glob("*.model")):
            raise CheckpointError(
                f"{folder}: {pieces[0]} and no tokenizer.json, which transformers makes of it: "
                'python -c "from transformers import AutoTokenizer; '
                f'AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"'
            )
        raise CheckpointError(
            f"{named_class(folder)[2]}; without a tokenizer.json only BERT's WordPiece (vocab.txt) "
            "and RoBERTa's vocabulary (vocab.json and merges.txt) are supported"
        )
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(merges)))
    except Exception as e:  # the library raises bare Exception for whatever it cannot parse
        raise CheckpointError(f"{path} and {merges.name}: no byte-level vocabulary: {e}") from e
    numbers = backend.get_vocab()
    if missing := [token for token in ROBERTA_TOKENS[:3] if token not in numbers]:
        raise CheckpointError(f"{path}: {', '.join(missing)} not in the vocabulary; RoBERTa's has them")
    backend.add_special_tokens([token for token in ROBERTA_TOKENS if token in numbers])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", numbers["</s>"]), ("<s>", numbers["<s>"]))
    return backend


def drop_padding_and_cut(backend: tokenizers.Tokenizer, path: Path, settings: Mapping[str, Any]) -> None:
    """Rows are cut and padded here, and at the right: what the folder says of it is not kept."""
    if (backend.truncation or {}).get("direction", "right") != "right":
        raise CheckpointError(f"{path}: its truncation cuts texts at the left; only right is supported")
    if "left" in ((backend.padding or {}).get("direction"), settings.get("padding_side")):
        logger.info(
            "%s: pads rows on the left; here it is on the right, which changes no answer", path.parent
        )
    backend.no_padding()
    backend.no_truncation()


def _written(
    backend: tokenizers.Tokenizer, said: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """tokenizer_config.json as it is written, with every role that a special token has.

    `said` is tokenizer.json.
    """
    model = said["model"]
    unk = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    pad = read_if_there(folder / "config.json").get("pad_token_id")
    pads = [token for token in special if backend.token_to_id(token) == pad]
    pads += [said["padding"]["pad_token"]] if said["padding"] else []
    files = settings, read_if_there(folder / "special_tokens_map.json")
    config = {name: settings[name] for name in KEPT if name in settings}
    for role in ROLES:
        named = [file.get(role) for file in files]
        named = [token.get("content") if isinstance(token, dict) else token for token in named]
        named += pads * (role == "pad_token") + [token for token in special if USUAL.get(token) == role]
        named = [unk] * (role == "unk_token") + named
        known = (
            token for token in named if isinstance(token, str) and backend.token_to_id(token) is not None
        )
        config[role] = next(known, None)
    if config["pad_token"] is None:
        raise CheckpointError(
            f"{folder}: no padding token; pad_token of tokenizer_config.json or special_tokens_map.json, "
            "pad_token_id of config.json, or a special token <pad> or [PAD] of tokenizer.json names one"
        )
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        config["add_prefix_space"] = backend.pre_tokenizer.add_prefix_space
    return {"padding_side": "right", **config}


def _class_of(
    declared: str | None,
    backend: tokenizers.Tokenizer,
    said: Mapping[str, Any],
    config: Mapping[str, Any],
    pair: Template,
) -> str:
    """The declared class if these are the steps that transformers builds for it, whatever `said` says.

    Else the class that reads tokenizer.json as it stands.
    """
    name, steps = (declared or "").removesuffix("Fast"), repr(backend.pre_tokenizer)
    byte_level = repr(pre_tokenizers.ByteLevel(config.get("add_prefix_space", False)))
    words = repr(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))
    model = {key: value for key, value in said["model"].items() if value and key not in ("vocab", "merges")}
    normalizer = (said["normalizer"] or {"type": None})["type"]
    unigram = {"type": "Unigram", "unk_id": 3}
    is_built = {
        "RobertaTokenizer": (steps, model, normalizer) == (byte_level, {"type": "BPE"}, None),
        "XLMRobertaTokenizer": (steps, model) == (words, unigram) and normalizer in (None, "Precompiled"),
    }
    first, last = (config["bos_token"], config["cls_token"]), (config["eos_token"], config["sep_token"])
    pieces = [[*map(backend.id_to_token, piece)] for piece in pair.pieces]
    is_framed = pieces == [[first[0]], [*last], [last[0]]] and first[0] == first[1] and last[0] == last[1]
    is_dense = max(backend.get_added_tokens_decoder()) < backend.get_vocab_size()
    is_own = is_built.get(name, False) and is_framed and is_dense and not pair.has_types
    return name if is_own else "PreTrainedTokenizerFast"


def check_added_tokens(
    backend: tokenizers.Tokenizer, path: Path, settings: Mapping[str, Any], roles: Collection[str]
) -> None:
    """CheckpointError where small files name tokens, beside those with a role, that `path` does not have."""
    folder = path.parent
    is_ours = (folder / "manifest.json").is_file()  # which never names such a file, so it is not read
    found = set() if is_ours else set(read_if_there(folder / "added_tokens.json"))
    try:
        found |= {token["content"] for token in settings.get("added_tokens_decoder", {}).values()}
        for said in (settings, read_if_there(folder / "special_tokens_map.json")):
            for name in ("additional_special_tokens", "extra_special_tokens"):
                extra = said.get(name) or []
                tokens = extra.values() if isinstance(extra, dict) else extra
                found |= {token if isinstance(token, str) else token["content"] for token in tokens}
    except (AttributeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: its added tokens cannot be read ({e!r})") from e
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if missing := sorted(found - known - set(roles)):
        raise CheckpointError(
            f"{folder}: {len(missing)} tokens are added to {path.name} ({show(missing[0])}, …) by other "
            "files; save_pretrained of transformers' AutoTokenizer writes a tokenizer.json that has them"
        )


def with_special_tokens(backend: tokenizers.Tokenizer, tokens: Collection[str]) -> tokenizers.Tokenizer:
    """Of its added tokens only these are special; texts may hold the others (<e1>)."""
    added = backend.get_added_tokens_decoder().values()
    if all(token.special == (token.content in tokens) for token in added):
        return backend
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in tokens
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _take_apart(backend: tokenizers.Tokenizer, tokens: Collection[str]) -> None:
    """Add a last step that breaks a typed token in two where the vocabulary would find it whole."""
    whole = [t for t in sorted(tokens) if [found.value for found in backend.model.tokenize(t)] == [t]]
    if whole:
        parts = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in whole)
        step = pre_tokenizers.Split(tokenizers.Regex(parts), "merged_with_previous")
        own = backend.pre_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([own, step]) if own else step


def _check_typed(backend: tokenizers.Tokenizer, tokens: Collection[str], path: Path) -> None:
    for token in sorted(tokens):
        number = backend.token_to_id(token)
        for text in (token, f" {token}", f"a{token}a", f"a {token} a"):
            if number in backend.encode(text, add_special_tokens=False).ids:
                raise CheckpointError(
                    f"{path}: its pipeline reads {text!r} as the special token {token}, so that user text "
                    "could act as one; special tokens must be added tokens of two characters or more"
                )
