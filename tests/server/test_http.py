"""What the routes answer, over real HTTP to a real scheduler; first of all what they answer to mistakes."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest
from reporting import BYTES_PER_SLOT, Engine
from running import Running, start

from llep import __version__
from llep.config import Settings
from llep.errors import StoreUnavailable
from llep_server.config import ServerConfig


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error member of a body that must be exactly as documented."""
    body = response.json()
    assert response.status_code == status, body
    assert response.headers["content-type"] == "application/json"
    assert set(body) - {"ready", "checks"} == {"error", "request_id"}
    assert body["request_id"] == response.headers["X-Request-Id"] != ""
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return error


def value_of(view: dict[str, Any], key: str) -> Any:
    return next(setting["value"] for setting in view["settings"] if setting["key"] == key)


def test_probes_and_version(unchanged: Running) -> None:
    assert unchanged.http.get("/livez").json() == {"status": "ok"}
    assert unchanged.http.get("/version").json()["version"] == __version__


def test_docs_need_nothing_from_elsewhere_and_show_every_route(unchanged: Running) -> None:
    page = unchanged.http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text and 'src="' not in page.text
    for path in unchanged.http.get("/openapi.json").json()["paths"]:
        assert path in page.text
    for key in Settings.model_fields:
        assert key in page.text


def test_ready_only_with_a_fresh_engine_that_holds_what_is_desired(running: Running) -> None:
    running.caller.wait_s = 0.0
    error = error_of(running.http.get("/readyz"), 503, "not_ready")
    assert "engines: 0 of 0 engines report" in error["message"]
    engine = Engine()
    assert running.report(engine) == []
    assert running.http.get("/readyz").json()["ready"] is True

    running.http.patch("/v1/settings", json={"imbalance_threshold": 2.0})
    body = running.http.get("/readyz").json()
    assert {check["name"]: check["ok"] for check in body["checks"]} == {
        "scheduler": True,
        "store": True,
        "engines": True,
        "settings": False,
    }
    running.report(engine)  # takes the directive
    running.report(engine)  # says so
    assert running.http.get("/readyz").status_code == 200

    async def of_another_version() -> dict[str, str]:
        return {"version": "0.0"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.caller.scheduler, "status", of_another_version)
        error = error_of(running.http.get("/readyz"), 503, "not_ready")
        assert "run control plane and scheduler in the same version" in error["message"]

    running.caller.is_up = False
    error = error_of(running.http.get("/readyz"), 503, "not_ready")
    assert "scheduler: no scheduler at 'auto'" in error["message"]
    assert running.http.get("/health").status_code == 200
    assert running.http.get("/health").json()["status"] == "degraded"
    assert running.http.get("/livez").status_code == 200


def test_engines(running: Running) -> None:
    running.report(Engine(name="org/a", ep_size=3))
    running.report(Engine(name="b"))
    page = running.http.get("/v1/engines").json()
    assert [engine["id"] for engine in page["data"]] == ["b", "org/a"]
    assert (page["object"], page["has_more"], page["next_cursor"]) == ("list", False, None)
    engine = running.http.get("/v1/engines/org/a").json()
    assert (engine["ep_size"], engine["state"], len(engine["ranks"])) == (3, "live", 3)
    error = error_of(running.http.get("/v1/engines/bb"), 404, "unknown_engine")
    assert error["message"] == "unknown engine 'bb'; did you mean 'b'?"


