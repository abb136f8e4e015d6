"""`python -m fastiat` is the `fastiat` command."""

from fastiat.cli import main

raise SystemExit(main())
