"""Report what a run will do and need, before any weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config import OPRDSettings, Parts
from oprd_tune.errors import ConfigError, NothingLeftToDo
from oprd_tune.losses.composite import Composite, as_composite
from oprd_tune.losses.hidden_mse import HiddenStateLoss
from oprd_tune.losses.masking import StateSelector
from oprd_tune.modeling.freezing import freeze
from oprd_tune.modeling.row_attention import takes_rows
from oprd_tune.modeling.sharding import choose_sharding, one_if_it_fits
from oprd_tune.modeling.weights import build_on_meta, width_of
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.describe import rows_of
from oprd_tune.preflight.disk import predict_disk
from oprd_tune.preflight.loss_trial import try_losses
from oprd_tune.preflight.memory import Memory, Plan, predict_memory, reading_bytes
from oprd_tune.preflight.pair import ModelPair, ModelPairs, of_teacher
from oprd_tune.preflight.trial import try_optimizer
from oprd_tune.protocols import DecodesItself, RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.sampler import sampling_bytes
from oprd_tune.teacher import TeacherPlan

_SHARE_OF_LOGITS = 16  # of a GPU's whole memory, so that the same card always gives the same chunks


def preflight(
    parts: Parts,
    settings: OPRDSettings,
    pairs: ModelPairs,
    data: RunData,
    loss: HiddenStateLoss | Composite,
    engine: RolloutEngine,
) -> Memory:
    """Print models, conventions, batch, memory and disk as a short table; returns the memory of one rank.

    Raises:
        ConfigError: if the optimizer, the schedule or a loss fails a trial, or if the run's files will not fit on the
            disk. The setting `preflight` false leaves the loss and the disk alone.
        NothingLeftToDo: if the setting `preflight` is `only`.
    """
    s, ranks, loss = settings, data.ranks, as_composite(loss)
    student = build_on_meta(parts.model)
    top = pairs.depth if loss.token_losses else pairs.top
    freeze(student, top=top, trains_head=bool(loss.token_losses), freeze_embedding=s.freeze_embedding)
    if s.preflight:
        for width in {pair.width if pair.bridge is None else pair.bridge.rank for pair in pairs}:
            try_losses(loss, width=width, vocabulary=pairs.vocabulary, device=ranks.device)
    held, for_benchmarks = _benchmark_bytes(data, engine, student, pairs, s.torch_dtype)
    plan = _plan(parts, s, pairs, data, loss, engine, student=student)
    plan = replace(
        plan,
        engine_bytes=max(held, plan.engine_bytes),
        rollout_bytes=max(for_benchmarks, plan.rollout_bytes),
    )
    memory = predict_memory(student, parts.model, plan)
    if ranks.device.type == "cuda":  # larger chunks of logits, from what the card has beside all that
        whole = torch.cuda.get_device_properties(ranks.device).total_memory
        size = (pairs.vocabulary, width_of(student))
        share = whole // _SHARE_OF_LOGITS + loss.waiting_bytes(*size)
        loss.fit(min(share, whole - memory.peak + plan.logit_bytes), *size)
        plan = replace(plan, logit_bytes=_logit_bytes(loss, pairs, student))
        memory = predict_memory(student, parts.model, plan)
    if s.preflight:
        disk = predict_disk(s, student, memory, ranks, evaluated=_is_evaluated(data))
        rows = rows_of(student, s, pairs, data, memory, for_benchmarks)
        chunks = ", ".join(f"{part.at_once:,}" for part in loss.token_losses.values())
        rows += [("logits", f"of {chunks} tokens at once")] if chunks else []
        rows.append(("disk", disk.text + ("" if disk.fits else ". This will not fit")))
        wide = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"  {name:<{wide}}  {text}" for name, text in rows) + "\n")
        if not disk.fits and s.preflight != "only":
            raise ConfigError(
                f"what the run writes to {s.output_dir} will not fit ({disk.text}): lower keep_checkpoints, or give "
                "another output_dir; preflight=false starts all the same"
            )
    if s.preflight == "only":
        raise NothingLeftToDo("preflight=only: nothing was loaded or started")
    return memory


def _plan(
    parts: Parts,
    s: OPRDSettings,
    pairs: ModelPairs,
    data: RunData,
    loss: Composite,
    engine: RolloutEngine,
    *,
    student: TransformerDecoder,
) -> Plan:
    """Collect what each component needs. Of several teachers, one at a time reads."""
    ranks, token_losses, sharding = data.ranks, list(loss.token_losses.values()), choose_sharding(s, data.ranks)
    longest = s.max_prompt_tokens + s.max_new_tokens
    rows = math.ceil(s.prompts_per_step / ranks.world_size) * s.samples_per_prompt
    longer = max(longest, *(one.longest_row for one in data.teachers.values()))  # as the models read it
    fitting, packed = max(1, s.tokens_per_micro_batch // longest), takes_rows(student)
    tokens = min(rows * longest, max(s.tokens_per_micro_batch, longest) if packed else fitting * longest)
    rows_at_once = math.ceil(tokens / longest)
    further = rows > 1 and not packed and not one_if_it_fits(s, sharding)  # much padding is worth a microbatch
    tapped = len(pairs[0].layers) if loss.hidden is not None else 0
    most_states = StateSelector(s.positions, s.positions_k, s.anchor, s.average_over).most(s.max_new_tokens)
    states = most_states if tapped else s.max_new_tokens  # of a whole row
    held, sampling = engine.memory_bytes(student, rows=rows, columns=longest, dtype=s.torch_dtype)
    if data.task_accuracy is not None:
        sampling = max(sampling, data.task_accuracy.memory_bytes(student, s.torch_dtype))
    teachers = []
    for pair in pairs:
        with of_teacher(pair.name):
            teachers.append(_teacher_bytes(pair, data, rows=rows))
    return Plan(
        settings=s,
        ranks=ranks,
        sharded=sharding is not None,
        token_losses=len(token_losses),
        rows=rows_at_once,
        row_tokens=math.ceil(tokens / rows_at_once),
        selected=tokens // longest * states + min(states, tokens % longest),
        tapped=tapped,
        micro_batches=math.ceil(rows / max(1, s.tokens_per_micro_batch // longer)) + len(pairs) - 1 + further,
        logit_bytes=_logit_bytes(loss, pairs, student),
        rollout_bytes=max(sampling, *(one.sampling for one in teachers)),
        engine_bytes=held,
        optimizer_bytes=try_optimizer(
            parts.optimizer,
            parts.lr_scheduler,
            max_steps=s.max_steps,
            dtype=s.torch_master_dtype,
            device=ranks.device,
            vectors=any(p.ndim < 2 for p in student.parameters() if p.requires_grad),
            sharding=sharding,
            folder=Path(s.output_dir),
        ),
        follows=any(pair.settings.teacher_decay is not None for pair in pairs),
        teacher_bytes=sum(one.kept for one in teachers),
        whole_teacher_bytes=max(one.gathered for one in teachers),
        reading_bytes=max(one.reading for one in teachers),
        teacher_width=max(pair.teacher_width for pair in pairs),
        target_width=max(pair.teacher_width if pair.bridge is None else pair.bridge.rank for pair in pairs),
        bridge_bytes=sum(pair.bridge.projector_bytes(*pair.bridge_sizes) for pair in pairs if pair.bridge is not None),
        moment_bytes=max(_moment_bytes(pair, ranks) for pair in pairs),
    )


def _logit_bytes(loss: Composite, pairs: ModelPairs, student: TransformerDecoder) -> int:
    """One part after the other has chunks of logits. Each part's gradient of the head waits for the backward pass."""
    size = (pairs.vocabulary, width_of(student))
    working = max((part.working_bytes(*size) for part in loss.token_losses.values()), default=0)
    return loss.waiting_bytes(*size) + working


