"""What is asked and answered: pydantic models made for the model that is served, and /openapi.json from them.

The routes check bodies by these models; tests hold the document against real answers.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, create_model
from pydantic_core import PydanticCustomError

from bertpair.data.records import INVISIBLE
from bertpair.serving.requests import JSON
from bertpair.settings.serve import RequestLimits

TEXT_PATTERN = rf"^[^\u0000]*[^{INVISIBLE}][^\u0000]*$"  # not blank, and without NUL
Bodies = tuple[type[BaseModel], type[BaseModel], type[BaseModel]]
Probability = Annotated[float, Field(ge=0, le=1)]
Figure = int | float | None

_ON_EVERY = (400, 408, 414, 417, 431, 500)
_ON_BODIES = (413, 415, 422, 429, 503)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Info(Strict):
    """What /info says: the model and its limits, as far as the warm-up has settled them."""

    model: str
    model_version: str
    problem_type: Literal["classification", "regression"]
    labels: list[str] | None
    takes_pairs: bool
    max_seq_length: int
    precision: str
    device: str
    num_threads: int
    limits: dict[str, Figure]
    agreement_with_float32: dict[str, Figure] | None


class Live(Strict):
    status: Literal["live"]


class Ready(Strict):
    status: Literal["ready"]


class Fault(Strict):
    type: str
    message: str
    field: str | None
    request_id: str


class Error(Strict):
    error: Fault


def body_models(limits: RequestLimits, *, takes_pairs: bool) -> Bodies:
    """Of /v1/predict, /v1/predict/batch and the old route, which alone lets unknown fields be."""
    most, count = limits.max_request_rows, 2 if takes_pairs else 1
    text = Annotated[str, Field(min_length=1, max_length=limits.max_text_chars, pattern=TEXT_PATTERN)]
    texts: dict[str, Any] = {name: text for name in ("text_a", "text_b")[:count]}
    sentences: dict[str, Any] = {name: text for name in ("sentence1", "sentence2")[:count]}

    def count_rows(rows: object) -> object:
        """Before pydantic looks at each of them."""
        if isinstance(rows, list) and not 1 <= len(rows) <= most:
            raise PydanticCustomError("row_count", "{found} rows", {"found": len(rows), "most": most})
        return rows

    pair = create_model("Pair", __base__=Strict, **texts)
    rows: Any = list[pair]
    rows = Annotated[rows, Field(min_length=1, max_length=most), BeforeValidator(count_rows)]
    return (
        create_model("Question", __base__=Strict, **texts, truncate=(bool, True)),
        create_model("Questions", __base__=Strict, pairs=rows, truncate=(bool, True)),
        create_model("OldQuestion", __config__=ConfigDict(strict=True), **sentences),
    )


def answer_types(info: Info) -> tuple[Any, Any, Any]:
    """What answers these bodies; the last is None for a regression, whose model has no old route."""
    rest: dict[str, Any] = {
        "truncated": bool,
        "num_tokens": Annotated[int, Field(ge=2, le=info.max_seq_length)],
        "model_version": Literal.__getitem__(info.model_version),
    }
    old = None
    if info.labels is None:
        rest = {"value": float, **rest}
    else:
        label: Any = Literal.__getitem__(tuple(info.labels))
        each: dict[str, Any] = {  # by number: not every label can name a field
            f"p{i}": (Probability, Field(alias=name)) for i, name in enumerate(info.labels)
        }
        probabilities = create_model("Probabilities", __base__=Strict, **each)
        rest = {"label": label, "score": Probability, "probabilities": probabilities, **rest}
        # Not a tuple: several readers of OpenAPI 3.1 stumble over its prefixItems.
        label_and_score = list[label | Probability]
        old = Annotated[label_and_score, Field(min_length=2, max_length=2, description="label, score")]
    prediction = create_model("Prediction", __base__=Strict, **rest)
    rows: Any = list[prediction]
    return prediction, create_model("Predictions", __base__=Strict, predictions=rows), old


def describe_api(info: Info, bodies: Bodies, *, keyed: bool, root_path: str | None = None) -> dict[str, Any]:
    """The document; `root_path` is the prefix under which a proxy shows it all."""
    one, several, old = bodies
    prediction, predictions, old_answer = answer_types(info)
    operations = [  # path, name, summary, body, media type and type of the answer
        ("/v1/predict", "predict", "Classify one pair.", one, JSON, prediction),
        ("/v1/predict/batch", "predict_batch", "Classify several.", several, JSON, predictions),
        ("/v1/model_prediction/", "model_prediction", "The old contract.", old, JSON, old_answer),
        ("/livez", "livez", "Whether the process answers.", None, JSON, Live),
        ("/readyz", "readyz", "Whether to send it work.", None, JSON, Ready),
        ("/info", "info", "The model and its limits.", None, JSON, Info),
        ("/metrics", "metrics", "Figures for Prometheus.", None, "text/plain", str),
        ("/openapi.json", "openapi", "This document.", None, JSON, dict[str, Any]),
        ("/", "page", "A page for people.", None, "text/html", str),
    ]
    if old_answer is None:
        operations = [operation for operation in operations if operation[3] is not old]
    types = [Error, *(part for *_, body, _, answer in operations for part in (body, answer) if part)]
    mode: Literal["validation"] = "validation"
    adapters = [(id(each), mode, TypeAdapter(each)) for each in types]
    found, definitions = TypeAdapter.json_schemas(adapters, ref_template="#/components/schemas/{model}")

    def content(part: Any, media: str = JSON) -> dict[str, Any]:
        return {"content": {media: {"schema": found[id(part), mode]}}}

    paths: dict[str, Any] = {}
    for path, name, summary, body, media, answer in operations:
        is_probe = path in ("/livez", "/readyz")
        is_locked = keyed and not is_probe and path != "/"
        statuses = {*_ON_EVERY, *(_ON_BODIES if body else ()), *([401] * is_locked), *([503] * is_probe)}
        errors = {
            str(status): {"description": HTTPStatus(status).phrase, **content(Error)}
            for status in sorted(statuses)
        }
        operation: dict[str, Any] = {
            "operationId": name,
            "summary": summary,
            "responses": {"200": {"description": "The answer.", **content(answer, media)}, **errors},
        }
        if is_locked:
            operation["security"] = [{"key": []}]
        if body:
            operation["requestBody"] = {"required": True, **content(body)}
        paths[path] = {"post" if body else "get": operation}
    components = {"schemas": definitions["$defs"]}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"bertpair: {info.model}", "version": info.model_version},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": components,
    }
