"""What is sent before any script runs; needs no browser."""

from __future__ import annotations

import re
from pathlib import Path

from running import Running

from llep.config import Settings, is_hot
from llep_server import page

MOST_BYTES = 300_000


def test_document_and_assets_are_strict_and_light(busy: Running) -> None:
    answer = busy.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    assert answer.headers["x-frame-options"] == "DENY"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|\bstyle=|https?://", answer.text)
    urls = set(re.findall(r'(?:src|href)="(static/[^"]+)"', answer.text))
    total = len(answer.content)
    for url in urls:
        asset = busy.http.get(f"/{url}")
        assert asset.status_code == 200, url
        assert "immutable" in asset.headers["cache-control"]
        total += len(asset.content)
    assert total < MOST_BYTES
    assert {url.rpartition("/")[2] for url in urls} == set(page.assets())


def test_scripts_ask_no_other_host() -> None:
    for name, content in page.assets().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\beval\(|innerHTML|document\.write|new Function", text), name


def test_unknown_assets_are_not_found(busy: Running) -> None:
    digest = page.assets_digest()
    for path in (f"/static/{digest}/no.js", "/static/0000/app.js", f"/static/{digest}/..%2f__init__.py"):
        assert busy.http.get(path).status_code == 404


def test_every_setting_has_a_field_with_its_range(busy: Running) -> None:
    document = busy.http.get("/").text
    for key in Settings.model_fields:
        (field,) = re.findall(rf'<(?:input|select)[^>]* data-key="{key}"[^>]*>', document)
        assert ("disabled" in field) is not is_hot(key)
    (field,) = re.findall(r'<input[^>]* data-key="capacity_factor"[^>]*>', document)
    assert 'min="1" max="4"' in field


def test_assets_are_packaged() -> None:
    folder = Path(page.__file__).parent
    assert (folder / "page.html").is_file() and (folder / "static" / "app.js").is_file()
