"""A causal language model of transformers with the members of torchtune's decoder, so that all tools work on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oprd_tune.errors import ConfigError
from oprd_tune.teacher.block_placement import BlockCall
from oprd_tune.teacher.transformers_head import GivenStates, head_of

# How families name their final norm. The embedding and the blocks are found by what they are.
_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm", "embedding_norm")
_NO_CACHE = (
    "the teacher's architecture has no key-value cache that can drop rows, so it cannot be sampled from to measure how "
    "good it is; give evaluate_teacher: false, and eval.teacher: false if there is a section eval"
)


class TransformersDecoder(nn.Module):
    """Runs a transformers decoder whose parts lie here, under torchtune's names.

    `frame` is transformers' own base model without its large parts. A forward pass puts them in place, so blocks may be
    cut, taken away or replaced here at any time. Rows are right-padded: under a causal mask, padding changes nothing.
    One exception is transformers' own: positions scaled by `longrope` or `dynamic` depend on the longest row of a batch
    once it is longer than the context that the model was first trained on.

    Args:
        model: a causal language model, possibly on the meta device. Its parts move here, so it cannot run any more.

    Attributes:
        tok_embeddings, layers, norm: as in torchtune's decoder.
        output: the head. It is a torchtune `TiedLinear`, a linear layer, or `ScaledHead`.
        max_seq_len: the number of tokens that the model can read.
        config: transformers' config of the decoder.
        folder: where the model comes from.
        published_block_bytes: bytes of each block, if the checkpoint in the folder is quantised; else None.

    Raises:
        ConfigError: if the model is not built of one embedding, one list of blocks, a final norm and a head.
    """

    num_output_chunks = 0  # as in torchtune: the head runs once
    tok_embeddings: Any
    layers: nn.ModuleList
    norm: nn.Module
    output: Any
    folder: Path
    published_block_bytes: list[int] | None = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        frame, head = model.get_decoder(), model.get_output_embeddings()  # before anything is taken out of the model
        self.config = frame.config
        _check_family(type(model).__name__, self.config)
        self._places = _find_parts(type(model).__name__, frame)
        self._columns: _Columns | None = None
        for own, theirs in self._places.items():
            setattr(self, own, getattr(frame, theirs))
        # A family without such a limit has no positions, or counts them relatively.
        self.max_seq_len: int = getattr(self.config, "max_position_embeddings", None) or sys.maxsize
        self._strip(frame)
        setattr(model, model.base_model_prefix, GivenStates())
        self.frame = frame
        self.output = head_of(model, head, self.tok_embeddings, self.config)

    def forward(self, tokens_BS: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        """What `output` makes of the states after the norm, in fp32; with a head, the logits [B, S, V].

        Args:
            tokens_BS: right-padded token ids.
            mask: [B, S] over all columns so far; only for `decoding`, whose rows are left-padded.
            input_pos: the tokens' positions [B, S]; None counts from 0.
        """
        columns, given = self._columns, {}
        if columns is not None:
            given = {"attention_mask": mask, "position_ids": input_pos, "past_key_values": columns.cache}
        with self._assembled():
            found = self.frame(input_ids=tokens_BS, use_cache=columns is not None, **given)
        if columns is not None:
            columns.cache = self._cache_of(found)
        return self.output(found[0]).float()

    @property
    def cached_numbers(self) -> int:
        """The size of a key and a value, over all heads. Families whose caches are smaller take less."""
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.tok_embeddings.weight.shape[1] // heads
        return 2 * (getattr(self.config, "num_key_value_heads", None) or heads) * size

    def _cache_of(self, found: Any) -> Any:
        cache = getattr(found, "past_key_values", None)
        if not hasattr(cache, "reorder_cache"):
            raise ConfigError(_NO_CACHE)
        return cache

    @property
    def block_list(self) -> str:
        """How transformers names the list of blocks."""
        return self._places["layers"]

    def block_calls(self, blocks: Sequence[nn.Module], tokens_BS: Tensor) -> tuple[Tensor, BlockCall]:
        """How a forward pass over these tokens calls each block.

        Args:
            blocks: all blocks; none of them runs.

        Returns:
            The first block's input, and a function that runs a block, given its number from 1 and its input.
        """
        recorders = [_Recorder(block) for block in blocks]
        try:
            first_BSD = self._record(recorders, tokens_BS)
        except RuntimeError:
            first_BSD = tokens_BS
        if first_BSD.ndim != 3:  # the family takes the first of several values from each block
            for recorder in recorders:
                recorder.gives_tuple = True
            first_BSD = self._record(recorders, tokens_BS)

        def call(number: int, block: nn.Module, state_BSD: Tensor) -> Tensor:
            return states_of(block(state_BSD, *recorders[number - 1].further, **recorders[number - 1].named))

        return first_BSD, call

    def _record(self, recorders: list[_Recorder], tokens_BS: Tensor) -> Tensor:
        kept = self.layers, self.norm
        self.layers, self.norm = nn.ModuleList(recorders), nn.Identity()
        try:
            with self._assembled():
                return self.frame(input_ids=tokens_BS, use_cache=False)[0]
        finally:
            self.layers, self.norm = kept

    @contextmanager
    def decoding(self, visible_BP: Tensor, max_new_tokens: int) -> Iterator[_Columns]:
        """Within the scope, forward passes continue left-padded rows over the cache that transformers makes."""
        self._columns = _Columns(visible_BP, max_new_tokens)
        try:
            yield self._columns
        finally:
            self._columns = None

    @contextmanager
    def _assembled(self) -> Iterator[None]:
        """Within the scope, the parts are also where transformers looks for them."""
        depth = self.config.num_hidden_layers
        for own, theirs in self._places.items():
            setattr(self.frame, theirs, getattr(self, own))
        self.config.num_hidden_layers = len(self.layers)  # by which transformers counts blocks
        try:
            yield
        finally:
            self.config.num_hidden_layers = depth
            self._strip(self.frame)

    def _strip(self, frame: nn.Module) -> None:
        for own, theirs in self._places.items():
            setattr(frame, theirs, nn.ModuleList() if own == "layers" else nn.Identity())


def states_of(output: Any) -> Tensor:
    """The states that a block returns. Some families return them as the first of several values."""
    return output[0] if isinstance(output, tuple) else output


def _check_family(family: str, config: Any) -> None:
    if shared := getattr(config, "num_kv_shared_layers", 0):
        raise ConfigError(
            f"{family}: num_kv_shared_layers is {shared} in config.json, so blocks read what earlier ones computed and "
            "cannot be cut or moved one by one; such a teacher is not supported. Give another"
        )
    if getattr(config, "use_bidirectional_attention", False) in (True, "all"):
        raise ConfigError(
            f"{family}: use_bidirectional_attention is set in config.json, so the model reads what comes later; give a "
            "causal one"
        )


def _find_parts(family: str, frame: Any) -> dict[str, str]:
    """The names of embedding, blocks and norm in transformers' base model, by their names here."""
    depth, embedding = frame.config.num_hidden_layers, frame.get_input_embeddings()
    children = dict(frame.named_children())
    found = {
        "tok_embeddings": [n for n, child in children.items() if child is embedding],
        "layers": [n for n, child in children.items() if isinstance(child, nn.ModuleList) and len(child) == depth],
        "norm": [n for n in children if n in _NORMS],
    }
    if wrong := [part for part, names in found.items() if len(names) != 1]:
        raise ConfigError(
            f"{family} is not built of one embedding, one list of {depth} blocks and a final norm: cannot tell its "
            f"{' and '.join(wrong)} among {', '.join(children)}. Such a teacher is not supported; give another"
        )
    if embedding.embedding_dim != frame.config.hidden_size:
        raise ConfigError(
            f"{family}: its embedding is {embedding.embedding_dim} wide and its states {frame.config.hidden_size}; a "
            "teacher needs one width. Give another"
        )
    return {part: names[0] for part, names in found.items()}


