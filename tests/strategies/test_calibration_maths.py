"""The mathematics of calibration agree with what they are defined by."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvserve_api.errors import SpecError
from kvserve_api.wire import KVLayout
from kvserve_strategies.bundle import BasisKey, Block, Contents, Rope
from kvserve_strategies.calibration import bases, importance, metrics, statistics
from kvserve_strategies.calibration.fisher import Information, gradients, token_costs
from kvserve_strategies.calibration.models import TransformersModel
from kvserve_strategies.calibration.protocol import Prefill
from kvserve_strategies.calibration.recipe import calibrate
from kvserve_strategies.calibration.ropes import turn
from kvserve_strategies.calibration.settings import DEFAULT_KEYS, Settings
from tiny_models import config, save_model

LAYERS, HEADS, DIM = 3, 2, 6
LAYOUT = KVLayout(layers=LAYERS, kv_heads=HEADS, head_dim=DIM, dtype="float32")
FREQUENCIES = np.array([1.0, 0.3])
ROPES = (
    Rope(FREQUENCIES, 1.0, False),
    None,
    Rope(FREQUENCIES, 1.0, True),
)


@pytest.fixture
def random() -> torch.Generator:
    """Return a seeded generator, also of numbers that must not be special."""
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    """Return a small model."""
    return TransformersModel(save_model(tmp_path_factory.mktemp("model"), config("LlamaConfig")))


def positive(random: torch.Generator, *shape: int, dim: int) -> torch.Tensor:
    """Return random positive definite matrices."""
    root = torch.randn(*shape, dim, dim + 3, generator=random)
    return root @ root.mT


def test_unrotated_undoes_the_rotation(random: torch.Generator) -> None:
    """Keys that are rotated and then un-rotated are as they were, in layers with and without rotation."""
    plain = torch.randn(LAYERS, 50, HEADS, DIM, generator=random)
    rotated = torch.stack(
        [
            turn(keys, rope, range(50), back=False) if rope else keys
            for keys, rope in zip(plain, ROPES, strict=True)
        ]
    )
    assert not torch.allclose(rotated[0], plain[0], atol=0.1)
    torch.testing.assert_close(statistics.unrotated(rotated, ROPES), plain, atol=1e-5, rtol=0)


def test_columns_run_by_kind_layer_head_and_dimension() -> None:
    """The channels of a block stand in the order that bundles promise."""
    shape = (2, LAYERS, 1, HEADS, DIM)
    index = torch.arange(2 * LAYERS * HEADS * DIM).reshape(shape)
    got = statistics.columns(index, "kv", Block(range(1, 3), range(1, 2)))
    expected = [index[s, la, 0, 1, d].item() for s in (0, 1) for la in (1, 2) for d in range(DIM)]
    assert got.tolist() == [expected]
    assert statistics.columns(index, "v", Block(range(3), range(2))).tolist() == [
        index[1].flatten().tolist()
    ]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(BasisKey("fisher", "kv", 2, 0), id="two-layers"),
        pytest.param(BasisKey("fisher", "kv", 1, 1), id="each-head"),
        pytest.param(BasisKey("centred", "v", 9, 0), id="values-of-all"),
    ],
)
def test_moments_are_those_of_all_windows_together(key: BasisKey, random: torch.Generator) -> None:
    """Means, deviations and covariances summed over windows equal numpy's over all tokens, far from zero too."""
    mix = torch.randn(2 * LAYERS * HEADS * DIM, 2 * LAYERS * HEADS * DIM, generator=random)
    windows = [
        (torch.randn(tokens, len(mix), generator=random) @ mix + 300)
        .reshape(tokens, 2, LAYERS, HEADS, DIM)
        .permute(1, 2, 0, 3, 4)
        for tokens in (40, 90, 17)
    ]
    moments = statistics.Moments(LAYOUT, [key])
    for window in windows:
        moments.add(window)
    whole = torch.cat(windows, dim=2).double()
    torch.testing.assert_close(moments.means.double(), whole.mean(dim=2), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        moments.deviations.double(), whole.std(dim=2, correction=0), atol=0, rtol=1e-4
    )
    covariances = list(moments.covariances(key))
    assert len(covariances) == len(key.blocks(LAYOUT))
    for block, covariance in zip(key.blocks(LAYOUT), covariances, strict=True):
        flat = statistics.columns(whole, key.kinds, block).numpy()
        expected = np.cov(flat.T, bias=True)
        np.testing.assert_allclose(covariance, expected, atol=1e-4 * np.abs(expected).max())


