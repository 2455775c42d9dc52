"""``python -m kvserve_operator``: the entry point of the operator's container."""

from kvserve_operator.cli import main

if __name__ == "__main__":
    main()
