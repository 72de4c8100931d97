"""What a run is going to do and to need, told before any weights are read."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.components import Components
from oprd_tune.data.tokenizer import conventions
from oprd_tune.losses.composite import Composite
from oprd_tune.losses.hidden_mse import HiddenStateMSE
from oprd_tune.modeling.bridge import BridgePlan
from oprd_tune.modeling.load import Builder, build_on_meta, width_of
from oprd_tune.modeling.moments import PairMoments
from oprd_tune.ranks import Ranks
from oprd_tune.rollout.native import NativeEngine
from oprd_tune.settings import OPRDSettings
from oprd_tune.training.data import RunData
from oprd_tune.training.memory import Memory, Plan, optimizer_bytes, predict_memory
from oprd_tune.training.pair import ModelPair
from oprd_tune.training.student import freeze

_GIB = 2**30
_GLOO_COPIES = 2  # of a gradient that it averages, measured; NCCL makes none


def preflight(
    settings: OPRDSettings,
    make: Components,
    pair: ModelPair,
    data: RunData,
    loss: HiddenStateMSE | Composite,
    ranks: Ranks,
    *,
    bridge: BridgePlan | None = None,
    sharded: bool = False,
) -> Memory:
    """Print models, conventions, batch, memory and disk as a short table.

    Args:
        settings: the recipe's.
        make: constructs a component by its config key.
        pair: the models' files and layers.
        data: what the run reads.
        loss: decides which head and which states exist.
        bridge: makes them comparable; None without.
        ranks: the processes of the run.
        sharded: whether the student is spread over them.

    Returns:
        The prediction for one rank.
    """
    s = settings
    build: Builder = lambda: make("model")  # noqa: E731
    student, teacher = build_on_meta(build), build_on_meta(lambda: make("teacher_model"))
    token_losses = list(loss.token_losses.values()) if isinstance(loss, Composite) else []
    top = pair.depth if token_losses else pair.layers[-1].student
    teacher.requires_grad_(False)
    freeze(student, top=top, trains_head=bool(token_losses), freeze_embedding=s.freeze_embedding)
    plan = _plan(s, make, pair, data, loss, ranks, student, bridge, sharded=sharded)
    memory = predict_memory(student, teacher, build, plan)
    if s.preflight:
        rows = [
            ("student", _describe(student)),
            ("teacher", _describe(teacher)),
            *_differing_conventions(pair),
            *_describe_batch(s, data, ranks),
            *_describe_bridge(bridge, pair, ranks),
            *_describe_memory(memory, ranks, optimizer_known=plan.optimizer_bytes is not None),
            ("disk", _describe_disk(s, student, memory, ranks, plan.dtype)),
        ]
        wide = max(len(name) for name, _ in rows)
        print("\n" + "\n".join(f"  {name:<{wide}}  {text}" for name, text in rows) + "\n")
    return memory


def _plan(
    s: OPRDSettings,
    make: Components,
    pair: ModelPair,
    data: RunData,
    loss: HiddenStateMSE | Composite,
    ranks: Ranks,
    student: TransformerDecoder,
    bridge: BridgePlan | None,
    *,
    sharded: bool,
) -> Plan:
    token_losses = list(loss.token_losses.values()) if isinstance(loss, Composite) else []
    hidden = loss.hidden if isinstance(loss, Composite) else loss
    dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
    master = torch.float32 if getattr(s, "master_dtype", None) else dtype
    longest = s.max_prompt_tokens + s.max_new_tokens
    rows = math.ceil(s.prompts_per_step / ranks.world_size) * s.samples_per_prompt
    rows_at_once = min(rows, max(1, s.tokens_per_micro_batch // longest))
    chosen = {"last": 1, "first_k": s.positions_k, "last_k": s.positions_k}.get(s.positions, s.max_new_tokens)
    final = s.max_new_tokens if token_losses else 0
    tapped = len(pair.layers) if hidden is not None else 0
    whole_teacher = bool(token_losses) or (bridge is not None and bridge.needs_final_state)
    held, sampling = _engine_bytes(s, make, data, student, dtype, rows)
    selected = rows_at_once * (min(chosen, s.max_new_tokens) if tapped else final)
    return Plan(
        dtype=dtype,
        master_dtype=master,
        world_size=ranks.world_size,
        sharded=sharded,
        teacher_placement=s.teacher_placement,
        teacher_quantization=s.teacher_quantization,
        teacher_top=pair.teacher_depth if whole_teacher else max(layers.teacher for layers in pair.layers),
        keeps_teacher_head=bool(token_losses),
        trains_head=bool(token_losses),
        reshard_after_forward=bool(getattr(s, "fsdp_reshard_after_forward", True)),
        activation_checkpointing=int(s.activation_checkpointing),
        sync_every_micro_batch=getattr(s, "sync_every_micro_batch", True),
        rows=rows_at_once,
        row_tokens=longest,
        selected=selected,
        tapped=tapped + bool(token_losses),
        micro_batches=math.ceil(rows / rows_at_once),
        logit_bytes=max((part.working_bytes(pair.vocabulary, width_of(student)) for part in token_losses), default=0),
        rollout_bytes=sampling,
        engine_bytes=held,
        reduction_copies=_GLOO_COPIES if ranks.device.type == "cpu" and ranks.world_size > 1 else 0,
        optimizer_bytes=optimizer_bytes(lambda parameters: make("optimizer", parameters), master, ranks.device),
        cpu_offload=getattr(s, "fsdp_cpu_offload", False),
        evaluates_teacher=s.evaluate_teacher and data.task_accuracy is not None,
        target_width=pair.teacher_width if bridge is None else bridge.rank,
        bridge_bytes=_projector_bytes(bridge, pair),
        moment_bytes=0 if _moments_elsewhere(bridge, ranks) else _moment_bytes(bridge, pair),
    )


def _engine_bytes(
    s: OPRDSettings, make: Components, data: RunData, student: TransformerDecoder, dtype: torch.dtype, rows: int
) -> tuple[int, int]:
    """What sampling holds all the time, and what it takes beside the student's weights while it lasts.

    In training that is the engine's own account, in an evaluation the native engine's.
    """
    held, sampling = 0, 0
    if account := getattr(make.type_of("rollout"), "memory_bytes", None):
        defaults = account.__kwdefaults__ or {}
        arguments = {key: make.argument("rollout", key, otherwise) for key, otherwise in defaults.items()}
        columns = s.max_prompt_tokens + s.max_new_tokens
        held, sampling = account(student, rows=rows, columns=columns, dtype=dtype, **arguments)
    if data.task_accuracy is not None:
        rows, columns = data.task_accuracy.rows_at_once, s.max_prompt_tokens + data.task_accuracy.max_new_tokens
        _, evaluating = NativeEngine.memory_bytes(student, rows=rows, columns=columns, dtype=dtype)
        sampling = max(sampling, evaluating)
    return held, sampling


def _describe(model: TransformerDecoder) -> str:
    """Size and shape of a model on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = f"{len(model.layers)} blocks of width {width_of(model)}, vocabulary {model.tok_embeddings.num_embeddings:,}"
    return f"{_number(total)} parameters, {shape}" + (f"; {_number(trained)} of them train" if trained else "")