def test_roots_square_to_the_metric(random: torch.Generator) -> None:
    """The root of a metric is symmetric, squares to it, and its inverse undoes it."""
    metric = positive(random, 2, HEADS, dim=DIM)
    root, inverse = metrics.roots(metric)
    torch.testing.assert_close(root @ root, metric, atol=0, rtol=1e-3)
    torch.testing.assert_close(root, root.mT, atol=1e-5, rtol=0)
    eye = torch.eye(DIM).expand_as(root)
    torch.testing.assert_close(root @ inverse, eye, atol=1e-4, rtol=0)


def test_roots_of_a_head_that_nothing_reads_are_usable(random: torch.Generator) -> None:
    """A metric of zeros, or without some directions, still has a finite root with an inverse."""
    metric = torch.zeros(2, DIM, DIM)
    metric[1, 0, 0] = 3
    root, inverse = metrics.roots(metric)
    eye = torch.eye(DIM).expand_as(root)
    torch.testing.assert_close(root @ inverse, eye, atol=1e-4, rtol=0)
    assert float(root[0].norm()) < 1e-4 * float(root[1].norm())


def test_shrinkage_keeps_the_trace(random: torch.Generator) -> None:
    """A metric that is shrunk whole is the multiple of the identity of equal trace."""
    metric = positive(random, dim=DIM)
    trace = metric.trace()
    torch.testing.assert_close(metrics.shrunk(metric, 0.3).trace(), trace)
    torch.testing.assert_close(metrics.shrunk(metric, 1.0), torch.eye(DIM) * trace / DIM)


@pytest.mark.parametrize("rope", [pytest.param(ROPES[i], id=f"rope-{i}") for i in range(3)])
def test_the_query_metric_is_the_mean_square_of_changed_logits(
    rope: Rope | None, random: torch.Generator
) -> None:
    """An error of a key changes the logits of rotated queries, over all distances, as the metric says."""
    queries = torch.randn(11, 2 * HEADS, DIM, generator=random)
    error = torch.randn(HEADS, DIM, generator=random)
    metric = metrics.query_metric(metrics.query_moments(queries, HEADS), rope, span=4)
    changes = []
    for distance in (1, 2, 3):
        for query in queries:
            heads = query.reshape(HEADS, 2, DIM).transpose(0, 1)
            for group in heads:
                # the query stands at 5 + distance, the key at 5
                if rope is not None:
                    group = turn(group[None], rope, [5 + distance], back=False)[0]
                    key = turn(error[None], rope, [5], back=False)[0]
                else:
                    key = error
                changes.append((group * key).sum(dim=1).square())
    expected = torch.stack(changes).mean(dim=0)
    got = torch.einsum("hi,hij,hj->h", error, metric, error)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_sensitivities_are_the_factors_between_metrics(random: torch.Generator) -> None:
    """A layer whose cost is a multiple of the metric has that multiple as its sensitivity."""
    metric = positive(random, LAYERS, HEADS, dim=DIM)
    factors = torch.tensor([0.1, 1.0, 20.0])
    got = metrics.sensitivities(metric * factors[:, None, None, None], metric)
    torch.testing.assert_close(got, factors, rtol=1e-3, atol=0)


def test_scaled_covariance_is_that_of_scaled_channels(random: torch.Generator) -> None:
    """Multiplying each head by a matrix changes a block's covariance as if by one large block-diagonal matrix."""
    root = torch.randn(2, LAYERS, HEADS, DIM, DIM, generator=random)
    block = Block(range(1, 3), range(1, 2))
    covariance = positive(random, dim=2 * 2 * DIM)
    matrices = [root[side, layer, 1] for side in (0, 1) for layer in (1, 2)]
    wide: torch.Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    got = bases.scaled(covariance, root, "kv", block)
    torch.testing.assert_close(got, wide @ covariance @ wide.T, rtol=1e-4, atol=1e-3)


