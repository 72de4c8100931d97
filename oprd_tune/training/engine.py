"""The rollout engine of a run: which one, whether it can be used, and what it is given."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.modules import TransformerDecoder

from oprd_tune.components import Components
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.auto import AUTO, best_engine
from oprd_tune.rollout.engine import RolloutEngine
from oprd_tune.rollout.policy_weights import PolicyWeights
from oprd_tune.settings import OPRDSettings
from oprd_tune.training.data import RunData
from oprd_tune.training.pair import ModelPair

_SCRATCH = "sampler"  # what servers start from and log, within the run's folder


def settle_engine(cfg: DictConfig, checkpoint: Path | None, device: torch.device, ranks: Ranks) -> None:
    """Find out, before anything is loaded, whether the config's engine can be used; `auto` gives way to a real one.

    Args:
        cfg: the run's config. What it says afterwards is saved with checkpoints.
        checkpoint: one to resume from; its engine stays.
        device: where the run computes.
        ranks: the processes of the run.

    Raises:
        ConfigError: if it cannot.
    """
    if cfg.rollout._component_ == AUTO:
        chosen, why = best_engine(device, ranks) if checkpoint is None else (_saved_engine(checkpoint), "as before")
        print(f"rollout: {chosen.rpartition('.')[2]} ({why})")
        cfg.rollout._component_ = chosen
    if check := getattr(Components(cfg).type_of("rollout"), "check", None):
        check(device, ranks, OmegaConf.to_container(cfg.rollout, resolve=True))


def _saved_engine(checkpoint: Path) -> str:
    return OmegaConf.load(checkpoint / "config.yaml").rollout._component_


def load_engine(
    make: Components,
    model: TransformerDecoder,
    settings: OPRDSettings,
    pair: ModelPair,
    data: RunData,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    top_k_ids: int | None = None,
) -> RolloutEngine:
    """Construct the config's engine.

    Args:
        make: constructs components.
        model: the student, as it trains.
        settings: how many samples, how long, and the seed.
        pair: the models' files and shared vocabulary.
        data: of the run; its tokenizer ends responses.
        ranks: the processes of the run.
        dtype: that the student computes in.
        top_k_ids: see `NativeEngine`.
    """
    s = settings
    arguments = {
        "stop_tokens": data.tokenizer.stop_tokens,
        "pad_id": data.tokenizer.pad_id,
        "max_new_tokens": s.max_new_tokens,
        "samples_per_prompt": s.samples_per_prompt,
        "seed": s.seed,
        "vocabulary": pair.vocabulary,
        "top_k_ids": top_k_ids,
    }
    if not make.type_of("rollout").samples_with_student:
        arguments |= {
            "max_prompt_tokens": s.max_prompt_tokens,
            "weights": PolicyWeights(model, pair.student_files, dtype=dtype, vocabulary=pair.vocabulary, ranks=ranks),
            "folder": Path(s.output_dir) / _SCRATCH,
        }
    return make("rollout", model, **arguments)