class _Recorder(nn.Module):
    """Stands for a block, notes what it is called with, and returns its input."""

    further: tuple[Any, ...] = ()
    gives_tuple = False

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # past nn.Module: the block lies elsewhere
        self.named: dict[str, Any] = {}

    def forward(self, state_BSD: Tensor, *further: Any, **named: Any) -> Tensor | tuple[Tensor]:
        self.further, self.named = further, named
        return (state_BSD,) if self.gives_tuple else state_BSD

    def __getattr__(self, name: str) -> Any:  # families read attributes of their blocks, such as the kind of attention
        return getattr(self.__dict__["_block"], name)


class _Columns:
    """The filled columns of transformers' cache, with the members that the sampler uses of our own cache."""

    cache: Any = None  # before the first pass

    def __init__(self, visible_BP: Tensor, max_new_tokens: int) -> None:
        self._filled = 0
        self._visible_BS = nn.functional.pad(visible_BP, (0, max_new_tokens), value=True)

    def mask(self, new_columns: int) -> Tensor:
        """The columns that are no padding, [B, S], with those that the next pass adds."""
        return self._visible_BS[:, : self._filled + new_columns]

    def advance(self, length: int) -> None:
        """Count `length` columns as filled, after a forward pass."""
        self._filled += length

    def keep_rows(self, index_B: Tensor) -> None:
        """Drop all other rows."""
        self._visible_BS = self._visible_BS[index_B]
        try:
            self.cache.reorder_cache(index_B)
        except (RuntimeError, AttributeError, IndexError) as error:
            raise ConfigError(_NO_CACHE) from error
