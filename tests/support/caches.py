"""Cache folders of tests: their own, but for what every process would compile anew."""

from pathlib import Path

from testcluster.paths import cache_dir


def own_cache(folder: Path) -> str:
    """Make a cache folder without bundles and models; compiled kernels, a minute of work, are those of all tests.

    Call it before `KVSERVE_CACHE_DIR` is set to its result.
    """
    compiled = cache_dir().parent / "numba"
    compiled.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "numba").symlink_to(compiled)
    return str(folder)
