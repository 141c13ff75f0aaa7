"""The page at /docs: every route with an example, every metric; made from the code, needs nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from llep.config import Settings, is_hot
from llep_server.families import FAMILIES, SCHEDULER_FAMILIES
from llep_server.samples import ENGINE_LABELS

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
METHODS = ("get", "put", "post", "patch", "delete")
# Examples of bodies; a POST that is not here takes none.
BODIES: Mapping[str, Any] = {
    "/v1/settings": {"imbalance_threshold": 1.5},
    "/v1/settings/rollback": {"revision": 3, "reason": "worse than before"},
    "/v1/mode": {"mode": "observe", "ttl_s": 600},
    "/v1/plans/simulate": {"tokens": [[4000, 96], [4000, 96]], "min_chunk_tokens": 64},
    "/v1/placement/apply": {"dry_run": True},
    "/v1/placement/rollback": {"reason": "worse than before"},
    "/v1/recordings": {"duration_s": 60},
    "/v1/tuning": {"recording": "ID", "cost_model": "h100"},
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem } h3 { margin: 2rem 0 .25rem } p { margin: .25rem 0 .5rem }
code, pre { font: 14px/1.45 ui-monospace, monospace } pre { background: var(--soft); padding: .6rem; overflow-x: auto }
table { border-collapse: collapse; display: block; overflow-x: auto } th { font-weight: 600 }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
"""


Schemas = Mapping[str, Mapping[str, Any]]


def page(openapi: Mapping[str, Any], base_url: str) -> str:
    """The whole page as HTML. `base_url` is where the reader reached the control plane."""
    schemas: Schemas = openapi["components"]["schemas"]
    operations = [
        (method, path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    ]
    routes = "".join(_operation(base_url, *operation, schemas) for operation in operations)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llep control plane</title><style>{STYLE}</style></head><body>
<h1>llep control plane {escape(openapi["info"]["version"])}</h1>
<p>See and steer Least-Loaded Expert Parallelism. The same as a machine reads it:
<a href="/openapi.json">openapi.json</a>.</p>
<p>Where the control plane was started with a keys file, send <code>Authorization: Bearer KEY</code>: reading needs
scope read, changing needs scope admin. Every answer carries <code>X-Request-Id</code>; every failure has the body
<code>{{"error": {{"message", "type", "param", "code"}}, "request_id"}}</code>.</p>
<h2>Routes</h2>{routes}
<h2>What goes over the wire</h2>{_shapes(schemas)}
<h2>Settings</h2>{_settings()}
<h2>Metrics</h2><p>At <a href="/metrics">/metrics</a>; all but {" and ".join(SCHEDULER_FAMILIES)} carry the labels
{" and ".join(f"<code>{label}</code>" for label in ENGINE_LABELS)}.</p>{_metrics()}
</body></html>"""


def _operation(base_url: str, method: str, path: str, operation: Mapping[str, Any], schemas: Schemas) -> str:
    text = operation.get("description") or operation.get("summary", "")
    parameters = operation.get("parameters", ())
    rows = [
        (f"<code>{escape(p['name'])}</code>", p["in"], escape(_rule(p["schema"])), escape(p.get("description", "")))
        for p in parameters
    ]
    rows += [(*row[:1], "body", *row[1:]) for row in _members(_body_schema(operation, schemas))]
    table = _table(("parameter", "in", "is", ""), rows) if rows else ""
    example = escape(curl(base_url, method, path))
    heading = f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
    return f"{heading}<p>{escape(text)}</p>{table}<pre>{example}</pre><p>{_answers(operation)}</p>"


def _body_schema(operation: Mapping[str, Any], schemas: Schemas) -> Mapping[str, Any]:
    """JSON Schema of the body; empty where there is none."""
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema: Mapping[str, Any] = content["schema"]
        name = next((_reference(option) for option in (schema, *schema.get("anyOf", ())) if "$ref" in option), None)
        return schemas[name] if name else schema
    return {}


def _members(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, rule in schema.get("properties", {}).items():
        needed = ", needed" if name in schema.get("required", ()) else ""
        yield f"<code>{escape(name)}</code>", escape(_rule(rule) + needed), escape(rule.get("description", ""))


def _answers(operation: Mapping[str, Any]) -> str:
    """What comes back: the good answers with their shapes, the failures by number."""
    good, failures = [], []
    for status, response in operation["responses"].items():
        if status >= "400":
            failures.append(status)
            continue
        shapes = [
            _link(content["schema"]) if content.get("schema") else escape(media_type)
            for media_type, content in response.get("content", {}).items()
        ]
        good.append(f"{status}: {' or '.join(shapes) or 'nothing'}")
    return f"Answers {', '.join(good)}" + (f"; fails with {', '.join(failures)}." if failures else ".")


def _link(schema: Mapping[str, Any]) -> str:
    if "$ref" not in schema:
        return escape(_rule(schema))
    name = escape(_reference(schema))
    return f'<a href="#{name}"><code>{name}</code></a>'


def _shapes(schemas: Schemas) -> str:
    """Every object that goes over the wire, member by member."""
    return "".join(
        f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3><p>{escape(schema.get("description", ""))}</p>'
        + _table(("member", "is", ""), _members(schema))
        for name, schema in schemas.items()
        if schema.get("properties")
    )


def _reference(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def curl(base_url: str, method: str, path: str) -> str:
    """A command that can be tried as it is (where a path names an engine: after putting its id there)."""
    url = base_url + path.replace("{engine}", "ENGINE").replace("{id}", "ID")
    if method == "get":
        options = {"/v1/loads/stream": "-N ", "/v1/recordings/{id}/data": "-C - -o recording.tar "}.get(path, "")
        return f"curl {options}{url}"
    if path not in BODIES:
        return f"curl -X {method.upper()} {url}"
    body = json.dumps(BODIES[path])
    return f"curl -X {method.upper()} {url} -H 'Content-Type: application/json' -d '{body}'"


def _rule(schema: Mapping[str, Any]) -> str:
    """A JSON schema of one value in a few words."""
    if "$ref" in schema:
        return _reference(schema)
    if "anyOf" in schema:
        return " or ".join(_rule(option) for option in schema["anyOf"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"])) + _default(schema)
    kind = schema.get("type", "anything")
    if kind == "array" and "items" in schema:
        return "list of " + _rule(schema["items"])
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    bounds = f", {low:g} to {high:g}" if low is not None and high is not None else ""
    return f"{kind}{bounds}{_default(schema)}"


def _default(schema: Mapping[str, Any]) -> str:
    return f", default {schema['default']}" if schema.get("default") not in (None, "") else ""


def _settings() -> str:
    rows = (
        (f"<code>{key}</code>", escape(str(value)), "yes" if is_hot(key) else "no", escape(_description(key)))
        for key, value in Settings().dump().items()
    )
    return _table(("key", "default", "can change while serving", ""), rows)


def _description(key: str) -> str:
    return Settings.model_fields[key].description or ""


def _metrics() -> str:
    rows = [(f"<code>{name}</code>", "gauge", "", "", escape(help)) for name, help in SCHEDULER_FAMILIES.items()]
    for family in FAMILIES:
        labels = " ".join(f"<code>{label}</code>" for label in family.labels)
        level = family.level.name.lower()
        rows.append((f"<code>{family.name}</code>", family.type_name, labels, level, escape(family.help)))
    return _table(("name", "type", "labels", "from metrics_level", ""), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = "".join(f"<th>{title}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
