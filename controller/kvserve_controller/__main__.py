"""``python -m kvserve_controller``."""

from kvserve_controller.cli import controller

if __name__ == "__main__":
    controller()
