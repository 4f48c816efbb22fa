"""The Flower ClientApp of a site: thin handlers, which unpack, call `rounds.answer`, and pack.

The text of an exception never leaves: Flower would send it to the coordinator as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsynth.errors import FedsynthError, UsageError
from fedsynth.plan import Module
from fedsynth.records import refusal
from fedsynth_client.rounds import answer
from fedsynth_client.site import Site


def site_folder(context: Context) -> Path:
    """The site's folder: node config ``site-folder``, or the environment variable ``FEDSYNTH_SITE``.

    Raises:
        UsageError: ``site_folder_unknown``.
    """
    folder = context.node_config.get("site-folder") or os.environ.get("FEDSYNTH_SITE")
    if not folder:
        raise UsageError(
            "site_folder_unknown", "Neither the node config site-folder nor FEDSYNTH_SITE names the site's folder."
        )
    return Path(str(folder))


def make_app(folder_of: Callable[[Context], Path] = site_folder) -> ClientApp:
    """A ClientApp whose site is found by `folder_of`."""
    app = ClientApp()

    def handle(module: Module, message: Message, context: Context) -> Message:
        return Message(_guarded(Site(folder_of(context)), module, message), reply_to=message)

    @app.query("site")
    def query_site(message: Message, context: Context) -> Message:
        name = Site(folder_of(context)).policy().site
        return Message(RecordDict({"site": ConfigRecord({"name": name})}), reply_to=message)

    @app.train("autoencoder")
    def train_autoencoder(message: Message, context: Context) -> Message:
        return handle("autoencoder", message, context)

    @app.train("radiogenomics")
    def train_radiogenomics(message: Message, context: Context) -> Message:
        return handle("radiogenomics", message, context)

    @app.train("gan")
    def train_gan(message: Message, context: Context) -> Message:
        return handle("gan", message, context)

    return app


def _guarded(site: Site, module: Module, message: Message) -> RecordDict:
    try:
        return answer(site, module, message.content, recipient=f"node {message.metadata.src_node_id}")
    except FedsynthError as error:
        site.log.warning("%s refused or failed: %s", module, error)
        return refusal(error.code)
    except Exception:
        # The boundary of the site: whatever went wrong is told in full here and by a code there.
        site.log.exception("%s failed", module)
        return refusal("internal_error")


app = make_app()