def _number(count: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return str(count)


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB // 10 else f"{count / 2**20:.1f} MiB"


def _differing_conventions(pair: ModelPair) -> list[tuple[str, str]]:
    """Where the two folders' tokenizers end turns, pad or speak differently."""
    student, teacher = (conventions(Path(f._checkpoint_dir)) for f in (pair.student_files, pair.teacher_files))
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


def _describe_memory(memory: Memory, ranks: Ranks, *, optimizer_known: bool) -> list[tuple[str, str]]:
    always = {"student": memory.student, "optimizer": memory.optimizer, "teacher": memory.teacher}
    always |= {"sampling engine": memory.engine} if memory.engine else {}
    listed = ", ".join(f"{name} {_size(size)}" for name, size in always.items())
    free = _free_bytes(ranks)
    rows = [
        ("memory", f"{_size(memory.peak)} a process" + ("" if free is None else f" of {_size(free)} free")),
        ("", f"{listed}; besides sampling {_size(memory.sampling)}, or training {_size(memory.training)}"),
        ("CPU memory", f"{_size(memory.cpu)} a process while a checkpoint is written"),
    ]
    if not optimizer_known:
        rows.append(("", "The optimizer's state is not counted: it takes no trial step."))
    if free is not None and memory.peak > free:
        rows.append(("", "This will not fit; docs/oprd_distributed.md lists what to change, cheapest first."))
    return rows


def _projector_bytes(bridge: BridgePlan | None, pair: ModelPair) -> int:
    if bridge is None:
        return 0
    return len(pair.layers) * (bridge.rank + 1) * (pair.width + pair.teacher_width) * 4


def _moment_bytes(bridge: BridgePlan | None, pair: ModelPair) -> int:
    """What a fit takes at most: all moments, or all projectors at full rank beside the matrices of one solution."""
    if bridge is None or bridge.file is not None:
        return 0
    outcome = pair.teacher_width if bridge.needs_final_state else None
    return len(pair.layers) * PairMoments.bytes_of(pair.width, pair.teacher_width, outcome, bridge.dtype.itemsize)


def _moments_elsewhere(bridge: BridgePlan | None, ranks: Ranks) -> bool:
    where = bridge.moments_device if bridge is not None else None
    return where is not None and torch.device(where).type != ranks.device.type


def _describe_bridge(bridge: BridgePlan | None, pair: ModelPair, ranks: Ranks) -> list[tuple[str, str]]:
    if bridge is None:
        return []
    pairs = f"{len(pair.layers)} layer pairs, {pair.width} against {pair.teacher_width} wide"
    if bridge.file is not None:
        return [("bridge", f"{pairs}, from {bridge.file}")]
    where = bridge.moments_device or ranks.device.type
    return [
        ("bridge", f"{pairs}, rank {bridge.rank}, basis {bridge.basis}, fitted on {bridge.prompts:,} prompts"),
        ("", f"moments {_size(_moment_bytes(bridge, pair))} in {bridge.moments_dtype} on {where}, while it is fitted"),
    ]


def _free_bytes(ranks: Ranks) -> int | None:
    """What this rank may take of its device; of a CPU, its share."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except (OSError, ValueError):
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    return int(lines["MemAvailable"].split()[0]) * 1024 // here


def _describe_disk(
    s: OPRDSettings, student: TransformerDecoder, memory: Memory, ranks: Ranks, dtype: torch.dtype
) -> str:
    checkpoint = memory.checkpoint * ranks.world_size
    export = sum(p.numel() for p in student.parameters()) * dtype.itemsize
    needed = checkpoint * (s.keep_checkpoints + 1) + 3 * export  # one more while it is written; final, best, old best
    free = shutil.disk_usage(s.output_dir).free
    text = f"up to {_size(needed)} of {_size(free)} free; a checkpoint takes {_size(checkpoint)}"
    return text + ("" if needed < free else ". This will not fit: lower keep_checkpoints, or give another output_dir")
