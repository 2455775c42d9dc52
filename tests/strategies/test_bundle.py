"""Bundles: what is written is what is read, and what was altered in any way is refused before it is used."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvserve_api.canonical import canonical_json, digest_bytes
from kvserve_api.errors import ArtifactError
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import (
    Basis,
    BasisKey,
    Block,
    Bundle,
    Contents,
    Group,
    Metric,
    Rope,
    write_bundle,
)
from kvserve_strategies.bundle.manifest import MAX_MANIFEST_NBYTES, Manifest

LAYOUT = KVLayout(layers=5, kv_heads=4, head_dim=6, dtype="float16")
ROPE = Rope(np.array([1.0, 0.1, 1 / 3]), attention_factor=1.1, interleaved=True)
JOINT = BasisKey("query", "kv", 2, 0)
PAIRS = BasisKey("centred", "k", 5, 2)
SINGLE = BasisKey("query", "v", 1, 1)
SHAPE = (LAYOUT.layers, LAYOUT.kv_heads, LAYOUT.head_dim)


def basis(key: BasisKey, rng: np.random.Generator) -> Basis:
    """Return a basis that lacks the last component of each group."""
    groups = []
    for block in key.blocks(LAYOUT):
        width = key.width(block, LAYOUT)
        rows = np.linalg.qr(rng.standard_normal((width, width)))[0][:-1]
        sigma = np.sort(rng.uniform(0.1, 3, width - 1))[::-1]
        groups.append(Group(rows.astype(np.float16), sigma.astype(np.float32)))
    weights = rng.standard_normal((len(groups), 7)).astype(np.float32)
    return Basis(
        scale=1 / 3, groups=tuple(groups), importance=() if key == SINGLE else tuple(weights)
    )


def contents(**changes: Any) -> Contents:
    """Return a bundle's contents, always the same ones but for the changes."""
    rng = np.random.default_rng(3)
    roots = {side: rng.uniform(1, 2, SHAPE) for side in "kv"}
    whole = Contents(
        model_fingerprint="sha256:" + "a" * 64,
        layout=LAYOUT,
        ropes=(ROPE, ROPE, None, Rope(np.array([0.5])), ROPE),
        means={side: rng.standard_normal(SHAPE).astype(np.float32) for side in "kv"},
        deviations={side: rng.uniform(0, 1, SHAPE).astype(np.float32) for side in "kv"},
        metrics={
            "query": {
                side: Metric(diagonal(root), diagonal(1 / root)) for side, root in roots.items()
            }
        },
        bases={key: basis(key, rng) for key in (JOINT, PAIRS, SINGLE)},
        provenance={"seed": 3},
    )
    return dataclasses.replace(whole, **changes)


