"""A transformers model as calibration sees it: any architecture whose cache is plain keys and values.

Nothing here knows an architecture. Queries are taken where transformers hands them to the attention function, and are
rotated back by the rotation that `ropes` found in the keys. It computes in float32 whatever the cache is served in.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvserve_api.errors import SpecError, UnsupportedError
from kvserve_api.wire import FLOAT_DTYPES, KVLayout, model_fingerprint
from kvserve_strategies.bundle.rope import Rope
from kvserve_strategies.calibration.protocol import Prefill
from kvserve_strategies.calibration.ropes import POSITIONS, described, explain, turn

Recorded = dict[int, torch.Tensor]
_RECORDED: ContextVar[Recorded | None] = ContextVar("kvserve_queries", default=None)
_BASES: Final = ("sdpa", "eager")


class TransformersModel:
    """A loaded model; see `protocol.CalibrationModel`.

    Attributes:
        config: Its configuration, of transformers.
        layout: The form of its KV cache.
        fingerprint: See `kvserve_api.wire.model_fingerprint`.
        notes: What is not as usual, for people.
        lead: Tokens that begin any text.
    """

    def __init__(self, folder: Path) -> None:
        """Load weights and tokenizer: no code from the folder, and no pickled weights, ever.

        Raises:
            SpecError: They are missing or broken.
            UnsupportedError: The model's cache is not plain keys and values.
        """
        config = read_config(folder)
        check_cache(config)
        self._dtype = _native_dtype(config)
        transformers.utils.logging.disable_progress_bar()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise SpecError("--model", f"can't load {folder}: {_first_line(error)}") from error
        self._model.requires_grad_(False)
        self.fingerprint = model_fingerprint(config.to_dict())
        self.config = config
        self.lead = _lead(self._tokenizer)
        _record_queries(self._model)
        with torch.no_grad():
            keys, values = self._cache([0, 0], {})
        self.layout = _layout(keys, values, self._dtype)
        self._ropes, self.notes = self._find_ropes()
        # what has no queries must fail before an hour of statistics
        self.prefill([0, 0])

    @property
    def layers(self) -> int:
        """Layers with a KV cache."""
        return self.layout.layers

    @property
    def kv_heads(self) -> int:
        """Key heads of a layer."""
        return self.layout.kv_heads

    @property
    def head_dim(self) -> int:
        """Dimensions of a key head."""
        return self.layout.head_dim

    def rope_of(self, layer: int) -> Rope | None:
        """Return how the layer's keys rotate; None if they do not, or not in the same way for all requests."""
        return self._ropes[layer]

    def tokenise(self, text: str) -> list[int]:
        """Return the text's token ids, without those that begin any text."""
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> Prefill:
        """Return KV cache and queries of a text, without gradients.

        Raises:
            UnsupportedError: The model hands its queries to no attention function that can be watched.
        """
        queries: Recorded = {}
        keys, values = self._cache(tokens, queries)
        if sorted(queries) != list(range(self.layers)):
            raise UnsupportedError(
                f"{type(self._model).__name__} does not call transformers' attention interface in "
                f"every layer, so its queries can't be read: {len(queries)} of {self.layers}"
            )
        return Prefill(
            keys=keys.to(self._dtype),
            values=values.to(self._dtype),
            queries=[self._unrotated(queries[layer], layer) for layer in range(self.layers)],
        )

    def logits(
        self, tokens: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Return the predictions after each token, given the cache of all tokens before them.

        Gradients flow to ``keys`` and ``values`` if these require them.

        Args:
            tokens: The tokens to read, at the positions that follow the cache's.
            keys: ``[layers, past, kv_heads, head_dim]`` float32, rotated.
            values: The same shape.

        Returns:
            ``[len(tokens), vocabulary]`` float32.
        """
        cache = transformers.DynamicCache()
        # not keys[layer]: the gradient of each would be as large as the whole cache
        for layer, (key, value) in enumerate(zip(keys.unbind(), values.unbind(), strict=True)):
            cache.update(_engine(key), _engine(value), layer)
        output = self._model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _cache(self, tokens: Sequence[int], queries: Recorded) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a text, each ``[layers, tokens, kv_heads, head_dim]``."""
        # a plain cache keeps all tokens of all layers; the masks of sliding windows are made all the same
        cache = transformers.DynamicCache()
        with _recording(queries):
            self._model(
                torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        shapes = {tuple(t.shape) for layer in cache.layers for t in (layer.keys, layer.values)}
        if len(shapes) != 1:
            raise UnsupportedError(
                f"the cache is not one shape for all layers, keys and values: {sorted(shapes)}"
            )
        keys, values = (
            torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers])
            for name in ("keys", "values")
        )
        return keys, values

    def _unrotated(self, queries: torch.Tensor, layer: int) -> torch.Tensor:
        plain = queries[0].transpose(0, 1).float()
        if plain.shape[-1] != self.head_dim or plain.shape[1] % self.kv_heads:
            raise UnsupportedError(
                f"queries of layer {layer} are {list(plain.shape)}: not of the keys' head size"
            )
        if (rope := self._ropes[layer]) is None:
            return plain
        turned = turn(plain, rope, range(len(plain)), back=True)
        turned[..., : rope.rotary_dim] /= rope.attention_factor
        return turned

    @torch.no_grad()
    def _find_ropes(self) -> tuple[tuple[Rope | None, ...], tuple[str, ...]]:
        ropes, notes = described(self._model, self.head_dim)
        if not ropes:
            return (None,) * self.layers, tuple(notes)
        cache = transformers.DynamicCache()
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or POSITIONS[-1] + 1
        positions = [position for position in POSITIONS if position < limit]
        token = min(97, text.vocab_size - 1)
        self._model(
            torch.full((len(positions), 1), token),
            position_ids=torch.tensor(positions)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        found: list[Rope | None] = []
        for index, layer in enumerate(cache.layers):
            rope, explained = explain(layer.keys[:, :, 0].float(), positions, ropes)
            found.append(rope)
            if not explained:
                notes.append(f"keys of layer {index} move in no known way; coded as they are")
        return tuple(found), tuple(notes)


def read_config(folder: Path) -> Any:
    """Read a model's configuration.

    Raises:
        SpecError: There is none.
        UnsupportedError: transformers does not know the architecture.
    """
    if not (folder / "config.json").exists():
        raise SpecError("--model", f"no config.json in {folder}: not a model folder")
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except OSError as error:
        raise SpecError("--model", f"can't read {folder}: {_first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"transformers {transformers.__version__} can't read the model's config.json: "
            f"{_first_line(error)}"
        ) from error


def check_cache(config: Any) -> None:
    """Refuse models whose cache is not one key and one value for each layer, head and token.

    Sliding windows are no obstacle: calibration reads the keys of all tokens.

    Raises:
        UnsupportedError: The error says what the model has instead.
    """
    kind = getattr(config, "model_type", "?")
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind}: encoder-decoder models have two caches")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"{kind}: multi-head latent attention has no keys and values")
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedError(f"{kind}: the model has no attention, so no KV cache")
    try:
        layers = transformers.DynamicCache(config=config).layers
    except (KeyError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"{kind}: unknown kind of cache: {_first_line(error)}") from error
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    others = {type(layer).__name__ for layer in layers if type(layer) not in plain}
    if others or len(layers) not in (0, text.num_hidden_layers):
        raise UnsupportedError(
            f"{kind}: not every layer has keys and values of its own "
            f"({', '.join(sorted(others)) or 'some are shared'})"
        )


