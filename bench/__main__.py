"""`python -m bench`."""

from .command import main

raise SystemExit(main())