def test_settings_change_reaches_the_engine_and_the_audit_trail(running: Running) -> None:
    engine = Engine()
    running.report(engine)
    before = running.http.get("/v1/settings", params={"engine": "tiny"})
    assert before.headers["ETag"] == '"0"'
    answer = running.http.patch(
        "/v1/settings",
        params={"reason": "too eager", "engines": ["tiny"]},
        json={"imbalance_threshold": 1.75},
        headers={"If-Match": before.headers["ETag"]},
    )
    change = answer.json()
    assert answer.headers["ETag"] == f'"{change["revision"]}"' == '"1"'
    assert change["diff"] == {"imbalance_threshold": [1.3, 1.75]}
    assert [(applied["engine"], applied["state"]) for applied in change["applied"]] == [("tiny", "sent")]

    running.report(engine)
    assert engine.settings.imbalance_threshold == 1.75
    after = running.http.get("/v1/settings", params={"engine": "tiny"}).json()
    assert value_of(after, "imbalance_threshold") == 1.75
    event = next(e for e in running.http.get("/v1/events").json()["data"] if e["kind"] == "settings")
    assert event["author"] == "anonymous@127.0.0.1"
    assert "too eager" in event["message"]


def test_dry_run_changes_nothing(unchanged: Running) -> None:
    change = unchanged.http.patch("/v1/settings", params={"dry_run": "true"}, json={"capacity_factor": 2}).json()
    assert change["dry_run"] is True and change["diff"] == {"capacity_factor": [1.0, 2.0]}
    view = unchanged.http.get("/v1/settings").json()
    assert view["revision"] == 0 and value_of(view, "capacity_factor") == 1.0


def test_second_change_of_one_revision_is_refused(running: Running) -> None:
    headers = {"If-Match": '"0"'}
    assert running.http.patch("/v1/settings", json={"watchdog_s": 30}, headers=headers).status_code == 200
    error_of(running.http.patch("/v1/settings", json={"watchdog_s": 40}, headers=headers), 412, "revision_conflict")
    assert value_of(running.http.get("/v1/settings").json(), "watchdog_s") == 30
    star = running.http.patch("/v1/settings", json={"watchdog_s": 40}, headers={"If-Match": "*"})
    assert star.json()["revision"] == 2


@pytest.mark.parametrize(
    ("patch", "param", "words"),
    [
        ({"imbalance_treshold": 2}, "imbalance_treshold", "did you mean 'imbalance_threshold'"),
        ({"imbalance_threshold": 0.5}, "imbalance_threshold", "greater than or equal to 1"),
        ({"imbalance_threshold": "high"}, "imbalance_threshold", "'high'"),
        ({"slots_per_rank": 8}, "slots_per_rank", "can't change while serving"),
        ({"mode": "actve"}, "mode", "'off', 'observe', 'shadow' or 'active'"),
        ({"layers": "7-3"}, "layers", "'7-3'"),
        ({"planner": "\ud800"}, "planner", "planner="),
        ({"watchdog_s": 30, "\ud800": 1}, "", "unicode"),
    ],
)
def test_invalid_settings_change_nothing(unchanged: Running, patch: dict[str, Any], param: str, words: str) -> None:
    body = json.dumps(patch).encode()
    response = unchanged.http.patch("/v1/settings", content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 422, "invalid_setting")
    assert error["param"] == param
    assert words in error["message"]
    assert unchanged.http.get("/v1/settings").json()["revision"] == 0


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b'{"mode": ', "application/json", 400, "invalid_json"),
        (b"", "application/json", 422, "invalid_request"),
        (b"[1, 2]", "application/json", 422, "invalid_request"),
        (b'"mode"', "application/merge-patch+json", 422, "invalid_request"),
        (b'{"mode": "off"}', "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b'{"mode": "off"}', "", 415, "unsupported_media_type"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b'{"mode": "\xff"}', "application/json", 400, "invalid_body"),
        (b"[" * 100_000, "application/json", 400, "invalid_body"),
        (b'{"watchdog_s": ' + b"9" * 10_000 + b"}", "application/json", 400, "invalid_body"),
        (b'{"imbalance_threshold": NaN}', "application/json", 422, "invalid_setting"),
        (b'{"watchdog_s": 1e400}', "application/json", 422, "invalid_setting"),
    ],
)
def test_bad_bodies(unchanged: Running, content: bytes, content_type: str, status: int, code: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    error = error_of(unchanged.http.patch("/v1/settings", content=content, headers=headers), status, code)
    assert "body" in error["message"] or error["param"] in Settings.model_fields
    assert unchanged.http.get("/v1/settings").json()["revision"] == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param"),
    [
        ("GET", "/v1/nothing", 404, "not_found", None),
        ("GET", "/nothing", 404, "not_found", None),
        ("DELETE", "/v1/settings", 405, "method_not_allowed", None),
        ("POST", "/livez", 405, "method_not_allowed", None),
        ("GET", "/v1/settings?engin=a", 422, "invalid_request", "engin"),
        ("GET", "/v1/settings?engine=a", 404, "unknown_engine", None),
        ("GET", "/v1/engines?limit=3", 422, "invalid_request", "limit"),
        ("GET", "/v1/loads?window_s=0", 422, "invalid_request", "window_s"),
        ("GET", "/v1/loads?window_s=nan", 422, "invalid_request", "window_s"),
        ("GET", "/v1/loads?window_s=1e9", 422, "invalid_request", "window_s"),
        ("GET", "/v1/loads?window_s=soon", 422, "invalid_request", "window_s"),
        ("GET", "/v1/loads?engine=a", 404, "unknown_engine", None),
        ("GET", "/v1/events?limit=0", 422, "invalid_request", "limit"),
        ("GET", "/v1/events?cursor=x", 422, "invalid_request", "cursor"),
    ],
)
def test_bad_requests(unchanged: Running, method: str, path: str, status: int, code: str, param: str | None) -> None:
    error = error_of(unchanged.http.request(method, path), status, code)
    if param is not None:
        assert error["param"] == param


