"""The server of the page."""

from functools import partial

from nicegui import app, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from slm.page.checkpoints import Checkpoint
from slm.page.page import Page
from slm.page.worker import Worker


def serve(checkpoint: Checkpoint, host: str, port: int, show: bool) -> None:
    """Serve the page until the process is told to end.

    A page of another site may not be read through it: requests must name this machine.
    """
    worker = Worker()
    worker.interrupt(checkpoint.model.transformer)
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
    )
