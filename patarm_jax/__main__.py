"""`python -m patarm_jax` is `patarm`."""

import sys

from patarm_jax.cli import main

sys.exit(main())