@contextmanager
def _recording(queries: Recorded) -> Iterator[None]:
    token = _RECORDED.set(queries)
    try:
        yield
    finally:
        _RECORDED.reset(token)


def _record_queries(model: Any) -> None:
    """Let a model hand its queries to us on their way to the attention function it uses anyway."""
    base = model.config._attn_implementation
    if base not in _BASES:
        raise UnsupportedError(f"attention implementation {base!r} can't be watched")
    name = f"kvserve_recorded_{base}"
    forward = _eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    transformers.AttentionInterface.register(name, _recorded(forward))
    transformers.AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UnsupportedError(f"{type(model).__name__}: {_first_line(error)}") from error


def _recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if (record := _RECORDED.get()) is not None:
            record[module.layer_idx] = query.detach()
        return forward(module, query, *args, **kwargs)

    return attention


def _eager(module: Any, *args: Any, **kwargs: Any) -> Any:
    # models that no fused attention serves have their own, beside their module
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _engine(tensor: torch.Tensor) -> torch.Tensor:
    """Return the engine's ``[1, kv_heads, tokens, head_dim]`` of ``[tokens, kv_heads, head_dim]``."""
    return tensor.transpose(0, 1)[None]


def _layout(keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> KVLayout:
    layers, _, heads, head_dim = keys.shape
    return KVLayout(
        layers=layers,
        kv_heads=heads,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
    )


def _native_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if not isinstance(dtype, torch.dtype) or str(dtype).removeprefix("torch.") not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"KV caches of dtype {dtype} can't be calibrated; known: {FLOAT_DTYPES}"
        )
    return dtype


def _lead(tokenizer: Any) -> tuple[int, ...]:
    """Return the beginning-of-text token if the tokenizer adds one by itself."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return (bos,) if bos is not None and ids[0] == bos else ()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