def test_components_are_orthonormal_and_fall(random: torch.Generator) -> None:
    """Components are orthonormal, their deviations fall, and together they are the covariance."""
    covariance = positive(random, dim=12)
    rows, sigma = bases.components(covariance)
    torch.testing.assert_close(rows @ rows.T, torch.eye(12), atol=1e-5, rtol=0)
    assert (sigma[1:] <= sigma[:-1]).all()
    torch.testing.assert_close((rows.T * sigma.square()) @ rows, covariance, rtol=1e-4, atol=1e-4)
    group = bases.pruned(rows, sigma, float(sigma[4]))
    assert group.rows.shape == (4, 12)
    np.testing.assert_allclose(group.rows, rows[:4], atol=1e-3)
    np.testing.assert_array_equal(group.sigma, sigma[:4])
    assert len(bases.pruned(rows, sigma, np.inf).sigma) == 1


def test_gradients_give_the_curvature_of_the_divergence(
    model: TransformersModel, random: torch.Generator
) -> None:
    """The mean square of the gradients along an error is twice its measured divergence, per predicted token."""
    tokens = torch.randint(256, (12,), generator=random).tolist()
    prefix, continuation = tokens[:9], tokens[9:]
    prefill = model.prefill(prefix)
    keys, values = prefill.keys.float(), prefill.values.float()
    error = [0.02 * torch.randn(keys.shape, generator=random) for _ in range(2)]

    exact = torch.log_softmax(model.logits(continuation, keys, values).double(), -1)
    off = torch.log_softmax(
        model.logits(continuation, keys + error[0], values + error[1]).double(), -1
    )
    divergence = (exact.exp() * (exact - off)).sum(-1).mean()

    squares = [
        float((by_key * error[0]).sum() + (by_value * error[1]).sum()) ** 2
        for by_key, by_value in gradients(
            model, prefill, continuation, samples=600, generator=random
        )
    ]
    # 600 samples of a square with one degree of freedom: 6 %
    assert np.mean(squares) == pytest.approx(2 * float(divergence), rel=0.25)


def test_gradients_reach_only_the_cache(model: TransformersModel) -> None:
    """Samples differ, and neither the cache nor the model keeps anything of them."""
    prefill = model.prefill([1, 2, 3, 4])
    keys = prefill.keys.clone()
    first, second = gradients(
        model, prefill, [5, 6], samples=2, generator=torch.Generator().manual_seed(0)
    )
    assert not torch.equal(first[0], second[0])
    assert torch.equal(prefill.keys, keys)
    assert not prefill.keys.requires_grad


def test_costs_are_one_in_the_mean_where_the_metric_was_measured(random: torch.Generator) -> None:
    """Whitened by the root of their own mean outer product, gradients have cost 1 a token in the mean."""
    strength = torch.rand(1, 1, 200, 1, 1, generator=random) * 5
    gradient = strength * torch.randn(2, LAYERS, 200, HEADS, DIM, generator=random)
    information = Information(LAYERS, HEADS, DIM)
    information.add(gradient[:, :, :80])
    information.add(gradient[:, :, 80:])
    _, inverse = metrics.roots(information.mean)
    costs = token_costs(gradient, inverse)
    torch.testing.assert_close(costs.mean(dim=2), torch.ones(2, LAYERS, HEADS), rtol=1e-3, atol=0)
    # and a token whose gradients are twice as long costs four times as much
    torch.testing.assert_close(token_costs(2 * gradient, inverse), 4 * costs)


def test_features_are_clipped_scores_ages_and_one() -> None:
    """The features are what the bundle's weights are documented to stand for."""
    scores = torch.zeros(2, importance.COMPONENTS)
    scores[0, 0], scores[1, 1] = 9.0, -0.5
    got = importance.features(scores, torch.tensor([1, 5]))
    assert got.shape == (2, importance.COMPONENTS + importance.AGE_FEATURES + 1)
    assert got[0, 0] == 4
    assert got[1, 1] == -0.5
    log = np.log(5) / 7
    expected = [[0, 0, 1, 1, 1], [log, log**2, np.exp(-1), np.exp(-4 / 32), 1]]
    np.testing.assert_allclose(got[:, -5:], expected, rtol=1e-5)


