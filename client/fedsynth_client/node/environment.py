"""Where this process's code comes from: the installed environment, and nothing that somebody sent.

Flower's own executor puts the bundle's folder first on the import path, so that a file ``torch.py`` in it runs instead of
the installed one. The runner never unpacks a bundle; this proves, in the process that touches patients' data, that no
other folder got onto the path either.
"""

from __future__ import annotations

import json
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

from fedsynth.errors import UsageError

# What touches patients' data, keys or the wire.
GUARDED = frozenset(
    {"fedsynth", "fedsynth_client", "torch", "opacus", "flwr", "numpy", "pandas", "safetensors", "pydantic", "httpx"}
)


def installed_roots() -> tuple[Path, ...]:
    """Folders that installed code lies in: the environment's own, and the source folder of an editable installation."""
    paths = sysconfig.get_paths()
    roots = {paths[key] for key in ("purelib", "platlib", "stdlib", "platstdlib")} | set(site.getsitepackages())
    return tuple(sorted({Path(root).resolve() for root in roots} | set(_editable_root())))


def _editable_root() -> Iterable[Path]:
    try:
        text = distribution("fedsynth").read_text("direct_url.json")
    except PackageNotFoundError:
        raise UsageError("not_installed", "fedsynth is not installed in this environment.", "Install it.") from None
    origin = json.loads(text) if text else {}
    if origin.get("dir_info", {}).get("editable"):
        yield Path(unquote(urlparse(origin["url"]).path)).resolve()


def check_import_path(path: Iterable[str], working_folder: Path, folder: Path, safe: bool) -> None:
    """Refuse an import path that leads into the working folder or into the site's own folder.

    Args:
        path: ``sys.path``.
        working_folder: where the process was started.
        folder: the site's folder, where Flower's own folder lies, too.
        safe: ``sys.flags.safe_path``.

    Raises:
        UsageError: ``import_path_unsafe``.
    """
    entries = [Path(entry).resolve() for entry in path]  # "" is the working folder
    outside = [
        entry
        for entry in entries
        if entry == working_folder.resolve() or entry == folder.resolve() or folder.resolve() in entry.parents
    ]
    if not safe or outside:
        raise UsageError(
            "import_path_unsafe",
            "Python would look for code in the working folder or in the site's folder.",
            "Start the runner with `fedsynth site start`, which runs Python isolated (-I).",
        )


def strays(modules: Mapping[str, ModuleType], roots: Iterable[Path], guarded: frozenset[str] = GUARDED) -> list[str]:
    """Names of guarded modules whose file lies outside `roots`.

    Args:
        modules: ``sys.modules``.
        roots: see `installed_roots`.
        guarded: top-level packages that matter.
    """
    roots = tuple(roots)
    found = []
    for name, module in list(modules.items()):
        spec = getattr(module, "__spec__", None)
        if name.partition(".")[0] not in guarded or spec is None or not spec.has_location or spec.origin is None:
            continue  # modules without a file are made by their packages
        origin = Path(spec.origin).resolve()
        if not any(root in origin.parents for root in roots):
            found.append(name)
    return sorted(found)


def check_environment(folder: Path) -> None:
    """Refuse to work in a process whose code does not come from the installed environment.

    Raises:
        UsageError: ``import_path_unsafe``, ``not_installed`` or ``code_not_installed``.
    """
    check_import_path(sys.path, Path.cwd(), folder, bool(sys.flags.safe_path))
    found = strays(sys.modules, installed_roots())
    if found:
        raise UsageError(
            "code_not_installed",
            f"{len(found)} modules come from outside the installed environment, the first is {found[0]}.",
            "Remove what was put in front of the installed packages, or install fedsynth anew.",
        )
