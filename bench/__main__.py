"""`python -m bench`."""

from .training import main

raise SystemExit(main())