def test_the_fit_finds_the_weights_of_noisy_costs(random: torch.Generator) -> None:
    """Costs that are exponentially distributed about a known prediction give its weights back."""
    true = torch.tensor([0.7, -1.1, 0.0, 0.4])
    x = torch.cat([torch.randn(20_000, 3, generator=random), torch.ones(20_000, 1)], dim=1)
    noise = -torch.rand(20_000, generator=random).clamp(min=1e-9).log()
    weights = torch.rand(20_000, generator=random) + 0.1
    got = importance.fitted(x, torch.exp(x @ true) * noise, weights)
    torch.testing.assert_close(got, true, atol=0.05, rtol=0)


def test_the_fit_stands_features_that_are_always_zero() -> None:
    """Features that never occur get no weight, and costs of zero are no error."""
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    got = importance.fitted(x, torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(got, torch.tensor([0.0, np.log(2.0)], dtype=torch.float32))


def small(**changes: object) -> Settings:
    """Return settings for windows of 40 tokens."""
    keys = (
        BasisKey("fisher", "kv", 2, 0),
        BasisKey("query", "k", 1, 1),
        BasisKey("centred", "v", 3, 0),
    )
    chosen: dict[str, object] = {
        "keys": keys,
        "prefix_tokens": 32,
        "continuation_tokens": 8,
        "kept": 20,
        "recent": 5,
    }
    return Settings(**(chosen | changes))  # type: ignore[arg-type]


def windows(random: torch.Generator, count: int) -> list[list[int]]:
    """Return windows of 40 tokens."""
    return torch.randint(3, 256, (count, 40), generator=random).tolist()


def test_calibration_holds_what_was_asked_for(
    model: TransformersModel, random: torch.Generator
) -> None:
    """A calibrated model has consistent contents: means of its cache, both metrics, and the bases of all keys."""
    texts = windows(random, 4)
    contents = calibrate(model, texts, small())
    contents.check()
    prefills: list[Prefill] = [model.prefill(text[:32]) for text in texts]
    values = torch.cat([prefill.values.float()[:, 4:] for prefill in prefills], dim=1)
    np.testing.assert_allclose(contents.means["v"], values.mean(dim=1), atol=1e-5)
    assert set(contents.metrics) == {"query", "fisher"}
    assert set(contents.bases) == set(small().keys)
    fisher = contents.bases[BasisKey("fisher", "kv", 2, 0)]
    features = importance.COMPONENTS + importance.AGE_FEATURES + 1
    assert [weights.shape for weights in fisher.importance] == [(features,)] * 2
    # there are 28 tokens a window, and a group of 64 components: no weight beyond them
    assert not fisher.importance[0][len(fisher.groups[0].sigma) : importance.COMPONENTS].any()
    assert contents.bases[BasisKey("query", "k", 1, 1)].importance == ()
    assert len(contents.bases[BasisKey("query", "k", 1, 1)].groups) == model.layers * 2


def scores_of(
    model: TransformersModel, texts: list[list[int]], contents: Contents, key: BasisKey
) -> list[torch.Tensor]:
    """Return for each group the components of texts ``[tokens, components]``."""
    basis = contents.bases[key]
    ropes = tuple(model.rope_of(layer) for layer in range(model.layers))
    x = torch.cat(
        [
            statistics.pair(prefill.keys, prefill.values, ropes, 4)
            for prefill in (model.prefill(text[:32]) for text in texts)
        ],
        dim=2,
    )
    means = torch.stack([torch.from_numpy(contents.means[side]) for side in "kv"])
    root = torch.stack([torch.from_numpy(contents.metrics["fisher"][s].matrix) for s in "kv"])
    y = torch.einsum("slhcd,slthd->slthc", root, x - means[:, :, None])
    return [
        statistics.columns(y, "kv", block) @ torch.from_numpy(group.rows.astype(np.float32)).T
        for block, group in zip(key.blocks(model.layout), basis.groups, strict=True)
    ]


def test_bases_are_in_the_coordinates_of_their_metric(
    model: TransformersModel, random: torch.Generator
) -> None:
    """The deviations of a basis of one layer are those of the texts in its space, their scale is the mean square."""
    texts = windows(random, 4)
    key = BasisKey("fisher", "kv", 1, 0)
    contents = calibrate(model, texts, small(keys=(key,)))
    scores = scores_of(model, texts, contents, key)
    channels = sum(group.rows.shape[1] for group in contents.bases[key].groups)
    energy = torch.cat(scores, dim=1).square().mean(dim=0).sum() / channels
    assert contents.bases[key].scale == pytest.approx(float(energy.sqrt()), rel=1e-3)
    for group, found in zip(contents.bases[key].groups, scores, strict=True):
        np.testing.assert_allclose(found.square().mean(dim=0).sqrt(), group.sigma, rtol=0.01)


def test_deviations_are_those_of_other_texts(
    model: TransformersModel, random: torch.Generator
) -> None:
    """With enough windows every sixth is left out of the covariance, and the deviations are measured there."""
    texts = windows(random, 12)
    key = BasisKey("fisher", "kv", 2, 0)
    contents = calibrate(model, texts, small(keys=(key,), kept=28, recent=28))
    scores = scores_of(model, [texts[5], texts[11]], contents, key)
    for group, found in zip(contents.bases[key].groups, scores, strict=True):
        np.testing.assert_allclose(found.square().mean(dim=0).sqrt(), group.sigma, rtol=0.01)
        assert (np.diff(group.sigma) <= 0).all()


def test_what_joins_layers_is_shrunk() -> None:
    """Within layers a covariance stays as it is; between them it loses half its share of chance."""
    layout = KVLayout(layers=2, kv_heads=1, head_dim=2, dtype="float32")
    key = BasisKey("fisher", "kv", 2, 0)
    (block,) = key.blocks(layout)
    covariance = torch.arange(64.0).reshape(8, 8)
    shrunk = bases.shrunk_to_layers(covariance, key, block, tokens=24)
    # channels: keys of layer 0 and 1, values of layer 0 and 1, two each
    assert torch.equal(shrunk[:2, :2], covariance[:2, :2])
    assert torch.equal(shrunk[:2, 4:6], covariance[:2, 4:6])
    torch.testing.assert_close(shrunk[:2, 2:4], covariance[:2, 2:4] * (1 - 0.5 * 8 / 32))
    torch.testing.assert_close(shrunk[6:, :2], covariance[6:, :2] * (1 - 0.5 * 8 / 32))


def test_calibration_is_repeatable(model: TransformersModel, random: torch.Generator) -> None:
    """The same windows and seed give the same contents; another seed draws other continuations."""
    texts = windows(random, 2)
    first, second = (calibrate(model, texts, small()) for _ in range(2))
    other = calibrate(model, texts, small(seed=1))
    matrices = [contents.metrics["fisher"]["k"].matrix for contents in (first, second, other)]
    np.testing.assert_array_equal(matrices[0], matrices[1])
    assert not np.array_equal(matrices[0], matrices[2])


def test_settings_fit_models_with_few_positions() -> None:
    """Windows are no longer than a model can read, and are shared out alike."""
    settings = Settings.fitting(512, keys=DEFAULT_KEYS)
    assert settings.window_tokens == 512
    assert settings.continuation_tokens == 102
    assert Settings.fitting(None, keys=()).window_tokens == 1280
    assert Settings.fitting(10**6, keys=()).window_tokens == 1280


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"samples": 0}, "samples: must be at least 1", id="samples"),
        pytest.param({"prefix_tokens": 5}, "must be more than 5", id="prefix"),
        pytest.param({"keys": (BasisKey("other", "k", 1, 0),)}, "'other'", id="space"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    """Settings that can't be followed are refused, and the error names them."""
    with pytest.raises(SpecError, match=message):
        small(**changes)


def test_calibration_needs_text(model: TransformersModel, tmp_path: Path) -> None:
    """No windows are an error, not an empty bundle."""
    with pytest.raises(SpecError, match="windows: must be at least one"):
        calibrate(model, [], small())
