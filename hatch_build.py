"""Build hook: compiles the native kernels into the wheel, or beside their sources for an editable install.

Without a compiler the wheel is pure and numba does the work.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_NATIVE = "kernels/kvserve_kernels/native"


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library to a wheel and gives that the tag of its platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library, and name it in the wheel."""
        builder = _load_builder(Path(self.root) / _NATIVE / "build.py")
        try:
            library = builder.build()
        except builder.BuildError as error:
            print(f"kvserve: no native kernels, numba does their work: {error}", file=sys.stderr)
            return
        if version == "editable":
            return
        build_data["force_include"][str(library)] = f"kvserve_kernels/native/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{builder.platform_tag()}"


def _load_builder(path: Path) -> ModuleType:
    """Import the builder by its path: the package itself is not installed yet."""
    spec = importlib.util.spec_from_file_location("kvserve_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
