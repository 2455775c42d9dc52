"""The model under test: its KV cache in canonical form, and its predictions with a given KV cache.

It computes in float32, whatever dtype its cache is served in: in bfloat16 on a CPU the rounding of the model itself
costs a divergence of 0.0015, which would hide the loss of every good codec (8-bit: 0.00005).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.cache_utils import DynamicLayer

from kvserve_api.errors import KVServeError, SpecError, UnavailableError, UnsupportedError
from kvserve_api.wire import FLOAT_DTYPES, KVLayout, model_fingerprint

COMPUTE_DTYPE: Final = torch.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class KV:
    """A KV cache in canonical form.

    Attributes:
        keys: ``[layers, tokens, kv_heads, head_dim]`` in the dtype it is served in, contiguous.
        values: The same shape and dtype.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens it covers."""
        return self.keys.shape[1]

    def first(self, tokens: int) -> "KV":
        """Return a contiguous copy of the first tokens."""
        return KV(
            keys=self.keys[:, :tokens].contiguous(), values=self.values[:, :tokens].contiguous()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a model is.

    Attributes:
        location: A folder, or an id on the hub.
        revision: Revision on the hub, or empty.
    """

    location: str
    revision: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """How transformers is to load it: no code from the model's folder, and no pickled weights, ever."""
        return {"trust_remote_code": False} | ({"revision": self.revision} if self.revision else {})

    def config(self) -> Any:
        """Read the model's configuration.

        Raises:
            SpecError: There is no model.
            UnavailableError: The hub does not answer.
            UnsupportedError: transformers does not know its architecture, or its KV cache is not plain.
        """
        if Path(self.location).is_absolute() and not (Path(self.location) / "config.json").exists():
            raise SpecError("model", f"no config.json in {self.location}: not a model folder")
        try:
            config = transformers.AutoConfig.from_pretrained(self.location, **self.options)
        except OSError as error:
            raise _load_error(self, error) from error
        except (ValueError, KeyError) as error:
            raise UnsupportedError(
                f"transformers {transformers.__version__} can't read the model's config.json: "
                f"{_first_line(error)}"
            ) from error
        check_plain_cache(config)
        return config


def fingerprint(config: Any) -> str:
    """Return the fingerprint of a model's KV cache from its transformers configuration."""
    return model_fingerprint(config.to_dict())


def check_plain_cache(config: Any) -> None:
    """Refuse models whose cache is not a key and a value of one shape for each layer, head and token.

    Raises:
        UnsupportedError: The error says what the model has instead.
    """
    kind = getattr(config, "model_type", "?")
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind}: encoder-decoder models have two caches; none is profiled")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"{kind}: multi-head latent attention has no keys and values")
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedError(f"{kind}: the model has no attention, so no KV cache")
    try:
        layers = transformers.DynamicCache(config=config).layers
    except (KeyError, ValueError, AttributeError) as error:
        raise UnsupportedError(f"{kind}: unknown kind of cache: {_first_line(error)}") from error
    others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    if others or len(layers) not in (0, text.num_hidden_layers):
        raise UnsupportedError(
            f"{kind}: not every layer has a cache of its own for all tokens "
            f"({', '.join(sorted(others)) or 'shared'}); only full attention is profiled"
        )


