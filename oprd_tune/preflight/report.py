"""Report what a run will do and need, before any weights are read."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config import OPRDSettings, Parts
from oprd_tune.data.tokenizer_files import conventions
from oprd_tune.errors import NothingLeftToDo
from oprd_tune.losses.composite import Composite, as_composite
from oprd_tune.losses.hidden_mse import HiddenStateLoss
from oprd_tune.losses.masking import StateSelector
from oprd_tune.modeling.bridge import BridgePlan
from oprd_tune.modeling.freezing import freeze
from oprd_tune.modeling.sharding import choose_sharding
from oprd_tune.modeling.weights import build_on_meta, width_of
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.memory import Memory, Plan, predict_memory
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.preflight.trial import try_optimizer
from oprd_tune.protocols import DecodesItself, RolloutEngine
from oprd_tune.ranks import Ranks
from oprd_tune.teacher import TeacherPlan
from oprd_tune.torchtune_compat import folder_of

_GIB = 2**30


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
        ConfigError: if the optimizer or the schedule fails a trial.
        NothingLeftToDo: if the setting `preflight` is `only`.
    """
    s, ranks, loss = settings, data.ranks, as_composite(loss)
    student, teacher = build_on_meta(parts.model), build_on_meta(parts.teacher_model)
    top = pair.depth if loss.token_losses else pair.layers[-1].student
    freeze(student, top=top, trains_head=bool(loss.token_losses), freeze_embedding=s.freeze_embedding)
    plan = _plan(parts, s, pair, data, loss, engine, bridge, student=student, teacher=teacher)
    memory = predict_memory(student, parts.model, plan)
    if s.preflight:
        rows = [
            ("student", _describe(student)),
            ("teacher", _describe(teacher.requires_grad_(False)) + _by_transformers(teacher)),
            *_differing_conventions(pair),
            *_describe_batch(s, data, ranks),
            *_describe_bridge(bridge, pair, data),
            *_describe_memory(memory, ranks),
            ("disk", _describe_disk(s, student, memory, ranks)),
        ]
        wide = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"  {name:<{wide}}  {text}" for name, text in rows) + "\n")
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
    ranks, token_losses = data.ranks, list(loss.token_losses.values())
    longest = s.max_prompt_tokens + s.max_new_tokens
    rows = math.ceil(s.prompts_per_step / ranks.world_size) * s.samples_per_prompt
    rows_at_once = min(rows, max(1, s.tokens_per_micro_batch // longest))
    tapped = len(pair.layers) if loss.hidden is not None else 0
    most_states = StateSelector(s.positions, s.positions_k, s.anchor).most(s.max_new_tokens)
    held, sampling = engine.memory_bytes(student, rows=rows, columns=longest, dtype=s.torch_dtype)
    if data.task_accuracy is not None:
        sampling = max(sampling, data.task_accuracy.memory_bytes(student, s.torch_dtype))
    sizes = _bridge_sizes(pair)
    fitted_here = bridge is not None and torch.device(bridge.moments_device or ranks.device).type == ranks.device.type
    teacher_bytes, whole_teacher_bytes = _teacher_bytes(s, pair, data, loss, bridge, teacher)
    return Plan(
        settings=s,
        ranks=ranks,
        sharded=choose_sharding(s, ranks) is not None,
        trains_head=bool(token_losses),
        rows=rows_at_once,
        row_tokens=longest,
        selected=rows_at_once * (most_states if tapped else s.max_new_tokens),
        tapped=tapped + bool(token_losses),
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
        ),
        teacher_bytes=teacher_bytes,
        whole_teacher_bytes=whole_teacher_bytes,
        teacher_width=pair.teacher_width,
        target_width=pair.teacher_width if bridge is None else bridge.rank,
        bridge_bytes=0 if bridge is None else bridge.projector_bytes(*sizes),
        moment_bytes=bridge.moment_bytes(*sizes) if bridge is not None and fitted_here else 0,
    )


def _teacher_bytes(
    s: OPRDSettings,
    pair: ModelPair,
    data: RunData,
    loss: Composite,
    bridge: BridgePlan | None,
    teacher: TransformerDecoder,
) -> tuple[int, int]:
    """The teacher's bytes in its placement, and while it is gathered for its evaluation; 0 if it never is gathered."""
    keeps_head = bool(loss.token_losses) or pair.diagnosed
    top = (None if keeps_head else pair.teacher_top(bridge)) or pair.teacher_depth
    plan = TeacherPlan(s.teacher_placement, s.teacher_quantization, data.ranks)
    kept = plan.memory_bytes(teacher, top=top, keeps_head=keeps_head, dtype=s.torch_dtype)
    if not plan.sharded or not s.evaluate_teacher or data.teacher_accuracy is None:
        return kept, 0
    gathered = replace(plan, placement="replicated")
    return kept, gathered.memory_bytes(teacher, top=top, keeps_head=keeps_head, dtype=s.torch_dtype)


def _describe(model: TransformerDecoder) -> str:
    """The size and shape of a model on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = f"{len(model.layers)} blocks of width {width_of(model)}, vocabulary {model.tok_embeddings.num_embeddings:,}"
    return f"{_number(total)} parameters, {shape}" + (f"; {_number(trained)} of them train" if trained else "")


def _by_transformers(model: TransformerDecoder) -> str:
    return "; loaded by transformers" if isinstance(model, DecodesItself) else ""


def _number(count: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return str(count)


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB // 10 else f"{count / 2**20:.1f} MiB"


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


def _describe_memory(memory: Memory, ranks: Ranks) -> list[tuple[str, str]]:
    always = {"student": memory.student, "optimizer": memory.optimizer, "teacher": memory.teacher}
    always |= {"sampling engine": memory.engine} if memory.engine else {}
    listed = ", ".join(f"{name} {_size(size)}" for name, size in always.items())
    free = _free_bytes(ranks)
    rows = [
        ("memory", f"{_size(memory.peak)} a process" + ("" if free is None else f" of {_size(free)} free")),
        ("", f"{listed}; besides sampling {_size(memory.sampling)}, or training {_size(memory.training)}"),
        ("CPU memory", f"{_size(memory.cpu)} a process while a checkpoint is written"),
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
    where, size = bridge.moments_device or data.ranks.device.type, _size(bridge.moment_bytes(*_bridge_sizes(pair)))
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


def _describe_disk(s: OPRDSettings, student: TransformerDecoder, memory: Memory, ranks: Ranks) -> str:
    checkpoint = memory.checkpoint * ranks.world_size
    export = sum(p.numel() for p in student.parameters()) * s.torch_dtype.itemsize
    # One more checkpoint while a new one is written; `final`, `best`, and the old `best` until it is replaced.
    needed = checkpoint * (s.keep_checkpoints + 1) + 3 * export
    free = shutil.disk_usage(s.output_dir).free
    text = f"up to {_size(needed)} of {_size(free)} free; a checkpoint takes {_size(checkpoint)}"
    return text + ("" if needed < free else ". This will not fit: lower keep_checkpoints, or give another output_dir")
