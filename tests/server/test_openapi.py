"""The description that is checked in is the one that is served, complete enough to code against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from running import Running

from llep_server.docs import BODIES, METHODS
from llep_server.openapi import description

CHECKED_IN = Path(__file__).parents[2] / "docs" / "openapi.json"


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    paths = json.loads(CHECKED_IN.read_text())["paths"]
    return [(method, path, paths[path][method]) for path in paths for method in paths[path] if method in METHODS]


def test_is_as_checked_in() -> None:
    assert json.loads(CHECKED_IN.read_text()) == json.loads(json.dumps(description())), (
        "python -m llep_server.openapi > docs/openapi.json"
    )


def test_every_operation_says_what_it_does_and_how_it_fails() -> None:
    for method, path, operation in operations():
        assert operation["description"], path
        responses = set(operation["responses"])
        if path.startswith("/v1"):
            assert {"401", "403", "422", "429", "503"} <= responses, (method, path)
        if "requestBody" in operation:
            assert {"400", "408", "413", "415"} <= responses, (method, path)
        if "{" in path:
            assert "404" in responses, path
        for status, response in operation["responses"].items():
            if status >= "400" and path != "/readyz":
                assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_docs_show_every_parameter_member_and_shape(unchanged: Running) -> None:
    page = unchanged.http.get("/docs").text
    assert page == unchanged.http.get("/docs").text  # kept
    described = json.loads(CHECKED_IN.read_text())
    for method, path, operation in operations():
        section = page.split(f"<h3><code>{method.upper()} {path}</code></h3>")[1].split("<h3>")[0]
        for parameter in operation.get("parameters", ()):
            assert f"<code>{parameter['name']}</code>" in section, (path, parameter["name"])
        for status in operation["responses"]:
            assert status in section or "HTTPBearer" in status, (path, status)
    for name, schema in described["components"]["schemas"].items():
        for member in schema.get("properties", ()):
            assert f"<code>{member}</code>" in page.split(f'id="{name}"')[1].split("<h3")[0], (name, member)


def test_every_body_has_an_example_that_is_taken(running: Running) -> None:
    """By the schema: what it is about need not be there."""
    taken = {path for _, path, operation in operations() if operation.get("requestBody", {}).get("required")}
    assert taken == set(BODIES)
    for method, path, _ in operations():
        if path in BODIES and method != "get":
            answer = running.http.request(method, path, json=BODIES[path])
            code = answer.json().get("error", {}).get("code")
            about = ("unknown_recording", "unknown_revision", "unknown_engine")
            assert code in (None, *about) or "engine is missing" in answer.text, answer.text
