"""Whether W&B would find a login without asking."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

_FORMER_HOST = "api.wandb.ai"


def logged_in() -> bool:
    """Whether there is a login for the server that W&B would use. Only that one is there is looked at."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    chosen = os.environ.get("WANDB_BASE_URL")
    try:
        hosts = [chosen] if chosen else [_default_url(), f"https://{_FORMER_HOST}"]  # W&B still takes older logins
    except ImportError:
        return False
    named = os.environ.get("NETRC")
    for path in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError):
            continue
        if any(entries.authenticators(urlsplit(host).netloc) for host in hosts):
            return True
    return False


def _default_url() -> str:
    """The server of the installed version; it has changed between versions."""
    import wandb

    return wandb.Settings().base_url