class Model:
    """A loaded model.

    Attributes:
        layout: The form of its KV cache.
        max_positions: Most tokens it takes; None if its configuration does not say.
        lead: Tokens that begin any text.
    """

    def __init__(self, source: Source) -> None:
        """Load weights and tokenizer.

        Raises:
            SpecError: They are missing or broken.
            UnavailableError: The hub does not answer.
            UnsupportedError: See `Source.config`.
        """
        config = source.config()
        transformers.utils.logging.disable_progress_bar()
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                source.location, **source.options
            )
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                source.location, dtype=COMPUTE_DTYPE, use_safetensors=True, **source.options
            ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise _load_error(source, error) from error
        self._model.requires_grad_(False)
        self._dtype = _native_dtype(config)
        self.max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.lead = _lead(self._tokenizer)
        self.layout = self._probe()

    def tokenise(self, text: str) -> list[int]:
        """Return the text's token ids, without those that begin any text."""
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> KV:
        """Return the KV cache of a text.

        Raises:
            UnsupportedError: The model has no plain KV cache.
        """
        output = self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        keys = [_canonical(layer.keys) for layer in cache.layers]
        values = [_canonical(layer.values) for layer in cache.layers]
        shapes = {tensor.shape for tensor in (*keys, *values)}
        if len(shapes) != 1 or next(iter(shapes))[0] != len(tokens):
            raise UnsupportedError(
                f"the model's cache is not one shape for all layers, keys and values: {shapes}"
            )
        return KV(
            keys=torch.stack(keys).to(self._dtype), values=torch.stack(values).to(self._dtype)
        )

    @torch.inference_mode()
    def log_probabilities(self, tokens: Sequence[int], past: KV) -> torch.Tensor:
        """Return the prediction after each token, given the KV cache of what stands before them.

        Args:
            tokens: The tokens to read.
            past: The KV cache of all tokens before; it is not changed.

        Returns:
            ``[len(tokens), vocabulary]`` float32, natural logarithms.
        """
        return self.log_probabilities_of([tokens], [past])[0]

    @torch.inference_mode()
    def log_probabilities_of(
        self, windows: Sequence[Sequence[int]], pasts: Sequence[KV]
    ) -> torch.Tensor:
        """Return what `log_probabilities` does for several texts at once, which takes less time.

        Args:
            windows: The tokens to read of each text, of one length.
            pasts: The KV cache of each, of one length.

        Returns:
            ``[windows, tokens, vocabulary]`` float32, natural logarithms.
        """
        tokens = torch.tensor([list(window) for window in windows])
        output = self._model(tokens, past_key_values=self._cache(pasts), use_cache=True)
        return torch.log_softmax(output.logits.float(), dim=-1)

    def logits(
        self, tokens: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Return the predictions after each token; gradients flow to the cache if it requires them.

        Args:
            tokens: The tokens to read.
            keys: ``[layers, past, kv_heads, head_dim]`` float32: of all tokens before.
            values: The same shape.

        Returns:
            ``[len(tokens), vocabulary]`` float32.
        """
        cache = transformers.DynamicCache()
        # not keys[layer]: the gradient of each would be as large as the whole cache
        for layer, (key, value) in enumerate(zip(keys.unbind(), values.unbind(), strict=True)):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        output = self._model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], past: KV, *, max_tokens: int, stop: Sequence[str]
    ) -> str:
        """Return what the model writes on, always the most likely token.

        Args:
            prompt: The tokens to write on from; those that ``past`` does not cover are read first.
            past: The KV cache of the first of them, of at least one less; it is not changed.
            max_tokens: Most tokens to write.
            stop: Writing ends with the first of these strings, which is part of the result.
        """
        tokens = torch.tensor([prompt])

        # the library's own criterion for strings takes half a second of each call to read the vocabulary
        def ended(output: torch.Tensor, _scores: Any, **_kwargs: Any) -> bool:
            written = self._written(output, len(prompt))
            return any(end in written for end in stop)

        output = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=self._cache([past]),
            max_new_tokens=max_tokens,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([ended]),
            pad_token_id=0,
        )
        return self._written(output, len(prompt))

    def _written(self, output: torch.Tensor, start: int) -> str:
        return str(self._tokenizer.decode(output[0, start:], skip_special_tokens=True))

    def _cache(self, pasts: Sequence[KV]) -> transformers.DynamicCache:
        cache = transformers.DynamicCache()
        keys = torch.stack([_engine(past.keys) for past in pasts], dim=1)
        values = torch.stack([_engine(past.values) for past in pasts], dim=1)
        for index in range(self.layout.layers):
            cache.update(keys[index], values[index], index)
        return cache

    def _probe(self) -> KVLayout:
        layers, _, heads, head_dim = self.prefill([0, 0]).keys.shape
        return KVLayout(
            layers=layers,
            kv_heads=heads,
            head_dim=head_dim,
            dtype=str(self._dtype).removeprefix("torch."),
        )


def _canonical(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``[tokens, kv_heads, head_dim]`` of the engine's ``[1, kv_heads, tokens, head_dim]``."""
    return tensor[0].transpose(0, 1)


def _engine(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``[layers, kv_heads, tokens, head_dim]`` of the canonical form."""
    return tensor.transpose(1, 2).to(COMPUTE_DTYPE)


def _native_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if not isinstance(dtype, torch.dtype) or str(dtype).removeprefix("torch.") not in FLOAT_DTYPES:
        raise UnsupportedError(
            f"KV caches of dtype {dtype} are not profiled; known: {FLOAT_DTYPES}"
        )
    return dtype


def _lead(tokenizer: Any) -> tuple[int, ...]:
    """Return the beginning-of-text token if the tokenizer adds one by itself."""
    bos = tokenizer.bos_token_id
    ids: Mapping[str, list[int]] = tokenizer("a")
    return (bos,) if bos is not None and ids["input_ids"][0] == bos else ()


def _load_error(source: Source, error: Exception) -> KVServeError:
    """Return what to raise for a model that transformers could not load."""
    text = f"can't load {source.location}: {_first_line(error)}"
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return UnavailableError(text)
    return SpecError("model", text)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
