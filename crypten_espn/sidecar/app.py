"""The HTTP side: who may ask, what is answered, and with which status.

GET  /                                   the page
GET  /image                              what the page says of the model
POST /image                              a JPEG or PNG file; JSON for the page
GET  /v2, /v2/health/live, /v2/health/ready
GET  /v2/models/NAME[/versions/1], and .../ready
POST /v2/models/NAME[/versions/1]/infer

400  the request or its input is refused, by name; nothing of it has left this host
403  another host's name, or another site's page
408, 413, 415  too slow, too large, compressed
502  the server is gone or refuses this client
503  it, or this sidecar, answers no more for now: a quota, a limit, a shutdown
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from importlib.resources import files

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..bundle.images import decode_image
from ..errors import (
    ClosingError,
    DataError,
    EspnError,
    LimitError,
    QuotaError,
    RangeError,
    ShapeError,
)
from ..inputs import input_batch
from ..serving.answer import Answer
from ..serving.boundary import told, traced
from ..serving.events import RequestRefused, report
from .asking import Queue
from .limits import SidecarLimits
from .picture import picture
from .tensors import EXTENSIONS, VERSION, Asked, Model, Names

log = logging.getLogger(__name__)

_LENGTH = "Inference-Header-Content-Length"
_SHOWN = 5  # classes on the page
_Handler = Callable[[Request], Awaitable[Response]]


class Refusal(EspnError):
    """A request that is answered with a status of its own."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def status_of(error: EspnError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, Refusal):
        return error.status
    if isinstance(error, DataError | ShapeError | RangeError):
        return 400
    return 503 if isinstance(error, LimitError | QuotaError | ClosingError) else 502


class App:
    """Answers applications and the page.

    Args:
        names: of the model and its tensors.
        queue: who answers, and says what is served.
        hosts: names by which it may be called.
        limits: what is put up with.
    """

    def __init__(
        self,
        names: Names,
        queue: Queue,
        *,
        hosts: Collection[str],
        limits: SidecarLimits,
    ) -> None:
        self._names, self._queue, self._limits = names, queue, limits
        self._hosts = {host.lower() for host in hosts}
        self._held = 0
        page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        self._page, self._policy = page, _policy(page)
        at = "/v2/models/{name}"
        version = at + "/versions/{version}"
        routes = [
            self._route("/", self._index),
            self._route("/image", self._about),
            self._route("/image", self._image, "POST"),
            self._route("/v2", self._server),
            self._route("/v2/health/live", self._live),
            self._route("/v2/health/ready", self._ready),
            *(self._route(path, self._metadata) for path in (at, version)),
            *(self._route(f"{path}/ready", self._ready) for path in (at, version)),
            *(
                self._route(f"{path}/infer", self._infer, "POST")
                for path in (at, version)
            ),
        ]
        self.asgi = Starlette(
            routes=routes, exception_handlers={HTTPException: self._nowhere}
        )

    @property
    def _model(self) -> Model:
        """What is served now."""
        plan, description = self._queue.served
        return Model(plan, description, self._names, self._limits.batch)

    def _route(self, path: str, handler: _Handler, method: str = "GET") -> Route:
        async def answer(request: Request) -> Response:
            try:
                self._check_caller(request)
                self._check_model(request)
                return self._with_headers(await handler(request))
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except EspnError as error:
                return self._refused(status_of(error), error)
            except Exception as error:
                log.error("a request failed: %s", traced(error))
                return self._refused(500, error)

        return Route(path, answer, methods=[method])

    # -- who asks, and for what

    def _check_caller(self, request: Request) -> None:
        """Refuse what a page of another site makes a browser ask here.

        Raises:
            Refusal: the host has another name, or the page another origin.
        """
        host = request.headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if name not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            raise Refusal(
                403, f"this sidecar is not called {name[:80]!a}; it is {known}"
            )
        origin = request.headers.get("origin")
        if origin not in (None, f"http://{host}"):
            raise Refusal(403, "a page of another origin may not ask here")

    def _check_model(self, request: Request) -> None:
        """Refuse another model's name, or version.

        Raises:
            Refusal: it is not served here.
        """
        known = self._names.model
        name = request.path_params.get("name", known)
        version = request.path_params.get("version", VERSION)
        if (name, version) != (known, VERSION):
            raise Refusal(
                404,
                f"model {name[:80]!a} of version {version[:20]!a} is not served here; "
                f"{known!r} of version {VERSION} is",
            )

    async def _body(self, request: Request, limit: int) -> bytes:
        """The body of a request, once it is known to be small enough.

        Raises:
            Refusal: it is too large, compressed, or slow.
            LimitError: too much is held for other requests.
        """
        coding = request.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise Refusal(415, f"a body in {coding[:40]!a} was sent; send it as it is")
        text = request.headers.get("content-length", "")
        size = int(text) if re.fullmatch(r"\d{1,15}", text) else limit
        if size > limit:
            raise _too_large(f"{size:,}", limit)
        if self._held + size > self._limits.held_bytes:
            raise LimitError(
                f"{self._held:,} bytes of other requests are held; with {size:,} more "
                f"that exceeds {self._limits.held_bytes:,}. Try again later.",
                "held_bytes",
            )
        self._held += size
        try:
            seconds = self._limits.request_s
            return await asyncio.wait_for(_received(request, limit), seconds)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the request was not complete after {seconds:g} s"
            ) from None
        finally:
            self._held -= size

    # -- the protocol

    async def _server(self, _: Request) -> Response:
        about = {"name": "crypten-espn", "version": __version__}
        return JSONResponse({**about, "extensions": list(EXTENSIONS)})

    async def _live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, _: Request) -> Response:
        ready = self._queue.ready
        about = {"name": self._names.model, "ready": ready}
        return JSONResponse(about, status_code=200 if ready else 503)

    async def _metadata(self, _: Request) -> Response:
        return JSONResponse(self._model.metadata())

    async def _infer(self, request: Request) -> Response:
        length = request.headers.get(_LENGTH)
        if length is not None and not re.fullmatch(r"\d{1,15}", length):
            raise DataError(f"{_LENGTH} is {length[:20]!a}; give a number of bytes")
        model = self._model
        body = await self._body(request, model.body_bytes)
        header = None if length is None else int(length)
        asked, x = await run_in_threadpool(_read, model, body, header)
        answer = await asyncio.wrap_future(self._queue.put(x))
        data, json = await run_in_threadpool(model.write, asked, answer.logits)
        if json is None:
            return Response(data, media_type="application/json")
        return Response(
            data,
            media_type="application/octet-stream",
            headers={_LENGTH: str(json)},
        )

    # -- the page

    async def _index(self, _: Request) -> Response:
        return HTMLResponse(self._page)

    async def _about(self, _: Request) -> Response:
        plan, described = self._queue.served
        return JSONResponse(
            {
                "name": self._names.model,
                "images": described.images is not None,
                "shape": list(plan.input.shape),
            }
        )

    async def _image(self, request: Request) -> Response:
        model = self._model
        data = await self._body(request, self._limits.image_bytes)
        x = await run_in_threadpool(_decoded, model, data)
        answer = await asyncio.wrap_future(self._queue.put(x, show=True))
        return JSONResponse(await run_in_threadpool(_for_page, model, answer))

    # -- answers of any kind

    async def _nowhere(self, request: Request, error: Exception) -> Response:
        """Another path, or another method than a path has."""
        assert isinstance(error, HTTPException)
        what = f"{request.method[:10]} {request.url.path[:80]!a}"
        return self._refused(
            error.status_code, Refusal(error.status_code, f"{what} is not known here")
        )

    def _refused(self, status: int, error: Exception) -> Response:
        report(log, RequestRefused(status, type(error).__name__))
        text = str(error) if isinstance(error, Refusal) else told(error)
        return self._with_headers(JSONResponse({"error": text}, status_code=status))

    def _with_headers(self, response: Response) -> Response:
        response.headers.update(
            {
                "Content-Security-Policy": self._policy,
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            }
        )
        return response