def diagonal(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return diagonal matrices."""
    return (values[..., None] * np.eye(values.shape[-1])).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a bundle."""
    write_bundle(tmp_path / "bundle", contents())
    return tmp_path / "bundle"


def test_what_is_written_is_read(folder: Path) -> None:
    """Every array, rotation and number comes back bit by bit."""
    given_, read = contents(), Bundle.open(folder)
    assert (read.model_fingerprint, read.layout) == (given_.model_fingerprint, LAYOUT)
    assert read.provenance == {"seed": 3}
    assert tuple(read.rope_of(layer) for layer in range(5)) == given_.ropes
    assert read.metrics == ("query",)
    for side in "kv":
        np.testing.assert_array_equal(read.mean(side), given_.means[side])
        np.testing.assert_array_equal(read.deviation(side), given_.deviations[side])
        for mine, theirs in zip(
            read.metric("query", side), given_.metrics["query"][side], strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    assert set(read.basis_keys) == set(given_.bases)
    for key, wanted in given_.bases.items():
        got = read.basis(key)
        assert got.scale == wanted.scale
        for ours, group in zip(got.groups, wanted.groups, strict=True):
            np.testing.assert_array_equal(ours.rows, group.rows)
            np.testing.assert_array_equal(ours.sigma, group.sigma)
            assert (str(ours.rows.dtype), str(ours.sigma.dtype)) == ("float16", "float32")
        assert len(got.importance) == len(wanted.importance)
        for weights, expected in zip(got.importance, wanted.importance, strict=True):
            np.testing.assert_array_equal(weights, expected)


def test_the_digest_is_the_manifests_and_depends_on_the_contents_only(
    folder: Path, tmp_path: Path
) -> None:
    """The same contents give the same digest anywhere; one changed bit gives another."""
    digest = digest_bytes((folder / "manifest.json").read_bytes())
    assert Bundle.open(folder).digest == digest
    assert write_bundle(tmp_path / "again", contents()) == digest
    means = {side: array.copy() for side, array in contents().means.items()}
    means["v"][0, 0, 0] = np.nextafter(means["v"][0, 0, 0], np.float32(9))
    assert write_bundle(tmp_path / "other", contents(means=means)) != digest
    assert write_bundle(tmp_path / "seed", contents(provenance={"seed": 4})) != digest


def test_blocks_tile_the_cache() -> None:
    """Layers outside, heads inside; what does not divide leaves a smaller last block, what is too wide is all."""
    assert BasisKey("query", "kv", 9, 7).blocks(LAYOUT) == (Block(range(5), range(4)),)
    assert JOINT.blocks(LAYOUT) == (
        Block(range(2), range(4)),
        Block(range(2, 4), range(4)),
        Block(range(4, 5), range(4)),
    )
    assert BasisKey("centred", "k", 5, 3).blocks(LAYOUT) == (
        Block(range(5), range(3)),
        Block(range(5), range(3, 4)),
    )
    assert all(key.count(LAYOUT) == len(key.blocks(LAYOUT)) for key in (JOINT, PAIRS, SINGLE))
    assert [JOINT.width(block, LAYOUT) for block in JOINT.blocks(LAYOUT)] == [96, 96, 48]


@pytest.mark.parametrize("text", ["query.kv.10x0", "centred.k.1x12", "my-metric_2.v.3x1"])
def test_keys_have_a_text_form(text: str) -> None:
    """It can be read back."""
    assert str(BasisKey.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "query.kv.0x0",
        "query.kk.1x0",
        "q/../x.k.1x0",
        "Query.k.1x1",
        "query.k.01x1",
        "query.k.1",
    ],
)
def test_other_texts_are_no_keys(text: str) -> None:
    """A key becomes a file name, so nothing else may pass."""
    with pytest.raises(ArtifactError, match=r"looks like query\.kv\.10x0"):
        BasisKey.parse(text)


def test_arrays_can_not_be_written_to(folder: Path) -> None:
    """They are shared by all threads."""
    bundle = Bundle.open(folder)
    for array in (bundle.mean("k"), bundle.basis(JOINT).groups[0].rows, ROPE.inv_freq):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_bases_are_read_when_they_are_asked_for_and_once(folder: Path) -> None:
    """A basis that is not there is no obstacle to the others, and many threads read a file once."""
    read: list[str] = []

    def counting(name: str, limit: int) -> bytes:
        read.append(name)
        return (folder / name).read_bytes()[:limit]

    (folder / f"basis-{PAIRS}.safetensors").unlink()
    bundle = Bundle.read(counting)
    assert read == ["manifest.json", "core.safetensors"]
    threads = [threading.Thread(target=bundle.basis, args=(JOINT,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read[2:] == [f"basis-{JOINT}.safetensors"]
    with pytest.raises(ArtifactError, match=r"basis-centred\.k\.5x2\.safetensors: is not here"):
        Bundle.open(folder).basis(PAIRS)


def test_a_ranks_part_has_its_heads(folder: Path) -> None:
    """Means, metrics and bases of a tensor-parallel rank are the whole's, for its heads."""
    whole = Bundle.open(folder)
    part = whole.of_heads(range(2, 4))
    assert part.layout == dataclasses.replace(LAYOUT, kv_heads=2)
    assert (part.digest, part.heads) == (whole.digest, range(2, 4))
    np.testing.assert_array_equal(part.mean("k"), whole.mean("k")[:, 2:4])
    np.testing.assert_array_equal(part.deviation("v"), whole.deviation("v")[:, 2:4])
    np.testing.assert_array_equal(
        part.metric("query", "v").inverse, whole.metric("query", "v").inverse[:, 2:4]
    )
    assert part.basis(PAIRS).groups == whole.basis(PAIRS).groups[1:]
    assert part.basis(PAIRS).importance[0] is whole.basis(PAIRS).importance[1]
    assert part.basis(SINGLE).groups == tuple(
        whole.basis(SINGLE).groups[4 * layer + head] for layer in range(5) for head in (2, 3)
    )
    assert part.basis(SINGLE).scale == whole.basis(SINGLE).scale
    assert part.of_heads(range(1, 2)).heads == range(3, 4)


def test_a_rank_can_not_use_bases_over_other_heads(folder: Path) -> None:
    """The error names those that it can use."""
    part = Bundle.open(folder).of_heads(range(1, 3))
    assert part.basis_keys == (SINGLE,)
    with pytest.raises(ArtifactError, match=r"heads 1 to 2 .* usable: query\.v\.1x1$"):
        part.basis(JOINT)
    with pytest.raises(ArtifactError, match="must be in 0 to 1"):
        part.of_heads(range(1, 3))


@pytest.mark.parametrize(
    ("ask", "problem"),
    [
        pytest.param(lambda b: b.basis(BasisKey("query", "k", 1, 1)), "it has: centred.k.5x2", id="basis"),
        pytest.param(lambda b: b.metric("fisher", "k"), "it has: query", id="metric"),
        pytest.param(lambda b: b.mean("kv"), "must be k or v", id="kind"),
    ],
)  # fmt: skip
def test_what_is_not_in_a_bundle(
    folder: Path, ask: Callable[[Bundle], object], problem: str
) -> None:
    """The error names what there is."""
    with pytest.raises(ArtifactError, match=problem):
        ask(Bundle.open(folder))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest; it stays canonical."""
    path = folder / "manifest.json"
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(canonical_json(value))


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets a value deep in a manifest."""

    def change(manifest: dict[str, Any]) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(put("schema", value="kvserve.io/bundle/v2"), "calibrate anew", id="schema"),
        pytest.param(put("extra", value=1), "extra: is not known", id="unknown"),
        pytest.param(put("layout", "layers", value=70_000), "layout.layers", id="layout"),
        pytest.param(put("layout", "kv_heads", value=1), "components: must have at most 1 items", id="heads"),
        pytest.param(put("layout", "dtype", value="int8"), "must be one of bfloat16", id="dtype"),
        pytest.param(put("rope_of_layer", value=[0, 0, None, 2, 0]), "index of ropes", id="rope"),
        pytest.param(put("rope_of_layer", value=[0]), "must have 5 items", id="rope-count"),
        pytest.param(put("bases", "query.kv.2x0", "components", value=[97, 95, 47]), "1 to the width 96", id="rows"),
        pytest.param(put("bases", "query.kv.2x0", "components", value=[9, 9]), "must have 3 items", id="groups"),
        pytest.param(put("bases", "query.kv.2x0", "scale", value=-1), "at least 0", id="scale"),
        pytest.param(put("bases", "fisher.k.1x1", value={}), "a metric not here", id="space"),
        pytest.param(put("metrics", value=["../x"]), "names of metrics", id="metric"),
        pytest.param(put("files", "../../x", value={"sha256": "0" * 64, "nbytes": 1}), "is not known", id="path"),
        pytest.param(put("files", "core.safetensors", "nbytes", value=2**40), "take at most", id="absurd"),
        pytest.param(put("files", "core.safetensors", "sha256", value="x"), "64 hex digits", id="sha256"),
        pytest.param(put("model", "fingerprint", value="me"), "64 hex digits", id="fingerprint"),
        pytest.param(lambda m: m["files"].pop("core.safetensors"), "core.safetensors is missing", id="no-core"),
        pytest.param(lambda m: m["ropes"][0].update(inv_freq=[1.0] * 4), "at most 3 items", id="rotary-dim"),
        pytest.param(lambda m: m["ropes"][0].update(inv_freq=[]), "at least one", id="rotary-none"),
        pytest.param(lambda m: m["ropes"][0].update(inv_freq=[10**400]), "frequencies", id="rotary-huge"),
        pytest.param(put("bases", "query.kv.2x0", "scale", value=1), "is not what this version writes", id="integer"),
        pytest.param(lambda m: m["ropes"][0].update(attention_factor=0), "finite and positive", id="factor"),
    ],
)  # fmt: skip
def test_wrong_manifests_are_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    """Before any other file is opened."""
    rewritten(folder, change)
    (folder / "core.safetensors").unlink()
    with pytest.raises(ArtifactError, match=problem):
        Bundle.open(folder)


def test_a_manifest_can_not_ask_for_more_memory_than_it_has_bytes(folder: Path) -> None:
    """Blocks of a basis are counted, not made, before their number is believed."""

    def enormous(manifest: dict[str, Any]) -> None:
        manifest["layout"] |= {"layers": 65_535, "kv_heads": 65_535}
        manifest["rope_of_layer"] = [None] * 65_535

    rewritten(folder, enormous)
    with pytest.raises(ArtifactError, match="components: must have 429490176 items, has 2"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        pytest.param(b"", "is not JSON", id="empty"),
        pytest.param(b"[" * 100_000, "is not JSON", id="deep"),
        pytest.param(b'{"a": 1}', "not canonical", id="spaces"),
        pytest.param(b'{"a":NaN}', "no canonical form", id="nan"),
        pytest.param(b'{"a":"\\ud800"}', "is not JSON", id="surrogate"),
        pytest.param(b"[]", "must be an object", id="list"),
        pytest.param(b" " * (MAX_MANIFEST_NBYTES + 1), "has more than", id="large"),
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, document: bytes, problem: str) -> None:
    """Whatever the bytes are."""
    (folder / "manifest.json").write_bytes(document)
    with pytest.raises(ArtifactError, match=problem):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["core.safetensors", f"basis-{JOINT}.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "longer", "flipped"])
def test_damaged_files_are_refused(folder: Path, name: str, damage: str) -> None:
    """The error says to fetch the bundle anew."""
    data = bytearray((folder / name).read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    changed = {"cut": data[:-1], "longer": data + b"\0", "flipped": data}[damage]
    (folder / name).write_bytes(changed)
    with pytest.raises(ArtifactError, match=f"{name}: .* fetch the bundle anew"):
        Bundle.open(folder).basis(JOINT)


def replaced(folder: Path, name: str, tensors: dict[str, Any]) -> None:
    """Put other tensors into a bundle, listed in its manifest as they are."""
    data = safetensors.numpy.save(tensors)
    (folder / name).write_bytes(data)
    entry = {"sha256": digest_bytes(data)[7:], "nbytes": len(data)}
    rewritten(folder, put("files", name, value=entry))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param({"sigma.0": None}, "sigma.0 is missing", id="missing"),
        pytest.param({"more": np.zeros(1, np.float32)}, "more is not known", id="extra"),
        pytest.param({"sigma.0": np.ones(95, np.float64)}, "dtype F64", id="float64"),
        pytest.param({"sigma.0": np.ones(95, np.float16)}, r"must be float32 \[95\]", id="float16"),
        pytest.param({"sigma.0": np.ones((5, 19), np.float32)}, r"is float32 \[5, 19\]", id="shape"),
        pytest.param({"sigma.0": np.full(95, np.nan, np.float32)}, "NaN or infinity", id="nan"),
        pytest.param({"rows.0": np.full((95, 96), np.inf, np.float16)}, "NaN or infinity", id="inf"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_refused(
    folder: Path, change: dict[str, np.ndarray[Any, Any] | None], problem: str
) -> None:
    """Though the manifest lists the file."""
    name = f"basis-{JOINT}.safetensors"
    tensors = safetensors.numpy.load((folder / name).read_bytes()) | change
    replaced(folder, name, {key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(ArtifactError, match=problem):
        Bundle.open(folder).basis(JOINT)


def test_what_is_no_safetensors_is_refused(folder: Path) -> None:
    """A header that promises more than there is, a pickle, anything."""
    for data in (
        b"\x80\x04\x95pickle",
        (2**63).to_bytes(8, "little"),
        b"",
        b'\x02\0\0\0\0\0\0\0{"',
    ):
        (folder / "core.safetensors").write_bytes(data)
        entry = {"sha256": digest_bytes(data)[7:], "nbytes": max(1, len(data))}
        rewritten(folder, put("files", "core.safetensors", value=entry))
        with pytest.raises(
            ArtifactError, match=r"core\.safetensors: (is not safetensors|must have)"
        ):
            Bundle.open(folder)


def test_another_bundle_than_the_one_asked_for_is_refused(folder: Path) -> None:
    """A digest pins the bundle."""
    with pytest.raises(ArtifactError, match="was asked for, this is"):
        Bundle.open(folder, digest="sha256:" + "0" * 64)


@given(
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_manifest_makes_the_reader_fail_otherwise(
    cut: int, flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes cut and flipped give an ArtifactError, or a manifest that says the same of itself."""
    document = bytearray(DOCUMENT[: len(DOCUMENT) - cut])
    for at, mask in flips:
        document[at % len(document)] ^= mask
    try:
        manifest = Manifest.parse(bytes(document))
    except ArtifactError:
        return
    assert manifest.canonical() == bytes(document)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(where=st.integers(0, 10**6), value=json_values)
@settings(max_examples=300, deadline=None)
def test_no_value_anywhere_makes_the_reader_fail_otherwise(where: int, value: Any) -> None:
    """Any JSON in the place of any value of a manifest gives an ArtifactError or a manifest."""
    manifest = json.loads(DOCUMENT)
    places = list(_places(manifest))
    holder, key = places[where % len(places)]
    holder[key] = value
    document = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    try:
        read = Manifest.parse(document)
    except ArtifactError:
        return
    assert read.canonical() == document


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _document() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder) / "bundle", contents())
        return (Path(folder) / "bundle" / "manifest.json").read_bytes()


DOCUMENT = _document()


def lopsided() -> dict[BasisKey, Basis]:
    """Return a basis whose rows are not of length 1."""
    wrong = basis(SINGLE, np.random.default_rng(0))
    first = wrong.groups[0]
    groups = (Group(first.rows * np.float16(2), first.sigma), *wrong.groups[1:])
    return {SINGLE: dataclasses.replace(wrong, groups=groups)}


def shuffled() -> dict[BasisKey, Basis]:
    """Return a basis whose deviations rise."""
    wrong = basis(SINGLE, np.random.default_rng(0))
    first = wrong.groups[0]
    groups = (Group(first.rows, first.sigma[::-1].copy()), *wrong.groups[1:])
    return {SINGLE: dataclasses.replace(wrong, groups=groups)}


def uneven() -> dict[BasisKey, Basis]:
    """Return a basis only one of whose groups has weights of importance."""
    wrong = basis(SINGLE, np.random.default_rng(0))
    return {SINGLE: dataclasses.replace(wrong, importance=(np.ones(3, np.float32),))}


def short() -> dict[BasisKey, Basis]:
    """Return a basis that lacks a group."""
    wrong = basis(SINGLE, np.random.default_rng(0))
    return {SINGLE: dataclasses.replace(wrong, groups=wrong.groups[1:])}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        pytest.param({"ropes": (None,)}, "must be 5, one a layer", id="ropes"),
        pytest.param({"bases": lopsided()}, "not of length 1", id="rows"),
        pytest.param({"bases": shuffled()}, "must fall", id="sigma"),
        pytest.param({"bases": short()}, "must have 20 groups, has 19", id="groups"),
        pytest.param({"bases": uneven()}, "importance.1 is missing", id="importance"),
        pytest.param({"metrics": {}}, "a metric not here", id="space"),
        pytest.param({"means": {s: np.zeros(SHAPE) for s in "kv"}}, "must be float32", id="dtype"),
        pytest.param({"means": {s: np.full(SHAPE, np.nan, np.float32) for s in "kv"}}, "NaN", id="nan"),
        pytest.param({"model_fingerprint": "x"}, "64 hex digits", id="fingerprint"),
        pytest.param({"metrics": {"centred": {}}}, "no metric may be named", id="metric"),
        pytest.param(
            {"metrics": {"query": {s: Metric(diagonal(np.ones(SHAPE)), diagonal(np.full(SHAPE, 2))) for s in "kv"}}},
            "the inverse is not", id="inverse",
        ),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    """Nothing is left behind."""
    with pytest.raises(ArtifactError, match=problem):
        write_bundle(tmp_path / "bundle", contents(**changes))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    """An empty one is used, one that holds anything is not."""
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty", contents())
    with pytest.raises(ArtifactError, match="not an empty folder: give a new one"):
        write_bundle(tmp_path / "empty", contents())


def test_bundles_of_version_1_can_be_read_for_ever() -> None:
    """A bundle that was written when the format was made: bundles outlive versions of this software."""
    folder = Path(__file__).parent / "bundle-v1"
    bundle = Bundle.open(
        folder, digest="sha256:0754d64947e4a7cc7cbf31276f153f6d96b5b80bb9e27064eafdbf525484e47a"
    )
    assert bundle.layout == KVLayout(layers=2, kv_heads=1, head_dim=4, dtype="bfloat16")
    assert (bundle.rope_of(0), bundle.rope_of(1)) == (Rope(np.array([1.0, 0.1])), None)
    ramp = np.arange(8, dtype=np.float32).reshape(2, 1, 4) / 8
    np.testing.assert_array_equal(bundle.mean("k"), ramp)
    np.testing.assert_array_equal(bundle.mean("v"), -ramp)
    np.testing.assert_array_equal(bundle.deviation("k"), ramp + 1)
    root, inverse = np.diag([1, 2, 4, 8]), np.diag([1, 0.5, 0.25, 0.125])
    for layer in range(2):
        np.testing.assert_array_equal(bundle.metric("query", "k").matrix[layer, 0], root)
        np.testing.assert_array_equal(bundle.metric("query", "v").matrix[layer, 0], inverse)
    basis = bundle.basis(BasisKey("query", "kv", 2, 0))
    assert basis.scale == 0.1
    np.testing.assert_array_equal(basis.groups[0].rows, np.eye(16)[:12:-1])
    np.testing.assert_array_equal(basis.groups[0].sigma, [3, 2, 0.5])
    np.testing.assert_array_equal(basis.importance[0], [1.5, -2])
