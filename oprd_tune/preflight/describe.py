"""What preflight prints: models, batch, benchmarks, bridges and memory, as rows of a table."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder

from oprd_tune.config import ONLY_TEACHER, OPRDSettings
from oprd_tune.data.tokenizer_files import conventions
from oprd_tune.modeling.weights import build_on_meta, width_of
from oprd_tune.preflight.data import RunData
from oprd_tune.preflight.memory import Memory, as_size
from oprd_tune.preflight.pair import ModelPair, ModelPairs
from oprd_tune.protocols import DecodesItself
from oprd_tune.ranks import Ranks
from oprd_tune.torchtune_compat import folder_of

Row = tuple[str, str]


def rows_of(
    student: TransformerDecoder, s: OPRDSettings, pairs: ModelPairs, data: RunData, memory: Memory, benchmarks: int
) -> list[Row]:
    """The rows of the table. `benchmarks` is the number of bytes that their answers take."""
    return [
        ("student", _describe(student)),
        *_describe_teachers(pairs, data),
        *_differing_conventions(pairs),
        *_describe_batch(s, data, data.ranks),
        *_describe_benchmarks(data, benchmarks),
        *(row for pair in pairs for row in _describe_bridge(pair, data)),
        *_describe_memory(memory, data.ranks),
    ]


def _describe(model: TransformerDecoder) -> str:
    """The size and shape of a model on the meta device."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = f"{len(model.layers)} blocks of width {width_of(model)}, vocabulary {model.tok_embeddings.num_embeddings:,}"
    return f"{_number(total)} parameters, {shape}" + (f"; {_number(trained)} of them train" if trained else "")


def _describe_teachers(pairs: ModelPairs, data: RunData) -> list[Row]:
    """A row for each teacher."""
    rows = []
    for pair in pairs:
        model = build_on_meta(pair.parts.teacher_model)
        reads = "" if pair.name == ONLY_TEACHER else f"; reads {len(data.teachers[pair.name].prompts):,} prompts"
        rows.append((_label("teacher", pair), _describe_teacher(model, pair.settings) + reads))
    return rows


def _label(what: str, pair: ModelPair) -> str:
    return what if pair.name == ONLY_TEACHER else f"{what} {pair.name}"


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


def _differing_conventions(pairs: ModelPairs) -> list[Row]:
    """EOS, padding and chat template where a teacher's folder differs from the student's, one row each."""
    rows = []
    for pair in pairs:
        student, teacher = (conventions(folder_of(f)) for f in (pair.student_files, pair.teacher_files))
        whose = "teacher" if pair.name == ONLY_TEACHER else f"teacher {pair.name}"
        if student is None or teacher is None:
            continue
        for name, own in student.items():
            if own != teacher[name] and name == "chat template":
                rows.append((name, f"differs between student and {whose}; prompts use the one of `tokenizer`"))
            elif own != teacher[name]:
                rows.append((name, f"{own} (student), {teacher[name]} ({whose}); responses end as `tokenizer` says"))
    return rows


def _describe_batch(s: OPRDSettings, data: RunData, ranks: Ranks) -> list[Row]:
    responses = s.prompts_per_step * s.samples_per_prompt
    passes = s.max_steps * s.prompts_per_step / len(data.prompts)
    where = "one process" if ranks.world_size == 1 else f"{ranks.world_size} processes"
    return [
        ("batch", f"{s.prompts_per_step} prompts × {s.samples_per_prompt} = {responses} responses a step on {where}"),
        ("", f"at most {responses * s.max_new_tokens:,} response tokens a step"),
        ("steps", f"{s.max_steps:,}, {passes:,.2f} passes over {len(data.prompts):,} prompts"),
    ]


def _describe_benchmarks(data: RunData, sampling: int) -> list[Row]:
    """The section `eval`: what is answered, how often, and the memory that it takes."""
    if (found := data.benchmarks) is None:
        return []
    k, every = found.request.samples_per_prompt, found.section.every_n_steps
    sets = ", ".join(f"{name} {size} × {k}" for name, size in found.problems.sizes.items())
    answers = sum(found.problems.sizes.values()) * k
    most = f"{answers:,} answers of at most {found.request.max_new_tokens:,} tokens each time"
    return [
        ("benchmarks", f"{sets}, every {every} steps{'; once by the teacher' if data.teacher_benchmarks else ''}"),
        ("", f"{most}; sampling {found.rows} at once takes {as_size(sampling)}"),
    ]


def _describe_memory(memory: Memory, ranks: Ranks) -> list[Row]:
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


def _describe_bridge(pair: ModelPair, data: RunData) -> list[Row]:
    bridge, prompts = pair.bridge, data.teachers[pair.name].prompts
    if bridge is None:
        return []
    pairs = f"{len(pair.layers)} layer pairs, {pair.width} against {pair.teacher_width} wide"
    if bridge.file is not None:
        return [(_label("bridge", pair), f"{pairs}, from {bridge.file}")]
    where, size = (
        bridge.moments_device or data.ranks.device.type,
        as_size(bridge.moment_bytes(*pair.bridge_sizes)),
    )
    rows = [
        (
            _label("bridge", pair),
            f"{pairs}, rank {bridge.rank}, basis {bridge.basis}, fitted on {bridge.prompts:,} prompts",
        ),
        ("", f"moments {size} in {bridge.moments_dtype} on {where}, while it is fitted"),
    ]
    if bridge.prompts + bridge.held_out_prompts > len(prompts):
        told = f"There are only {len(prompts):,} prompts: they repeat, and what is called held out was fitted too."
        rows.append(("", f"{told} Lower bridge.prompts."))
    return rows


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