def test_a_wrong_method_is_told_the_right_ones(unchanged: Running) -> None:
    response = unchanged.http.delete("/v1/settings")
    assert response.headers["Allow"] == "GET, PATCH"
    assert "use GET, PATCH" in error_of(response, 405, "method_not_allowed")["message"]


def test_the_description_shows_no_key_where_none_is_needed(unchanged: Running) -> None:
    description = unchanged.http.get("/openapi.json").json()
    assert "securitySchemes" not in description["components"]
    patch = description["paths"]["/v1/settings"]["patch"]["requestBody"]["content"]["application/merge-patch+json"]
    assert "slots_per_rank" not in patch["schema"]["properties"] and "mode" in patch["schema"]["properties"]


def test_mistyped_dry_run_does_not_change_anything(unchanged: Running) -> None:
    response = unchanged.http.patch("/v1/settings?dryrun=true", json={"mode": "off"})
    assert "did you mean 'dry_run'" in error_of(response, 422, "invalid_request")["message"]
    assert value_of(unchanged.http.get("/v1/settings").json(), "mode") == "active"


@pytest.mark.parametrize("value", ["three", '"-1"', '"1", "2"', "1" * 40])
def test_bad_if_match(unchanged: Running, value: str) -> None:
    response = unchanged.http.patch("/v1/settings", json={"mode": "off"}, headers={"If-Match": value})
    assert error_of(response, 422, "invalid_request")["param"] == "If-Match"


def test_the_mode_is_not_switched_over_an_if_match(unchanged: Running) -> None:
    """Its route can't compare revisions, and who asks for that must not be told that all went well."""
    before = unchanged.http.get("/v1/settings").headers["ETag"]
    response = unchanged.http.put("/v1/mode", json={"mode": "observe"}, headers={"If-Match": '"999"'})
    assert error_of(response, 422, "invalid_request")["param"] == "If-Match"
    assert unchanged.http.get("/v1/settings").headers["ETag"] == before


def test_unknown_engines_refuse_the_whole_change(running: Running) -> None:
    running.report(Engine())
    response = running.http.patch("/v1/settings?engines=tiny&engines=tin", json={"mode": "off"})
    error_of(response, 404, "unknown_engine")
    assert running.http.get("/v1/settings").json()["revision"] == 0


