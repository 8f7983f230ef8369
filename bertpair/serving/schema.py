"""/openapi.json: OpenAPI 3.1, made from the same facts as /info. Tests hold it against real answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bertpair.serving.requests import TEXT_PATTERN

Schema = dict[str, Any]

_WHY = {
    400: "The body is no sound JSON, or the request no sound HTTP.",
    401: "The key is missing or wrong.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    414: "The URL is too long.",
    415: "The body is not said to be application/json in UTF-8, or is compressed.",
    417: "An expectation other than 100-continue.",
    422: "The JSON is sound and does not say what this route wants.",
    429: "Too much is waiting; Retry-After says when to come back.",
    431: "The headers are too large.",
    500: "A defect of the server.",
    503: "Warming up, stalled, too many bodies at once, or waited longer than the queue's deadline.",
}
_ON_EVERY = (400, 408, 414, 417, 431, 500)
_ON_BODIES = (413, 415, 422, 429, 503)


def describe_api(facts: Mapping[str, Any], *, keyed: bool, root_path: str | None = None) -> Schema:
    """The document; `facts` is what /info says, `root_path` the prefix under which a proxy shows it all."""
    paths = {
        "/v1/predict": {
            "post": _post("predict", "Classify one pair.", _one(facts), _prediction(facts), keyed)
        },
        "/v1/predict/batch": {
            "post": _post("predict_batch", "Classify several.", _several(facts), _predictions(facts), keyed)
        },
        "/livez": {
            "get": _get("livez", "Whether the process answers.", _status("live"), False, may_fail=True)
        },
        "/readyz": {
            "get": _get("readyz", "Whether to send it work.", _status("ready"), False, may_fail=True)
        },
        "/info": {"get": _get("info", "The model and its limits.", _info(facts), keyed)},
        "/metrics": {"get": _text("metrics", "Figures for Prometheus.", "text/plain", keyed)},
        "/openapi.json": {"get": _get("openapi", "This document.", {"type": "object"}, keyed)},
        "/": {"get": _text("page", "A page for people.", "text/html", False)},
    }
    if facts["labels"] is not None:
        paths["/v1/model_prediction/"] = {
            "post": _post(
                "model_prediction", "The old contract.", _legacy(facts), _legacy_answer(facts), keyed
            )
        }
    components: Schema = {"schemas": {"Error": _error()}}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"bertpair: {facts['model']}", "version": facts["model_version"]},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": components,
    }


def _operation(name: str, summary: str, answer: Schema, statuses: tuple[int, ...], keyed: bool) -> Schema:
    errors = sorted({*statuses, *((401,) if keyed else ())})
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {str(status): {"description": _WHY[status], "content": content} for status in errors}
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": answer}, **responses},
    }
    if keyed:
        operation["security"] = [{"key": []}]
    return operation


def _post(name: str, summary: str, body: Schema, answer: Schema, keyed: bool) -> Schema:
    content = {"application/json": {"schema": answer}}
    operation = _operation(name, summary, content, (*_ON_EVERY, *_ON_BODIES), keyed)
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _get(name: str, summary: str, answer: Schema, keyed: bool, *, may_fail: bool = False) -> Schema:
    statuses = (*_ON_EVERY, 503) if may_fail else _ON_EVERY
    return _operation(name, summary, {"application/json": {"schema": answer}}, statuses, keyed)


def _text(name: str, summary: str, media_type: str, keyed: bool) -> Schema:
    return _operation(name, summary, {media_type: {"schema": {"type": "string"}}}, _ON_EVERY, keyed)


def _object(
    properties: Mapping[str, Schema], optional: tuple[str, ...] = (), *, strict: bool = True
) -> Schema:
    required = [name for name in properties if name not in optional]
    schema: Schema = {"type": "object", "properties": dict(properties), "required": required}
    return {**schema, "additionalProperties": False} if strict else schema


def _input(facts: Mapping[str, Any]) -> Schema:
    """A text: not blank, no NUL."""
    most = facts["limits"]["max_text_chars"]
    return {"type": "string", "minLength": 1, "maxLength": most, "pattern": TEXT_PATTERN}


def _texts(facts: Mapping[str, Any]) -> dict[str, Schema]:
    names = ("text_a", "text_b") if facts["takes_pairs"] else ("text_a",)
    return {name: _input(facts) for name in names}


_TRUNCATE: Schema = {"type": "boolean", "default": True}


def _one(facts: Mapping[str, Any]) -> Schema:
    return _object({**_texts(facts), "truncate": _TRUNCATE}, ("truncate",))


def _several(facts: Mapping[str, Any]) -> Schema:
    most = facts["limits"]["max_request_rows"]
    pairs = {"type": "array", "minItems": 1, "maxItems": most, "items": _object(_texts(facts))}
    return _object({"pairs": pairs, "truncate": _TRUNCATE}, ("truncate",))


def _legacy(facts: Mapping[str, Any]) -> Schema:
    names = ("sentence1", "sentence2") if facts["takes_pairs"] else ("sentence1",)
    return _object({name: _input(facts) for name in names}, strict=False)


def _legacy_answer(facts: Mapping[str, Any]) -> Schema:
    """[label, score]. Not as prefixItems, which several readers of OpenAPI 3.1 stumble over."""
    label: Schema = {"type": "string", "enum": facts["labels"]}
    items = {"anyOf": [label, _probability()]}
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 2, "description": "label, score"}


def _probability() -> Schema:
    return {"type": "number", "minimum": 0, "maximum": 1}


def _prediction(facts: Mapping[str, Any]) -> Schema:
    rest: dict[str, Schema] = {
        "truncated": {"type": "boolean"},
        "num_tokens": {"type": "integer", "minimum": 2, "maximum": facts["max_seq_length"]},
        "model_version": {"type": "string", "const": facts["model_version"]},
    }
    if facts["labels"] is None:
        return _object({"value": {"type": "number"}, **rest})
    probabilities = _object({label: _probability() for label in facts["labels"]})
    label = {"type": "string", "enum": facts["labels"]}
    return _object({"label": label, "score": _probability(), "probabilities": probabilities, **rest})


def _predictions(facts: Mapping[str, Any]) -> Schema:
    most = facts["limits"]["max_request_rows"]
    items = {"type": "array", "minItems": 1, "maxItems": most, "items": _prediction(facts)}
    return _object({"predictions": items})


def _status(word: str) -> Schema:
    return _object({"status": {"type": "string", "const": word}})


def _info(facts: Mapping[str, Any]) -> Schema:
    """Every fact by name; limits and agreement are objects of their own."""
    numbers: Schema = {"type": ["number", "null"]}
    limits = _object({name: numbers for name in facts["limits"]})
    agreement: Schema = {"type": ["object", "null"]}
    known: Schema = {
        "labels": {"type": ["array", "null"], "items": {"type": "string"}},
        "takes_pairs": {"type": "boolean"},
        "max_seq_length": {"type": "integer"},
        "num_threads": {"type": "integer"},
        "limits": limits,
        "agreement_with_float32": agreement,
    }
    text: Schema = {"type": "string"}
    return _object({name: known.get(name, text) for name in facts})


def _error() -> Schema:
    text: Schema = {"type": "string"}
    fields: dict[str, Schema] = {
        "type": text,
        "message": text,
        "field": {"type": ["string", "null"]},
        "request_id": text,
    }
    return _object({"error": _object(fields)})