def _moment_bytes(pair: ModelPair, ranks: Ranks) -> int:
    """What the fit of a teacher's bridge takes on the device."""
    if (bridge := pair.bridge) is None:
        return 0
    fitted_here = torch.device(bridge.moments_device or ranks.device).type == ranks.device.type
    return bridge.moment_bytes(*pair.bridge_sizes) if fitted_here else 0


def _benchmark_bytes(
    data: RunData, engine: RolloutEngine, student: TransformerDecoder, pairs: ModelPairs, dtype: torch.dtype
) -> tuple[int, int]:
    """What the answers to benchmarks take: of the engine all the time, and while student or teacher samples."""
    if data.benchmarks is None:
        return 0, 0
    size = {"rows": data.benchmarks.rows, "columns": data.benchmarks.request.longest_row}
    held, sampling = engine.memory_bytes(student, **size, dtype=dtype)
    if (own := data.teacher_benchmarks) is not None:
        teacher = build_on_meta(pairs[0].parts.teacher_model)
        by_teacher = sampling_bytes(teacher, rows=own.rows, columns=own.request.longest_row, dtype=dtype)
        sampling = max(sampling, by_teacher)
    return held, sampling


@dataclass(frozen=True)
class _TeacherBytes:
    """Bytes of a teacher.

    Attributes:
        kept: in its placement.
        gathered: while it is gathered for its evaluation; 0 if it never is.
        reading: what its pass over a microbatch takes.
        sampling: what its evaluation takes.
    """

    kept: int = 0
    gathered: int = 0
    reading: int = 0
    sampling: int = 0


def _teacher_bytes(pair: ModelPair, data: RunData, *, rows: int) -> _TeacherBytes:
    """What a teacher takes of the device. One that is the student itself only reads, which takes less than training."""
    s, own = pair.settings, data.teachers[pair.name]
    teacher = build_on_meta(pair.parts.teacher_model)
    measured = own.accuracy if s.evaluate_teacher else None
    sampling = 0 if measured is None else measured.memory_bytes(teacher, s.torch_dtype)
    if s.teacher_is_student:
        return _TeacherBytes(sampling=sampling)
    keeps_head, top = pair.compares_heads or pair.diagnosed, pair.teacher_top or pair.teacher_depth
    plan = TeacherPlan(s.teacher_placement, s.teacher_quantization, data.ranks)
    kept = plan.memory_bytes(teacher, top=top, keeps_head=keeps_head, dtype=s.torch_dtype)
    gathered = 0
    if plan.sharded and (measured is not None or own.benchmarks is not None):
        whole = replace(plan, placement="replicated")
        gathered = whole.memory_bytes(teacher, top=top, keeps_head=keeps_head, dtype=s.torch_dtype)
    return _TeacherBytes(kept, gathered, _reading_bytes(pair, teacher, own.longest_row, rows), sampling)


def _reading_bytes(pair: ModelPair, teacher: TransformerDecoder, columns: int, rows: int) -> int:
    """What a teacher's pass over its largest microbatch takes. Blocks of transformers are not counted."""
    s, build = pair.settings, pair.parts.teacher_model
    if isinstance(teacher, DecodesItself):
        return 0
    tokens = min(rows * columns, max(s.tokens_per_micro_batch, columns))
    rows = math.ceil(tokens / columns)
    columns = math.ceil(tokens / rows)
    return reading_bytes(build, rows=rows, columns=columns, width=pair.teacher_width, dtype=s.torch_dtype)


def _is_evaluated(data: RunData) -> bool:
    return any(found is not None for found in (data.task_accuracy, data.reference_perplexity, data.benchmarks))
