"""What pip asks to build this project with (pyproject.toml): it says where to go instead, and builds nothing."""

raise SystemExit("quzo is not installed but used in place: clone it, and run there or with PYTHONPATH=/path/to/clone")
