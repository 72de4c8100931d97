"""Report what a run will do and need, before any weights are read."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config import OPRDSettings, Parts
from oprd_tune.data.tokenizer_files import conventions
from oprd_tune.errors import ConfigError, NothingLeftToDo
from oprd_tune.losses.composite import Composite, as_composite
from oprd_tune.losses.hidden_mse import HiddenStateLoss
from oprd_tune.losses.masking import StateSelector
from oprd_tune.modeling.bridge import BridgePlan
from oprd_tune.modeling.freezing import freeze
from oprd_tune.modeling.sharding import choose_sharding
from oprd_tune.modeling.weights import build_on_meta, width_of
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.disk import predict_disk
from oprd_tune.preflight.memory import Memory, Plan, as_size, predict_memory
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.preflight.trial import try_optimizer
from oprd_tune.protocols import DecodesItself, RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native.sampler import sampling_bytes
from oprd_tune.teacher import TeacherPlan
from oprd_tune.torchtune_compat import folder_of


def preflight(
    parts: Parts,
    settings: OPRDSettings,
    pair: ModelPair,
    data: RunData,
    loss: HiddenStateLoss | Composite,
    engine: RolloutEngine,
    bridge: BridgePlan | None,
) -> Memory:
    """Print models, conventions, batch, memory and disk as a short table; returns the memory of one rank.

    Raises:
        ConfigError: if the optimizer or the schedule fails a trial, or if the run's files will not fit on the disk. The
            setting `preflight` false leaves the disk alone.
        NothingLeftToDo: if the setting `preflight` is `only`.
    """
    s, ranks, loss = settings, data.ranks, as_composite(loss)
    student, teacher = build_on_meta(parts.model), build_on_meta(parts.teacher_model)
    top = pair.depth if loss.token_losses else pair.layers[-1].student
    freeze(student, top=top, trains_head=bool(loss.token_losses), freeze_embedding=s.freeze_embedding)
    plan = _plan(parts, s, pair, data, loss, engine, bridge, student=student, teacher=teacher)
    memory = predict_memory(student, parts.model, plan)
    if s.preflight:
        disk = predict_disk(s, student, memory, ranks, evaluated=_is_evaluated(data))
        rows = [
            ("student", _describe(student)),
            ("teacher", _describe_teacher(teacher, s)),
            *_differing_conventions(pair),
            *_describe_batch(s, data, ranks),
            *_describe_benchmarks(data, engine, student, teacher, s.torch_dtype),
            *_describe_bridge(bridge, pair, data),
            *_describe_memory(memory, ranks),
            ("disk", disk.text + ("" if disk.fits else ". This will not fit")),
        ]
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
    pair: ModelPair,
    data: RunData,
    loss: Composite,
    engine: RolloutEngine,
    bridge: BridgePlan | None,
    *,
    student: TransformerDecoder,
    teacher: TransformerDecoder,
) -> Plan:
    """Collect what each component needs."""
    ranks, token_losses, sharding = data.ranks, list(loss.token_losses.values()), choose_sharding(s, data.ranks)
    longest = s.max_prompt_tokens + s.max_new_tokens
    rows = math.ceil(s.prompts_per_step / ranks.world_size) * s.samples_per_prompt
    rows_at_once = min(rows, max(1, s.tokens_per_micro_batch // longest))
    tapped = len(pair.layers) if loss.hidden is not None else 0
    most_states = StateSelector(s.positions, s.positions_k, s.anchor, s.average_over).most(s.max_new_tokens)
    held, sampling = engine.memory_bytes(student, rows=rows, columns=longest, dtype=s.torch_dtype)
    if data.task_accuracy is not None:
        sampling = max(sampling, data.task_accuracy.memory_bytes(student, s.torch_dtype))
    if data.benchmarks is not None:
        more, for_benchmarks = _benchmark_bytes(data, engine, student, teacher, s.torch_dtype)
        held, sampling = max(held, more), max(sampling, for_benchmarks)
    sizes = _bridge_sizes(pair)
    fitted_here = bridge is not None and torch.device(bridge.moments_device or ranks.device).type == ranks.device.type
    teacher_bytes, whole_teacher_bytes = _teacher_bytes(s, pair, data, loss, bridge, teacher)
    return Plan(
        settings=s,
        ranks=ranks,
        sharded=sharding is not None,
        trains_head=bool(token_losses),
        rows=rows_at_once,
        row_tokens=longest,
        selected=rows_at_once * (most_states if tapped else s.max_new_tokens),
        tapped=tapped,
        micro_batches=math.ceil(rows / rows_at_once),
        logit_bytes=max((part.working_bytes(pair.vocabulary, width_of(student)) for part in token_losses), default=0),
        rollout_bytes=sampling,
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
        teacher_bytes=teacher_bytes,
        whole_teacher_bytes=whole_teacher_bytes,
        teacher_width=pair.teacher_width,
        target_width=pair.teacher_width if bridge is None else bridge.rank,
        bridge_bytes=0 if bridge is None else bridge.projector_bytes(*sizes),
        moment_bytes=bridge.moment_bytes(*sizes) if bridge is not None and fitted_here else 0,
    )


def _benchmark_bytes(
    data: RunData, engine: RolloutEngine, student: TransformerDecoder, teacher: TransformerDecoder, dtype: torch.dtype
) -> tuple[int, int]:
    """What the answers to benchmarks take: of the engine all the time, and while student or teacher samples."""
    assert data.benchmarks is not None
    size = {"rows": data.benchmarks.rows, "columns": data.benchmarks.request.longest_row}
    held, sampling = engine.memory_bytes(student, **size, dtype=dtype)
    if (own := data.teacher_benchmarks) is not None:
        by_teacher = sampling_bytes(teacher, rows=own.rows, columns=own.request.longest_row, dtype=dtype)
        sampling = max(sampling, by_teacher)
    return held, sampling


def _teacher_bytes(
    s: OPRDSettings,
    pair: ModelPair,
    data: RunData,
    loss: Composite,
    bridge: BridgePlan | None,
    teacher: TransformerDecoder,
) -> tuple[int, int]:
    """The teacher's bytes in its placement, and while it is gathered for its evaluation; 0 if it never is gathered."""
    if s.teacher_is_student:
        return 0, 0
    keeps_head = bool(loss.token_losses) or pair.diagnosed
    top = (None if keeps_head else pair.teacher_top(bridge)) or pair.teacher_depth
    plan = TeacherPlan(s.teacher_placement, s.teacher_quantization, data.ranks)
    kept = plan.memory_bytes(teacher, top=top, keeps_head=keeps_head, dtype=s.torch_dtype)
    is_measured = (s.evaluate_teacher and data.teacher_accuracy is not None) or data.teacher_benchmarks is not None
    if not plan.sharded or not is_measured:
        return kept, 0
    gathered = replace(plan, placement="replicated")
    return kept, gathered.memory_bytes(teacher, top=top, keeps_head=keeps_head, dtype=s.torch_dtype)


