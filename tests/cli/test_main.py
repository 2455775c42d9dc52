"""The console script."""

import subprocess
import sys
from pathlib import Path

KVSERVE = Path(sys.executable).with_name("kvserve")


def test_help_lists_the_commands_of_every_part() -> None:
    """Every part's command is listed by one console script."""
    done = subprocess.run([KVSERVE, "--help"], capture_output=True, text=True, check=True)
    commands = {
        line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines() if line
    }
    assert commands == {
        "bench",
        "calibrate",
        "controller",
        "doctor",
        "explain",
        "operator",
        "profile",
        "strategies",
    }


def test_a_missing_extra_is_named() -> None:
    """A command whose part is not installed says which extra brings it, and nothing else breaks."""
    code = (
        "import sys; sys.modules['kopf'] = None; "
        "sys.argv = ['kvserve', 'operator', '--anything']; from kvserve_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'kvserve[operator]'" in done.stderr


def test_a_command_names_its_own_extra() -> None:
    """Serving pods have the strategies, but not what calibration needs."""
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "sys.argv = ['kvserve', 'calibrate', '--model', 'x']; from kvserve_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'kvserve[calibrate]'" in done.stderr
