"""``python -m upcycle`` is ``upcycle``."""

from upcycle.cli.main import main

if __name__ == "__main__":
    main()
