"""A recipe's scalars as a frozen dataclass. The config stops here: nothing else in the package ever sees it."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from oprd_tune.components import check_component, nearest
from oprd_tune.errors import ConfigError
from oprd_tune.registry import owner_of_running_config


@dataclass(frozen=True)
class OPRDSettings:
    """Scalars of the `oprd_*` recipes. What each one means is in docs/configuration.md, in this order."""

    output_dir: str
    max_steps: int
    max_prompt_tokens: int
    max_new_tokens: int
    seed: int = 0
    resume: bool = False
    device: str | None = None
    dtype: str = "bf16"
    num_threads: int | None = None
    prompts_per_step: int = 8
    samples_per_prompt: int = 2
    truncated_responses: str = "keep"
    tokens_per_micro_batch: int = 16384
    layers: str | list[int] = "all"
    layer_pairs: list[list[int]] | None = None
    positions: str = "last_k"
    positions_k: int = 2000
    anchor: str = "predict"
    freeze_embedding: bool = False
    clip_grad_norm: float | None = 1.0
    max_nonfinite_steps: int = 3
    activation_checkpointing: bool | int = False
    compile: bool = False
    teacher_placement: str = "replicated"
    teacher_quantization: str | None = None
    evaluate_teacher: bool = True
    min_matched_share: float = 0.5
    preflight: bool | str = True
    evaluate_every_n_steps: int = 50
    checkpoint_every_n_steps: int = 50
    keep_checkpoints: int = 2
    log_every_n_steps: int = 1
    log_samples_every_n_steps: int = 50

    def __post_init__(self) -> None:
        for name in (
            *("max_steps", "max_prompt_tokens", "max_new_tokens", "prompts_per_step", "samples_per_prompt"),
            *("tokens_per_micro_batch", "positions_k", "evaluate_every_n_steps", "checkpoint_every_n_steps"),
            *("keep_checkpoints", "log_every_n_steps", "log_samples_every_n_steps", "max_nonfinite_steps"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in ("bf16", "fp32"):
            raise ConfigError(f"dtype is {self.dtype!r}; allowed are bf16 and fp32")
        if self.truncated_responses not in ("keep", "mask", "drop"):
            raise ConfigError(f"truncated_responses is {self.truncated_responses!r}; allowed are keep, mask and drop")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(
                f"clip_grad_norm is {self.clip_grad_norm}; give a positive number, or null to switch it off"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must lie within 0 and 2**32 - 1")
        if self.activation_checkpointing < 0:
            raise ConfigError(
                f"activation_checkpointing is {self.activation_checkpointing}; allowed are true, false, and n for "
                "every n-th block"
            )
        if not 0 <= self.min_matched_share <= 1:
            raise ConfigError(f"min_matched_share is {self.min_matched_share}; it must lie within 0 and 1")
        if isinstance(self.preflight, str) and self.preflight != "only":
            raise ConfigError(f"preflight is {self.preflight!r}; allowed are true, false and only")


@dataclass(frozen=True)
class OPDSettings(OPRDSettings):
    """Scalars of the `opd_topk_*` recipes: those of `oprd_*`, and when to look at whole distributions."""

    diagnostics_every_n_steps: int = 10
    diagnostics_tokens: int = 256
    diagnostics_k: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diagnostics_every_n_steps", "diagnostics_tokens", "diagnostics_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class _Sharded:
    """What the `*_distributed` recipes have besides."""

    master_dtype: str | None = None
    fsdp_reshard_after_forward: bool = True
    fsdp_cpu_offload: bool = False
    sync_every_micro_batch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.master_dtype not in (None, "fp32"):
            raise ConfigError(
                f"master_dtype is {self.master_dtype!r}; allowed are null, for the same as dtype, and fp32"
            )


@dataclass(frozen=True)
class OPRDDistributedSettings(_Sharded, OPRDSettings):
    """Scalars of `oprd_distributed`."""


@dataclass(frozen=True)
class OPDDistributedSettings(_Sharded, OPDSettings):
    """Scalars of `opd_topk_distributed`."""


# May differ between a run and its resumption: its end, its logging, and what only changes where things are kept or how
# work is cut, so that a run can go on with other hardware. Everything else must not.
FREE_ON_RESUME = frozenset(
    {
        *("max_steps", "output_dir", "resume", "preflight", "evaluate_teacher", "num_threads"),
        *("checkpoint_every_n_steps", "keep_checkpoints"),
        *("metric_logger", "log_every_n_steps", "log_samples_every_n_steps"),
        *("diagnostics_every_n_steps", "diagnostics_tokens", "diagnostics_k"),
        *("tokens_per_micro_batch", "activation_checkpointing", "teacher_placement"),
        *("fsdp_reshard_after_forward", "fsdp_cpu_offload", "sync_every_micro_batch"),
        *("rollout.batch_size", "rollout.max_num_seqs", "rollout.gpu_memory_utilization", "rollout.kv_cache_gib"),
        *("rollout.addresses", "rollout.transfer", "rollout.shared_folder", "rollout.requests_in_flight"),
        *("rollout.timeout", "rollout.startup_timeout", "rollout.server_environment", "rollout.server_arguments"),
        *("rollout.checksum_every_n_syncs", "rollout.logprob_gap_limit"),
        *("rollout.tensor_parallel_size", "rollout.enforce_eager"),
        *("bridge.fit_only", "bridge.held_out_prompts", "bridge.moments_device", "min_matched_share"),
    }
)

SettingsT = TypeVar("SettingsT")


def parse_settings(
    cfg: DictConfig,
    settings: type[SettingsT],
    *,
    recipe: str,
    components: Collection[str],
    optional_components: Collection[str] = (),
) -> SettingsT:
    """Check every key of a config and return its scalars.

    Args:
        cfg: the merged config.
        settings: the dataclass of the recipe's scalars.
        recipe: the recipe's name; the config's `recipe` key must say the same.
        components: keys that must hold a `_component_`.
        optional_components: keys that may hold one, or null.

    Raises:
        ConfigError: for a config of another recipe; an unknown key, here or inside a component, with the nearest valid
            one; a missing key; or a value of another type.
    """
    _check_recipe(cfg, recipe)
    for name in optional_components:  # torchtune reads `task_accuracy=null` as `task_accuracy._component_=null`
        if OmegaConf.select(cfg, f"{name}._component_", default="") is None:
            cfg[name] = None
    try:
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config cannot be resolved: {error}") from error
    scalar_names = [f.name for f in fields(settings)]  # type: ignore[arg-type]
    known = [*scalar_names, *components, *optional_components, "recipe"]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown config key {key!r}{nearest(key, known)}")
    required = [f.name for f in fields(settings) if f.default is MISSING] + list(components)  # type: ignore[arg-type]
    if missing := [name for name in required if values.get(name) is None]:
        raise ConfigError(f"the config lacks {', '.join(missing)}")
    for name in (*components, *optional_components):
        if values.get(name) is not None:
            check_component(name, values[name])
    hints = get_type_hints(settings)
    scalars = {name: _typed(name, values[name], hints[name]) for name in scalar_names if name in values}
    return settings(**scalars)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested configs, one line a key; keys that may differ on resume are passed over."""
    found = []
    for key in sorted(set(old) | set(new)):
        if prefix + key in FREE_ON_RESUME:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} then, {after!r} now")
    return found


def _check_recipe(cfg: DictConfig, recipe: str) -> None:
    named = cfg.get("recipe")
    if named is None and (owner := owner_of_running_config()) is not None:
        named = owner
    if named is None:
        raise ConfigError(f"this config has no `recipe` key; write `recipe: {recipe}` if it was made for that recipe")
    if named != recipe:
        raise ConfigError(f"this config belongs to {named}, not to {recipe}: tune run {named} --config …")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type; only whole numbers turn into floats, nothing else is converted."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if get_origin(option) is list and isinstance(value, list):
            return [_typed(name, item, get_args(option)[0]) for item in value]
        if isinstance(option, type) and isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    wanted = " or ".join("null" if o is type(None) else o.__name__ if isinstance(o, type) else str(o) for o in options)
    raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