def _is_evaluated(data: RunData) -> bool:
    return any(found is not None for found in (data.task_accuracy, data.reference_perplexity, data.benchmarks))


def _describe(model: TransformerDecoder) -> str:
    """The size and shape of a model on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = f"{len(model.layers)} blocks of width {width_of(model)}, vocabulary {model.tok_embeddings.num_embeddings:,}"
    return f"{_number(total)} parameters, {shape}" + (f"; {_number(trained)} of them train" if trained else "")


def _describe_teacher(model: TransformerDecoder, s: OPRDSettings) -> str:
    if s.teacher_is_student:
        return "the student itself, with its present weights"
    kind = "; loaded by transformers" if isinstance(model, DecodesItself) else ""
    kind += f"; follows the student, keeping {s.teacher_decay} a step" if s.teacher_decay is not None else ""
    return _describe(model.requires_grad_(False)) + kind


def _number(count: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return str(count)


def _differing_conventions(pair: ModelPair) -> list[tuple[str, str]]:
    """EOS, padding and chat template where the two model folders differ, one row each."""
    student, teacher = (conventions(folder_of(f)) for f in (pair.student_files, pair.teacher_files))
    if student is None or teacher is None:
        return []
    rows = []
    for name, own in student.items():
        if own != teacher[name] and name == "chat template":
            rows.append((name, "differs between student and teacher; prompts use the one of `tokenizer`"))
        elif own != teacher[name]:
            rows.append((name, f"{own} (student), {teacher[name]} (teacher); responses end as `tokenizer` says"))
    return rows


def _describe_batch(s: OPRDSettings, data: RunData, ranks: Ranks) -> list[tuple[str, str]]:
    responses = s.prompts_per_step * s.samples_per_prompt
    passes = s.max_steps * s.prompts_per_step / len(data.prompts)
    where = "one process" if ranks.world_size == 1 else f"{ranks.world_size} processes"
    return [
        ("batch", f"{s.prompts_per_step} prompts × {s.samples_per_prompt} = {responses} responses a step on {where}"),
        ("", f"at most {responses * s.max_new_tokens:,} response tokens a step"),
        ("steps", f"{s.max_steps:,}, {passes:,.2f} passes over {len(data.prompts):,} prompts"),
    ]


def _describe_benchmarks(
    data: RunData, engine: RolloutEngine, student: TransformerDecoder, teacher: TransformerDecoder, dtype: torch.dtype
) -> list[tuple[str, str]]:
    """The section `eval`: what is answered, how often, and the memory that it takes."""
    if (found := data.benchmarks) is None:
        return []
    k, every = found.request.samples_per_prompt, found.section.every_n_steps
    sets = ", ".join(f"{name} {size} × {k}" for name, size in found.problems.sizes.items())
    answers = sum(found.problems.sizes.values()) * k
    _, sampling = _benchmark_bytes(data, engine, student, teacher, dtype)
    most = f"{answers:,} answers of at most {found.request.max_new_tokens:,} tokens each time"
    return [
        ("benchmarks", f"{sets}, every {every} steps{'; once by the teacher' if data.teacher_benchmarks else ''}"),
        ("", f"{most}; sampling {found.rows} at once takes {as_size(sampling)}"),
    ]


def _describe_memory(memory: Memory, ranks: Ranks) -> list[tuple[str, str]]:
    always = {"student": memory.student, "optimizer": memory.optimizer, "teacher": memory.teacher}
    always |= {"sampling engine": memory.engine} if memory.engine else {}
    listed = ", ".join(f"{name} {as_size(size)}" for name, size in always.items())
    free = _free_bytes(ranks)
    rows = [
        (
            "memory",
            f"{as_size(memory.peak)} a process" + ("" if free is None else f" of {as_size(free)} free"),
        ),
        (
            "",
            f"{listed}; besides sampling {as_size(memory.sampling)}, or training {as_size(memory.training)}",
        ),
        ("CPU memory", f"{as_size(memory.cpu)} a process while a checkpoint is written"),
    ]
    if free is not None and memory.peak > free:
        rows.append(("", "This will not fit; docs/oprd_distributed.md lists what to change, cheapest first."))
    return rows


def _describe_bridge(bridge: BridgePlan | None, pair: ModelPair, data: RunData) -> list[tuple[str, str]]:
    if bridge is None:
        return []
    pairs = f"{len(pair.layers)} layer pairs, {pair.width} against {pair.teacher_width} wide"
    if bridge.file is not None:
        return [("bridge", f"{pairs}, from {bridge.file}")]
    where, size = (
        bridge.moments_device or data.ranks.device.type,
        as_size(bridge.moment_bytes(*_bridge_sizes(pair))),
    )
    rows = [
        ("bridge", f"{pairs}, rank {bridge.rank}, basis {bridge.basis}, fitted on {bridge.prompts:,} prompts"),
        ("", f"moments {size} in {bridge.moments_dtype} on {where}, while it is fitted"),
    ]
    if bridge.prompts + bridge.held_out_prompts > len(data.prompts):
        told = f"There are only {len(data.prompts):,} prompts: they repeat, and what is called held out was fitted too."
        rows.append(("", f"{told} Lower bridge.prompts."))
    return rows


def _bridge_sizes(pair: ModelPair) -> tuple[int, int, int]:
    return len(pair.layers), pair.width, pair.teacher_width


def _free_bytes(ranks: Ranks) -> int | None:
    """Bytes that this rank may take on its device: a GPU's free memory, or this rank's share of a CPU's."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except (OSError, ValueError):
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    return int(lines["MemAvailable"].split()[0]) * 1024 // here