def _read(model: Model, body: bytes, header: int | None) -> tuple[Asked, torch.Tensor]:
    try:
        asked = model.read(body, header)
    except LimitError as error:  # another try would be as large
        raise Refusal(413, told(error)) from None
    return asked, _checked(model, asked.x)


def _checked(model: Model, x: object) -> torch.Tensor:
    """An input that may be sent: finite, within the plan, and not refused.

    Raises:
        DataError, ShapeError, RangeError: as `Plan.encode`.
    """
    model.plan.encode(x)
    return input_batch(x, model.plan.input.shape)


def _decoded(model: Model, data: bytes) -> torch.Tensor:
    """An image file as an input that may be sent.

    Raises:
        DataError: as `decode_image`, or nothing is said of images.
        RangeError: as `Plan.encode`.
    """
    images, plan = model.description.images, model.plan
    if images is None:
        raise DataError(
            "the network's owner does not say how images become inputs; only "
            "tensors can be sent here"
        )
    x = decode_image(data, preprocessing=images, shape=plan.input.shape)
    return _checked(model, x)


def _for_page(model: Model, answer: Answer) -> dict[str, object]:
    names = model.description.classes
    scores = answer.logits[0].reshape(-1).double().softmax(0)
    best = scores.topk(min(_SHOWN, len(scores)))
    assert answer.masked is not None
    seen = picture(answer.masked[0], ring=model.plan.sources[0].ring)
    return {
        "classes": [
            {"name": names[i] if names else f"class {i}", "score": score}
            for score, i in zip(
                best.values.tolist(), best.indices.tolist(), strict=True
            )
        ],
        "seconds": answer.seconds,
        "sent": answer.sent,
        "received": answer.received,
        "masked": "data:image/png;base64," + base64.b64encode(seen).decode(),
    }


async def _received(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(f"more than {limit:,}", limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(size: str, limit: int) -> Refusal:
    return Refusal(
        413, f"a body of {size} bytes was sent; {limit:,} are the most: send less"
    )


def _policy(page: str) -> str:
    """A Content-Security-Policy that lets the page's own style and script run."""
    allowed = {}
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[tag] = f"{tag}-src 'sha256-{digest}'"
    return "; ".join(
        [
            "default-src 'none'",
            *allowed.values(),
            "img-src data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
