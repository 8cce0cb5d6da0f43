"""A configuration is data: it names values and choices, and can neither start code nor write elsewhere.

Hydra itself offers ways to do that: callbacks, launchers and sweepers are made from a ``_target_``, logging handlers
from a ``class``, variables of the environment are set and read, and a search path ``pkg://NAME`` imports that package.
What is not a plugin of Hydra's is refused before anything is made of it. Nothing in this project instantiates from a
configuration.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config import ConfigError

_PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")
# What conf/config.yaml says, so that nothing is written but the run directory and what a sweep keeps in runs/.
_FIXED = {
    "run.dir": ".", "sweep.dir": "runs", "sweep.subdir": ".", "output_subdir": None, "job.chdir": False,
    "callbacks": {}, "job.env_set": {}, "job_logging.handlers": None, "job_logging.formatters": None,
    "hydra_logging.handlers": None, "hydra_logging.formatters": None, "job_logging.root": None,
    "hydra_logging.root": None, "job_logging.loggers": None, "hydra_logging.loggers": None,
    "job_logging.filters": None, "hydra_logging.filters": None,
}  # fmt: skip


def guard() -> None:
    """From now on every configuration that Hydra composes in this process is checked. ``oc.env`` is gone as well: a
    configuration is kept and shown, and must not carry away what the environment holds."""
    OmegaConf.clear_resolver("oc.env")
    load = ConfigLoaderImpl.load_configuration
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_and_check(self: ConfigLoaderImpl, *args: Any, **options: Any) -> Any:
        try:
            composed = load(self, *args, **options)
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # whatever a file or an argument makes YAML's and Hydra's parsers stumble over
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"The configuration cannot be composed: {reason.rstrip('.')}.") from error
        check(OmegaConf.to_container(composed))
        return composed

    ConfigLoaderImpl.load_configuration = load_and_check  # type: ignore[method-assign]
    open_source = ConfigSource.__init__

    def open_trusted(self: ConfigSource, provider: str, path: str) -> None:
        package = path.removeprefix("pkg://").replace("/", ".")
        if path.startswith("pkg://") and package != "hydra.conf" and not package.startswith(_PLUGINS):
            raise ConfigError(f"{path} is refused: a search path cannot name a package, which would be imported.")
        open_source(self, provider, path)

    ConfigSource.__init__ = open_trusted  # type: ignore[method-assign]


def check(composed: Any) -> None:
    """Refuse a composed configuration, with its ``hydra`` node and unresolved, that could start code.

    Raises:
        ConfigError: it names something to instantiate that is no plugin of Hydra's, or a place or a way to work that is
            not the project's.
    """
    for key, target in _targets(composed):
        launcher = key in ("hydra.launcher._target_", "hydra.sweeper._target_")
        if not (launcher and isinstance(target, str) and target.startswith(_PLUGINS)):
            raise ConfigError(f"{key}={target} is refused: a configuration cannot make objects; leave it out.")
    hydra = composed.get("hydra", {})
    if not isinstance(hydra.get("verbose"), bool | str | list):
        raise ConfigError(f"hydra.verbose={hydra.get('verbose')} is not possible: the value must be true or false.")
    for key, fixed in _FIXED.items():
        found: Any = hydra
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found != fixed and not (found is None and not fixed):
            hint = "use run_dir=" if key.endswith("dir") else "leave it out"
            raise ConfigError(f"hydra.{key} cannot be changed: {hint}.")


def _targets(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        path = f"{prefix}{key}"
        if isinstance(key, str) and key in ("_target_", "()"):
            yield path, value
        yield from _targets(value, f"{path}.")
