"""/openapi.json is true: schemathesis sends what it allows and what it does not, to a real socket."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from conftest import write_hf_folder
from hypothesis import HealthCheck, given, settings
from live_server import PAIR, LiveServer, make_predictor, serving
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
KEY = "the-right-key"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = write_hf_folder(tmp_path_factory.mktemp("served") / "hf-tiny")
    settings = {"max_batch_tokens": 512, "max_text_chars": 200, "max_request_rows": 4}
    settings["max_body_bytes"] = 65_536  # schemathesis does not take a 413 for a text that is too long
    predictor, config = make_predictor(folder, **settings, max_seq_length=8)  # most texts are cut
    with serving(predictor, config, KEY.encode()) as server:
        yield server


def operations(live: LiveServer) -> list[Any]:
    document = live.service.document
    api = schemathesis.openapi.from_dict(document)
    api.config.update(base_url=f"http://127.0.0.1:{live.port}")
    return [result.ok() for result in api.get_all_operations()]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
def test_answers_conform(live: LiveServer, mode: GenerationMode) -> None:
    """Driven by hand: the pytest plugin of schemathesis 4.32 does not know pytest 9.2."""
    statuses: Counter[tuple[str, int]] = Counter()
    for operation in operations(live):
        if mode is GenerationMode.NEGATIVE and not list(operation.body):
            continue  # nothing of it can be made wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            response = case.call(headers={"Authorization": f"Bearer {KEY}"})
            statuses[case.operation.path, response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        check()
    predicted = {path: n for (path, status), n in statuses.items() if status == 200 and "/v1/" in path}
    if mode is GenerationMode.POSITIVE:
        assert len(predicted) == 3 and sum(predicted.values()) > 50  # it is not errors alone that conform
    else:
        assert sum(n for (_, status), n in statuses.items() if status in (400, 415, 422)) > 50


def test_the_document_is_what_the_server_says(live: LiveServer) -> None:
    answer = live.ask("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"})
    assert answer.json == live.service.document
    assert answer.json["openapi"] == "3.1.0"


def test_every_status_that_is_documented_is_meant(live: LiveServer) -> None:
    """What the routes answer elsewhere in these tests is in the document, and nothing else is."""
    document = live.service.document
    predict = document["paths"]["/v1/predict"]["post"]["responses"]
    expected = {"200", "400", "401", "408", "413", "414", "415", "417", "422", "429", "431", "500", "503"}
    assert set(predict) == expected
    assert set(document["paths"]["/livez"]["get"]["responses"]) == {
        "200",
        "400",
        "408",
        "414",
        "417",
        "431",
        "500",
        "503",
    }
    headers = {"authorization": f"Bearer {KEY}"}
    assert live.ask("POST", "/v1/predict", PAIR, headers).status == 200
