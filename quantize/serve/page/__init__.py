"""The page at / and the documentation at /docs, from files of this package and of fastapi-offline: no CDN."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent
SWAGGER = Path(fastapi_offline.__file__).parent / "static"
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
DOCS_POLICY = POLICY + "; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


def add_pages(app: FastAPI, root_path: str) -> None:
    """Add /, /docs and their files. root_path: what a proxy has before our paths."""
    start_page = (FOLDER / "index.html").read_text(encoding="utf-8").replace("{root}", root_path)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(start_page, headers={**HEADERS, "content-security-policy": POLICY})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page = get_swagger_ui_html(
            openapi_url=root_path + "/openapi.json",
            title="quantize gateway",
            swagger_js_url=root_path + "/assets/swagger/swagger-ui-bundle.js",
            swagger_css_url=root_path + "/assets/swagger/swagger-ui.css",
            swagger_favicon_url=root_path + "/assets/swagger/favicon.png",
        )
        page.headers.update({**HEADERS, "content-security-policy": DOCS_POLICY})
        return page

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)

    app.mount("/assets/swagger", StaticFiles(directory=SWAGGER))
    app.mount("/assets/page", StaticFiles(directory=FOLDER / "files"))
