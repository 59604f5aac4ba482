"""The server of the page."""

from functools import partial

from nicegui import app, ui
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from slm.page.checkpoints import Checkpoint
from slm.page.page import Page
from slm.page.worker import Worker

SECONDS_TO_COME_BACK = 120.0
"""So long a window of the browser keeps what it shows when it does not answer, as where the machine is busy."""


class OnlyOwnPages:
    """Refuses sockets and other requests in which a browser names another site as where they come from.

    It names none where it only shows something, such as a page in a frame, which the other site cannot read.

    Args:
        app: what answers the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else Headers()
        origin = headers.get("origin")
        if origin is None or origin == f"http://{headers.get('host')}":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(reason="another site")(scope, receive, send)
        else:
            await PlainTextResponse("another site", 403)(scope, receive, send)


def serve(checkpoint: Checkpoint, host: str, port: int, show: bool) -> None:
    """Serve the page until the process is told to end.

    A page of another site may not be read through it: requests must name this machine, and come from the page itself.
    """
    worker = Worker()
    worker.interrupt(checkpoint.model.transformer)
    app.add_middleware(OnlyOwnPages)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"])
    ui.run(  # assets are the package's own, and nothing is sent anywhere
        partial(Page, checkpoint, worker),
        host=host,
        port=port,
        title="Inside a language model",
        favicon="🔍",
        dark=None,
        language="en-US",
        reload=False,
        show=show,
        show_welcome_message=False,
        tailwind=False,
        binding_refresh_interval=None,
        reconnect_timeout=SECONDS_TO_COME_BACK,
    )
