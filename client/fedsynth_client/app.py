"""The Flower ClientApp of a site: thin handlers, which unpack, call `rounds.answer`, and pack.

The text of an exception never leaves: Flower would send it to the coordinator as it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsynth.errors import FedsynthError, UsageError
from fedsynth.plan import MODULES, Activity
from fedsynth.records import check_task, refusal
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

    def handle(module: Activity, message: Message, context: Context) -> Message:
        recipient = f"node {message.metadata.src_node_id}"

        content = _guarded(module, lambda: folder_of(context), lambda s: answer(s, module, message.content, recipient))
        return Message(content, reply_to=message)

    @app.query("site")
    def query_site(message: Message, context: Context) -> Message:
        def work(site: Site) -> RecordDict:
            check_task(message.content, ())
            site.log.info("asked for its name by node %d", message.metadata.src_node_id)
            return _name(site)

        return Message(_guarded("site", lambda: folder_of(context), work), reply_to=message)

    def handler(module: Activity) -> Callable[[Message, Context], Message]:
        return lambda message, context: handle(module, message, context)

    for module in MODULES:
        app.train(module)(handler(module))
    app.evaluate("holdout")(handler("evaluation"))

    return app


def _name(site: Site) -> RecordDict:
    return RecordDict({"site": ConfigRecord({"name": site.policy().site})})


def _guarded(what: str, folder: Callable[[], Path], work: Callable[[Site], RecordDict]) -> RecordDict:
    """The boundary of the site: whatever goes wrong is told in full in the site's log, and by a code to the others."""
    log = logging.getLogger(__name__)  # until the site's folder is known and can be written to
    try:
        site = Site(folder())
        log = site.log
        return work(site)
    except FedsynthError as error:
        log.warning("%s refused or failed: %s", what, error)
        return refusal(error.code)
    except Exception:
        log.exception("%s failed", what)
        return refusal("internal_error")


app = make_app()
