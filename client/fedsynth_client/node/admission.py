"""What the runner lets in: whose bundle, which messages, from whom, how large. Decided before anything is unpacked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from fedsynth.errors import FedsynthError, Refused
from fedsynth.plan import Activity
from fedsynth.records import MESSAGE_TYPES
from fedsynth_client.dry_run import task_bytes
from fedsynth_client.site import Site

QUERY_SITE = "query.site"
_ACTIVITY_OF: dict[str, Activity] = {message_type: activity for activity, message_type in MESSAGE_TYPES.items()}
ADMITTED_TYPES = frozenset(_ACTIVITY_OF) | {QUERY_SITE}
# Up to here a message is unpacked whatever it is, so that a refusal can name its true cause; beyond, only as large as an
# approved plan's tasks are.
ALWAYS_BYTES = 64 * 2**20
_MARGIN = 2.0
# Objects in a message: records, arrays and their chunks.
LARGEST_TREE = 50_000


def check_bundle(bundle: bytes, declared: str, allowed: Iterable[str]) -> None:
    """Refuse a run whose bundle this site did not allow, by the hash of its bytes.

    Raises:
        Refused: ``bundle_altered`` or ``bundle_not_allowed``.
    """
    actual = hashlib.sha256(bundle).hexdigest()
    if actual != declared:
        raise Refused("bundle_altered", f"The run's bundle has hash {actual[:12]}, not the one it declares.")
    if actual not in set(allowed):
        raise Refused(
            "bundle_not_allowed",
            f"The run's bundle {actual} is not one that this site allows.",
            "Both sides need the same version of fedsynth; another bundle can be allowed in node.toml.",
        )


def check_kind(message_type: str, source: int, coordinator: int) -> None:
    """Refuse a message of another type than those defined, or from anybody but the coordinator.

    Raises:
        Refused: ``message_type_not_allowed`` or ``sender_not_allowed``.
    """
    if message_type not in ADMITTED_TYPES:
        # The type is the other side's text: its like is logged, cut short and quoted.
        raise Refused("message_type_not_allowed", f"Messages of type {message_type[:40]!r} are not defined.")
    if source != coordinator:
        raise Refused("sender_not_allowed", f"The message comes from node {source}, not from the coordinator.")


def check_size(objects: int, size: int, limit: int) -> None:
    """Refuse a message of more objects or bytes than any task can have.

    Raises:
        Refused: ``message_too_large``.
    """
    if objects > LARGEST_TREE or size > limit:
        raise Refused(
            "message_too_large", f"The message holds {objects} objects of {size} bytes; {limit} bytes are allowed."
        )


def size_limit(site: Site, message_type: str) -> int:
    """Bytes that a message of that type may have: what an approved plan's task has, with a margin."""
    activity = _ACTIVITY_OF.get(message_type)
    if activity is None:
        return ALWAYS_BYTES
    return max([ALWAYS_BYTES, *(int(_MARGIN * size) for size in _approved_sizes(site, activity))])


def _approved_sizes(site: Site, activity: Activity) -> Iterator[int]:
    try:
        digests = site.policy().approved_plans
    except FedsynthError:  # without a readable policy nothing is allowed; the answer to the message says so
        return
    for digest in digests:
        try:
            yield _task_bytes(site.folder, digest, activity)
        except FedsynthError:  # a plan that was removed or altered: the app refuses its tasks, with that cause
            continue


@lru_cache(maxsize=64)
def _task_bytes(folder: Path, digest: str, activity: Activity) -> int:
    plan = Site(folder).plan(digest)
    return task_bytes(plan, activity) if activity in plan.activities else 0
