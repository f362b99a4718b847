"""``python -m effkern.cli``, for where the ``effkern`` script is not on the path."""

import sys

from effkern.cli import main

sys.exit(main())
