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
    engine: Literal["torch", "openvino"]
    precision: str
    device: str
    num_threads: int
    limits: dict[str, Figure]
    agreement_with_float32: dict[str, Figure] | None
    temperature: float | None  # that the logits are divided by
    threshold: dict[str, float] | None  # the label, and the probability from which it is the answer


Live = create_model("Live", __base__=Strict, status=Literal["live"])
Ready = create_model("Ready", __base__=Strict, status=Literal["ready"])
Fault = create_model("Fault", __base__=Strict, type=str, message=str, field=str | None, request_id=str)
Error = create_model("Error", __base__=Strict, error=Fault)


def body_models(limits: RequestLimits, *, takes_pairs: bool) -> Bodies:
    """Of /v1/predict, /v1/predict/batch and the old route, which alone lets unknown fields be."""
    most, count = limits.max_request_rows, 2 if takes_pairs else 1
    text = Annotated[str, Field(min_length=1, max_length=limits.max_text_chars, pattern=TEXT_PATTERN)]
    texts: dict[str, Any] = dict.fromkeys(("text_a", "text_b")[:count], text)
    sentences: dict[str, Any] = dict.fromkeys(("sentence1", "sentence2")[:count], text)

    def count_rows(rows: object) -> object:
        """Before pydantic looks at each of them."""
        if isinstance(rows, list) and not 1 <= len(rows) <= most:
            raise PydanticCustomError("row_count", "{found} rows", {"found": len(rows), "most": most})
        return rows

    pair: Any = create_model("Pair", __base__=Strict, **texts)
    rows = Annotated[list[pair], Field(min_length=1, max_length=most), BeforeValidator(count_rows)]
    return (
        create_model("Question", __base__=Strict, **texts, truncate=(bool, True)),
        create_model("Questions", __base__=Strict, pairs=rows, truncate=(bool, True)),
        create_model("OldQuestion", __config__=ConfigDict(strict=True), **sentences),
    )


def answer_types(info: Info) -> tuple[Any, Any, Any]:
    """What answers these bodies; the last is None for a regression, whose model has no old route."""
    found: dict[str, Any] = {"value": float}
    old = None
    if info.labels is not None:
        label: Any = Literal.__getitem__(tuple(info.labels))
        # By number: not every label can name a field.
        each: Any = {f"p{i}": (Probability, Field(alias=name)) for i, name in enumerate(info.labels)}
        probabilities = create_model("Probabilities", __base__=Strict, **each)
        found = {"label": label, "score": Probability, "probabilities": probabilities}
        # Not a tuple: several readers of OpenAPI 3.1 stumble over its prefixItems.
        old = Annotated[
            list[label | Probability], Field(min_length=2, max_length=2, description="label, score")
        ]
    num_tokens = Annotated[int, Field(ge=2, le=info.max_seq_length)]
    found |= {"truncated": bool, "num_tokens": num_tokens}
    found["model_version"] = Literal.__getitem__(info.model_version)
    prediction: Any = create_model("Prediction", __base__=Strict, **found)
    return prediction, create_model("Predictions", __base__=Strict, predictions=list[prediction]), old


def describe_api(info: Info, bodies: Bodies, keyed: bool, root_path: str | None) -> dict[str, Any]:
    """The document; `root_path` is the prefix under which a proxy shows it all."""
    answers = answer_types(info)
    operations = [  # path, name, summary, body, media type and type of the answer
        ("/v1/predict", "predict", "Classify one pair.", bodies[0], JSON, answers[0]),
        ("/v1/predict/batch", "predict_batch", "Classify several.", bodies[1], JSON, answers[1]),
        ("/v1/model_prediction/", "model_prediction", "The old contract.", bodies[2], JSON, answers[2]),
        ("/livez", "livez", "Whether the process answers.", None, JSON, Live),
        ("/readyz", "readyz", "Whether to send it work.", None, JSON, Ready),
        ("/info", "info", "The model and its limits.", None, JSON, Info),
        ("/metrics", "metrics", "Figures for Prometheus.", None, "text/plain", str),
        ("/openapi.json", "openapi", "This document.", None, JSON, dict[str, Any]),
        ("/", "page", "A page for people.", None, "text/html", str),
    ]
    operations = [operation for operation in operations if operation[-1]]  # a regression has no old route
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
        responses = {"200": {"description": "The answer.", **content(answer, media)}}
        for status in sorted(statuses):
            responses[str(status)] = {"description": HTTPStatus(status).phrase, **content(Error)}
        operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
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
