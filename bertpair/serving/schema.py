"""/openapi.json: OpenAPI 3.1, made from the same facts as /info. Tests hold it against real answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bertpair.serving.requests import JSON, TEXT_PATTERN

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
_STRING: Schema = {"type": "string"}
_PROBABILITY: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def describe_api(facts: Mapping[str, Any], *, keyed: bool, root_path: str | None = None) -> Schema:
    """The document; `facts` is what /info says, `root_path` the prefix under which a proxy shows it all."""
    ask, show = partial(_operation, keyed=keyed), partial(_operation, keyed=False)
    one, several, old = _bodies(facts)
    prediction = _prediction(facts)
    predictions = _object({"predictions": _rows(facts, prediction)})
    operations = {
        "/v1/predict": ask("predict", "Classify one pair.", _json(prediction), body=one),
        "/v1/predict/batch": ask("predict_batch", "Classify several.", _json(predictions), body=several),
        "/livez": show("livez", "Whether the process answers.", _status("live"), fails=(503,)),
        "/readyz": show("readyz", "Whether to send it work.", _status("ready"), fails=(503,)),
        "/info": ask("info", "The model and its limits.", _json(_info(facts))),
        "/metrics": ask("metrics", "Figures for Prometheus.", {"text/plain": {"schema": _STRING}}),
        "/openapi.json": ask("openapi", "This document.", _json({"type": "object"})),
        "/": show("page", "A page for people.", {"text/html": {"schema": _STRING}}),
    }
    if facts["labels"] is not None:
        answer = _json(_old_answer(facts))
        operations["/v1/model_prediction/"] = ask("model_prediction", "The old contract.", answer, body=old)
    components: Schema = {"schemas": {"Error": _error()}}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"bertpair: {facts['model']}", "version": facts["model_version"]},
        "servers": [{"url": root_path or "/"}],
        "paths": {
            path: {"post" if "requestBody" in operation else "get": operation}
            for path, operation in operations.items()
        },
        "components": components,
    }


def _operation(
    name: str,
    summary: str,
    answer: Schema,
    *,
    keyed: bool,
    body: Schema | None = None,
    fails: tuple[int, ...] = (),
) -> Schema:
    """`answer` by media type; `fails` are statuses besides those of every route, every body and every key."""
    statuses = {*_ON_EVERY, *fails, *(_ON_BODIES if body else ()), *((401,) if keyed else ())}
    error = _json({"$ref": "#/components/schemas/Error"})
    responses = {str(status): {"description": _WHY[status], "content": error} for status in sorted(statuses)}
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": answer}, **responses},
    }
    if keyed:
        operation["security"] = [{"key": []}]
    if body:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _json(schema: Schema) -> Schema:
    return {JSON: {"schema": schema}}


def _object(
    properties: Mapping[str, Schema], optional: tuple[str, ...] = (), *, strict: bool = True
) -> Schema:
    required = [name for name in properties if name not in optional]
    schema: Schema = {"type": "object", "properties": dict(properties), "required": required}
    return {**schema, "additionalProperties": False} if strict else schema


def _rows(facts: Mapping[str, Any], row: Schema) -> Schema:
    most = facts["limits"]["max_request_rows"]
    return {"type": "array", "minItems": 1, "maxItems": most, "items": row}


def _bodies(facts: Mapping[str, Any]) -> tuple[Schema, Schema, Schema]:
    """What is asked of /v1/predict, /v1/predict/batch and the old route: texts not blank, without NUL."""
    most = facts["limits"]["max_text_chars"]
    text = {"type": "string", "minLength": 1, "maxLength": most, "pattern": TEXT_PATTERN}
    count = 2 if facts["takes_pairs"] else 1
    texts = {name: text for name in ("text_a", "text_b")[:count]}
    truncate: dict[str, Schema] = {"truncate": {"type": "boolean", "default": True}}
    one = _object({**texts, **truncate}, ("truncate",))
    several = _object({"pairs": _rows(facts, _object(texts)), **truncate}, ("truncate",))
    old = _object({name: text for name in ("sentence1", "sentence2")[:count]}, strict=False)
    return one, several, old


def _old_answer(facts: Mapping[str, Any]) -> Schema:
    """[label, score]. Not as prefixItems, which several readers of OpenAPI 3.1 stumble over."""
    items = {"anyOf": [{"type": "string", "enum": facts["labels"]}, _PROBABILITY]}
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 2, "description": "label, score"}


def _prediction(facts: Mapping[str, Any]) -> Schema:
    rest: dict[str, Schema] = {
        "truncated": {"type": "boolean"},
        "num_tokens": {"type": "integer", "minimum": 2, "maximum": facts["max_seq_length"]},
        "model_version": {"type": "string", "const": facts["model_version"]},
    }
    if facts["labels"] is None:
        return _object({"value": {"type": "number"}, **rest})
    probabilities = _object({label: _PROBABILITY for label in facts["labels"]})
    label = {"type": "string", "enum": facts["labels"]}
    return _object({"label": label, "score": _PROBABILITY, "probabilities": probabilities, **rest})


def _status(word: str) -> Schema:
    return _json(_object({"status": {"type": "string", "const": word}}))


def _info(facts: Mapping[str, Any]) -> Schema:
    """Every fact by name; limits and agreement are objects of their own."""
    known: dict[str, Schema] = {
        "labels": {"type": ["array", "null"], "items": {"type": "string"}},
        "takes_pairs": {"type": "boolean"},
        "max_seq_length": {"type": "integer"},
        "num_threads": {"type": "integer"},
        "limits": _object({name: {"type": ["number", "null"]} for name in facts["limits"]}),
        "agreement_with_float32": {"type": ["object", "null"]},
    }
    return _object({name: known.get(name, _STRING) for name in facts})


def _error() -> Schema:
    field: Schema = {"type": ["string", "null"]}
    error = {"type": _STRING, "message": _STRING, "field": field, "request_id": _STRING}
    return _object({"error": _object(error)})
