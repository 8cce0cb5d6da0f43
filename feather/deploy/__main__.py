"""``python -m feather.deploy`` is ``feather``."""

import sys

from feather.deploy.cli import main

sys.exit(main())
