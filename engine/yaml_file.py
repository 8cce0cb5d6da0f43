"""Reading YAML in C where PyYAML was built with it: ten times as fast, and a results page reads hundreds of files."""

from pathlib import Path
from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """The content of a file.

    Raises:
        OSError: it cannot be read.
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(path.read_text(), Loader=_LOADER)