def test_body_limit(unchanged: Running) -> None:
    big = b'{"reason": "' + b"x" * (1 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    error_of(unchanged.http.patch("/v1/settings", content=big, headers=headers), 413, "body_too_large")
    chunks = (big[start : start + 65536] for start in range(0, len(big), 65536))
    error_of(unchanged.http.patch("/v1/settings", content=chunks, headers=headers), 413, "body_too_large")
    assert unchanged.http.get("/livez").status_code == 200


def test_mode_goes_back_by_itself(running: Running) -> None:
    change = running.http.put("/v1/mode", json={"mode": "observe", "ttl_s": 1.5}).json()
    assert change["diff"] == {"mode": ["active", "observe"]}
    assert change["reverts_at_s"] == pytest.approx(time.time() + 1.5, abs=1.5)
    assert value_of(running.http.get("/v1/settings").json(), "mode") == "observe"
    deadline = time.monotonic() + 10
    while value_of(running.http.get("/v1/settings").json(), "mode") == "observe":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert value_of(running.http.get("/v1/settings").json(), "mode") == "active"


@pytest.mark.parametrize(
    "body", [{}, {"mode": "of"}, {"mode": "off", "ttl": 5}, {"mode": "off", "ttl_s": -1}, {"mode": "off", "ttl_s": 1e9}]
)
def test_bad_mode(unchanged: Running, body: dict[str, Any]) -> None:
    error_of(unchanged.http.put("/v1/mode", json=body), 422, "invalid_request")


def test_loads_add_up(running: Running) -> None:
    engine = Engine(ep_size=4, num_experts=32)
    running.report(engine)
    for _ in range(3):
        engine.run(tokens=512)
    running.report(engine)
    (loads,) = running.http.get("/v1/loads", params={"window_s": 60, "engine": "tiny"}).json()["data"]
    pairs = 3 * 512 * engine.top_k * len(engine.layer_numbers)
    assert loads["tokens"] == 3 * 512
    assert sum(rank["routed_tokens"] for rank in loads["ranks"]) == pairs
    assert sum(rank["computed_tokens"] for rank in loads["ranks"]) == pairs
    assert loads["lends"] > 0
    assert loads["imbalance_ratio_after"] < loads["imbalance_ratio_before"]


def test_events_page_by_page(running: Running) -> None:
    for watchdog_s in range(10, 17):
        running.http.patch("/v1/settings", json={"watchdog_s": watchdog_s})
    pages: list[list[int]] = []
    cursor: str | None = None
    while True:
        page = running.http.get("/v1/events", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        pages.append([event["id"] for event in page["data"]])
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
    ids = [number for page in pages for number in page]
    assert all(len(page) == 3 for page in pages[:-1])
    assert ids == sorted(set(ids), reverse=True)
    assert len(ids) >= 7


def test_request_ids_are_echoed_or_made(unchanged: Running) -> None:
    assert unchanged.http.get("/livez", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    made = unchanged.http.get("/livez", headers={"X-Request-Id": "no blanks, please"}).headers["X-Request-Id"]
    assert len(made) == 32


def test_without_scheduler_every_question_is_answered_503(running: Running) -> None:
    running.caller.is_up = False
    for path in ("/v1/engines", "/v1/engines/a", "/v1/settings", "/v1/loads", "/v1/events"):
        response = running.http.get(path)
        error_of(response, 503, "scheduler_unreachable")
        assert response.headers["Retry-After"] == "2"
    error_of(running.http.patch("/v1/settings", json={"mode": "off"}), 503, "scheduler_unreachable")
    assert running.http.get("/v1/settings/schema").json()["properties"]["mode"]["hot"] is True


def test_an_unexpected_failure_is_a_documented_body(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(**_: Any) -> None:
        raise RuntimeError("secret detail")

    running.caller.scheduler.loads = broken  # type: ignore[method-assign]
    response = running.http.get("/v1/loads")
    assert "secret" not in error_of(response, 500, "internal_error")["message"]
    deadline = time.monotonic() + 10
    while "secret detail" not in caplog.text:  # in the log, where its owner finds it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_strangers_host_is_refused_on_an_open_loopback(unchanged: Running) -> None:
    response = unchanged.http.get("/v1/settings", headers={"Host": "evil.example:8088"})
    error_of(response, 403, "foreign_host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert unchanged.http.get("/livez", headers={"Host": host}).status_code == 200


def test_an_open_port_takes_the_names_that_it_is_told(tmp_path: Path) -> None:
    """A page of evil.example, whose name now leads here, is of the same origin: its browser lets it read and change."""
    for running in start(ServerConfig(insecure=True, allowed_hosts=("control-plane",)), tmp_path / "state"):
        for name in ("evil.example:8088", "control-plane.evil.example", "evil.example"):
            headers = {"Host": name, "Origin": f"http://{name}"}
            error_of(running.http.get("/v1/settings", headers=headers), 403, "foreign_host")
            changed = running.http.patch("/v1/settings", json={"mode": "off"}, headers=headers)
            error_of(changed, 403, "foreign_host")
        for name in ("control-plane:8088", "Control-Plane", "localhost:8088", "127.0.0.1:9999", "[::1]:8088"):
            headers = {"Host": name, "Origin": f"http://{name}"}
            changed = running.http.patch("/v1/settings", json={"mode": "observe"}, headers=headers)
            assert changed.status_code == 200, name


def test_what_is_about_one_engine_needs_its_name_only_where_there_are_several(running: Running) -> None:
    paths = ("/v1/loads/history", "/v1/loads/matrix", "/v1/loads/hot", "/v1/plans/1")
    for path in paths:
        error = error_of(running.http.get(path), 422, "invalid_request")
        assert error["param"] == "engine" and "none has reported" in error["message"]
    engine = Engine()
    running.report(engine)
    for _ in range(3):
        engine.run()
        running.report(engine)
    for path in paths[:3]:
        assert running.http.get(path).status_code == 200, path
        assert running.http.get(path, params={"engine": "tiny"}).status_code == 200, path
        error_of(running.http.get(path, params={"engine": "tin"}), 404, "unknown_engine")
    error_of(running.http.get("/v1/plans/4611686018427387904"), 404, "unknown_plan")
    running.report(Engine(name="other"))
    for path in paths:
        assert "other, tiny" in error_of(running.http.get(path), 422, "invalid_request")["message"]
    for path in ("/v1/recordings", "/v1/placement/apply"):
        message = error_of(running.http.post(path, json={}), 422, "invalid_request")["message"]
        assert message == "engine is missing from the body: there are other, tiny"


def test_matrices_in_every_format_say_the_same(running: Running) -> None:
    engine = Engine()
    running.report(engine)
    engine.run()
    running.report(engine)
    for by, stage in (("rank", "before"), ("rank", "after"), ("expert", "before")):
        query = {"by": by, "stage": stage, "window_s": 60}
        matrix = running.http.get("/v1/loads/matrix", params=query).json()
        assert matrix["layers"] == [1, 2, 5] and sum(map(sum, matrix["values"])) == 1024 * 4 * 3
        answer = running.http.get("/v1/loads/matrix", params={**query, "format": "csv"})
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        flat = [value for row in matrix["values"] for value in row]
        assert [int(row["tokens"]) for row in rows] == flat
        table = running.http.get("/v1/loads/matrix", params={**query, "format": "parquet"})
        assert f"llep-{by}-{stage}.parquet" in table.headers["content-disposition"]
        assert pyarrow.parquet.read_table(io.BytesIO(table.content)).to_pydict()["tokens"] == flat
    error_of(running.http.get("/v1/loads/matrix?by=expert&stage=after"), 422, "invalid_setting")
    error_of(running.http.get("/v1/loads/matrix?by=layer"), 422, "invalid_request")


def test_revisions_are_listed_and_taken_back(running: Running) -> None:
    for watchdog_s in (30, 40, 50):
        running.http.patch("/v1/settings", params={"reason": f"to {watchdog_s}"}, json={"watchdog_s": watchdog_s})
    first = running.http.get("/v1/settings/revisions", params={"limit": 2}).json()
    rest = running.http.get("/v1/settings/revisions", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [revision["number"] for revision in first["data"] + rest["data"]] == [3, 2, 1]
    assert first["data"][0]["reason"] == "to 50" and first["data"][0]["author"] == "anonymous@127.0.0.1"
    assert first["data"][0]["diff"] == {"watchdog_s": [40, 50]}
    body = {"revision": 1, "reason": "better then"}
    error_of(
        running.http.post("/v1/settings/rollback", json=body, headers={"If-Match": '"2"'}), 412, "revision_conflict"
    )
    dry = running.http.post("/v1/settings/rollback", json={**body, "dry_run": True}).json()
    assert dry["diff"] == {"watchdog_s": [50, 30]} and dry["revision"] == 3
    back = running.http.post("/v1/settings/rollback", json=body, headers={"If-Match": '"3"'})
    assert back.json()["revision"] == 4 and back.headers["ETag"] == '"4"'
    assert value_of(running.http.get("/v1/settings").json(), "watchdog_s") == 30
    error_of(running.http.post("/v1/settings/rollback", json={"revision": 99}), 404, "unknown_revision")


def test_of_many_changes_of_one_revision_one_is_made(running: Running) -> None:
    statuses: list[int] = []

    def change(watchdog_s: int) -> None:
        answer = httpx.patch(
            f"{running.url}/v1/settings",
            json={"watchdog_s": watchdog_s},
            headers={"If-Match": '"0"'},
            timeout=20,
            trust_env=False,
        )
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=change, args=(10 + number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + 11 * [412]
    assert running.http.get("/v1/settings").json()["revision"] == 1


def test_a_store_that_cannot_be_written_refuses_changes_and_answers_the_rest(running: Running) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the state can't be written: No space left on device")

    running.caller.scheduler._journal.commit = full  # type: ignore[method-assign]
    for method, path, body in (("PATCH", "/v1/settings", {"watchdog_s": 9}), ("PUT", "/v1/mode", {"mode": "off"})):
        answer = running.http.request(method, path, json=body)
        assert "No space left" in error_of(answer, 503, "store_unavailable")["message"]
        assert answer.headers["Retry-After"] == "2"
    assert running.http.get("/v1/settings").json()["revision"] == 0


def test_events_of_an_engine_and_of_a_kind(running: Running) -> None:
    running.report(Engine())
    running.report(Engine(name="other"))
    running.caller.wait_s = 0.0
    running.http.put("/v1/mode", json={"mode": "observe"})
    kinds = [e["kind"] for e in running.http.get("/v1/events?kind=mode&kind=engine_up").json()["data"]]
    assert set(kinds) == {"mode", "engine_up"}
    of_tiny = running.http.get("/v1/events?engine=tiny").json()["data"]
    assert of_tiny and {event["engine"] for event in of_tiny} == {"tiny"}
    error_of(running.http.get("/v1/events?kind=gossip"), 422, "invalid_request")


def test_placement_advice_and_decisions(running: Running) -> None:
    running.report(Engine(start={"replicas": "suggest"}))
    (view,) = running.http.get("/v1/placement").json()["data"]
    assert (view["engine"], view["state"], view["replicas"]) == ("tiny", "none", [])
    suggestion = running.http.post("/v1/placement/suggest")
    assert suggestion.status_code in (200, 422)  # 422: an engine without room for copies
    for body in ({"replicas": [{"layer": 1, "expert": 0, "rank": 7}]}, {"engine": "tiny", "replicas": []}):
        answer = running.http.post("/v1/placement/apply", json={**body, "dry_run": True})
        assert answer.status_code in (200, 422), answer.text
    error_of(running.http.post("/v1/placement/apply", json={"replicas": [[1, 0, 1]]}), 422, "invalid_request")
    error_of(running.http.post("/v1/placement/rollback", json={}), 422, "placement_refused")
    (advice,) = running.http.get("/v1/advice").json()["data"]
    assert advice["verdict"] in ("worth_it", "not_worth_it", "not_enough_evidence")
    assert running.http.get("/v1/decisions?engine=tiny").status_code == 200


def test_an_engine_without_replica_slots_says_so_and_what_slots_would_bring(running: Running) -> None:
    engine = Engine(start={"replicas": "suggest"}, replica_slots_per_rank=0, counting_since_s=time.time())
    running.report(engine)
    (view,) = running.http.get("/v1/placement").json()["data"]
    assert "replica_slots_per_rank is 0" in view["problem"] and "at start" in view["problem"]
    for _ in range(3):
        engine.run()
        running.report(engine)
    suggestion = running.http.post("/v1/placement/suggest").json()
    assert suggestion["reason"] == view["problem"] and not suggestion["is_worth_it"]
    room = suggestion["with_room"]
    assert (room["slots_per_rank"], room["bytes_per_rank"]) == (3, 3 * BYTES_PER_SLOT)
    roomy = Engine(name="roomy", start={"replicas": "suggest"})
    running.report(roomy)
    roomy_view = running.http.get("/v1/placement?engine=roomy").json()["data"][0]
    assert roomy_view["problem"] == ""
    assert running.http.post("/v1/placement/suggest?engine=roomy").json()["with_room"] is None


def test_loads_by_step_phase(running: Running) -> None:
    engine = Engine(counting_since_s=time.time(), num_experts=8)
    running.report(engine)
    engine.run(tokens=1024, hot_share=0.9)
    engine.run(tokens=32, hot_share=0.25, phase="decode")  # as good as even
    running.report(engine)
    phases = ("", "?phase=prefill", "?phase=decode")
    points = [running.http.get(f"/v1/loads/history{phase}").json()["data"] for phase in phases]
    assert [sum(point["tokens"] for point in of) for of in points] == [1056, 1024, 32]
    prefill, decode = (next(p["imbalance_ratio_before"] for p in of if p["layer_steps"]) for of in points[1:])
    assert decode < 1.4 < prefill
    hottest = [running.http.get(f"/v1/loads/hot{phase}").json()["data"][0] for phase in phases]
    assert hottest[1]["load_ratio"] > 1.5 * hottest[2]["load_ratio"]
    assert hottest[1]["tokens"] + 32 * engine.top_k > hottest[0]["tokens"] >= hottest[1]["tokens"]
    for path in ("history", "hot"):
        error_of(running.http.get(f"/v1/loads/{path}?phase=dream"), 422, "invalid_request")


def test_loads_say_what_lending_was_worth_and_what_devices_have_left(running: Running) -> None:
    engine = Engine(counting_since_s=time.time())
    running.report(engine)
    (loads,) = running.http.get("/v1/loads").json()["data"]
    assert loads["worth"] is None, "no probe yet"
    assert {(rank["device_total_bytes"], rank["device_free_bytes"]) for rank in loads["ranks"]} == {(16 << 30, 8 << 30)}
    for _ in range(8):
        engine.run()
    for _ in range(2):  # figures are means over ranks, and the others are a report behind when rank 0 speaks
        running.report(engine)
    (loads,) = running.http.get("/v1/loads?window_s=60").json()["data"]
    said = engine.worth["prefill"]
    gain_s = said["lent_pairs"] * said["probed_s"] / said["probed_pairs"] - said["lent_s"]
    worth = loads["worth"]
    assert worth["saved_s"] == pytest.approx(gain_s) and gain_s > 0
    assert (worth["lent_steps"], worth["probed_steps"]) == (said["lent_steps"], said["probed_steps"])
    assert worth["gain_ratio"] is None, "one window says nothing about the spread"
    (decode,) = running.http.get("/v1/loads?window_s=60&phase=decode").json()["data"]
    assert decode["worth"] is None
