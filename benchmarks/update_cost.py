"""What one update costs, by objective: peak memory above the resident state, and time.

    python benchmarks/update_cost.py --tokens 2048
    python benchmarks/update_cost.py --tokens 512 1024 2048 4096 --objectives bound oprd topk full
    python benchmarks/update_cost.py --compiled --repeats 3 --objectives bound oprd full --out FOLDER
    python benchmarks/update_cost.py --launches

An update is the teacher's forward, the student's forward and its backward, at the width and vocabulary of Qwen2.5-1.5B
with few layers and activation checkpointing. `ours` is this package; `plain` is the same objective as it is usually
written: logits of both models materialised in fp32 (for hidden states too, where they are dropped and all layers
stacked). `bound` runs both models without head and loss.

Resident, and so not counted: both models' parameters and the student's gradient buffers, allocated beforehand (and an
optimizer's state). Each case is a process of its own. Writes update_cost.json, a table and a plot. `--launches` counts
instead what an update launches on the device beside its bound, and how often it waits, in update_launches.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calls import count_calls

RESULTS = Path(__file__).parent / "results"
VOCABULARY, WIDTH, PROMPT, LONGEST_RESPONSE, TOP_K = 151_936, 1536, 16, 1024, 16
WARM_UP_TOKENS = 32
OBJECTIVES = ("bound", "oprd", "sampled", "topk", "full", "vopd")
FORMULATIONS = ("ours", "plain")
COMPILED = "compiled"  # ours, with compiled blocks and losses
LOGITS_COPIES = {"oprd": 3, "sampled": 6, "topk": 6, "full": 8, "vopd": 8}  # [T, V] in fp32, to skip what cannot fit
MIB = 2**20


class Case:
    """Two random models, and rows of a short prompt and a response that fills the rest."""

    def __init__(self, layers: int, device: Any, dtype: Any) -> None:
        import torch
        from torchtune import training
        from torchtune.modules import TransformerSelfAttentionLayer

        self.device, self.depth = device, layers
        torch.manual_seed(0)
        self.student, self.teacher = (self._model(layers, device, dtype) for _ in range(2))
        self.teacher.eval().requires_grad_(False)
        training.set_activation_checkpointing(self.student, auto_wrap_policy={TransformerSelfAttentionLayer})
        for parameter in self.student.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def fill(self, tokens: int) -> None:
        """Make rows with that many response tokens together."""
        import torch

        response = min(tokens, LONGEST_RESPONSE)
        if tokens % response:
            sys.exit(f"--tokens {tokens} must be a multiple of {response}")
        shape = (tokens // response, PROMPT + response)
        self.tokens_BS = torch.randint(0, VOCABULARY, shape, device=self.device)
        self.mask_BS = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.mask_BS[:, PROMPT:] = True
        for parameter in self.student.parameters():
            parameter.grad.zero_()

    @staticmethod
    def _model(layers: int, device: Any, dtype: Any) -> Any:
        import torch
        from torchtune.models.qwen2 import qwen2

        from oprd_tune.modeling.weights import build_on_meta

        def build() -> Any:
            return qwen2(
                vocab_size=VOCABULARY,
                num_layers=layers,
                num_heads=12,
                num_kv_heads=2,
                embed_dim=WIDTH,
                intermediate_dim=8960,
                max_seq_len=4096,
                rope_base=1_000_000.0,
                tie_word_embeddings=True,
            )

        model = build_on_meta(build)
        model = model.to(dtype).to_empty(device=device)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
        with device:
            for module in model.modules():
                if hasattr(module, "rope_init"):
                    module.rope_init()
        return model


def bound(case: Case) -> None:
    """Both models without head; the student's backward starts from its last state."""
    import torch

    from oprd_tune.modeling.taps import layer_taps

    def pass_on(layer: int, state_BSD: Any) -> Any:
        return state_BSD

    with torch.no_grad(), layer_taps(case.teacher, [case.depth], pass_on):
        case.teacher(case.tokens_BS)
    with layer_taps(case.student, [case.depth], pass_on):
        state_BSD = case.student(case.tokens_BS)
    state_BSD.backward(torch.ones_like(state_BSD))


def ours(case: Case, objective: str, *, compiled: bool = False) -> Callable[[], float]:
    """The update as the recipes do it, with `compile: true` or without."""
    from oprd_tune import losses
    from oprd_tune.losses.masking import select_states
    from oprd_tune.modeling.heads import Heads, LMHead
    from oprd_tune.modeling.taps import layer_taps
    from oprd_tune.selection import ResponseTokens
    from oprd_tune.teacher import FrozenTeacher
    from oprd_tune.training.gradients import backward
    from oprd_tune.types import LayerPair

    loss: Any = {
        "oprd": losses.HiddenStateMSE(),
        "sampled": losses.SampledReverseKL(),
        "topk": losses.TopKReverseKL(k=TOP_K),
        "full": losses.FullReverseKL(),
        "vopd": losses.ControlVariateReverseKL(),
    }[objective]
    if compiled:
        loss.compile()
    heads = Heads(LMHead(case.student), LMHead(case.teacher), VOCABULARY)
    layers = list(range(1, case.depth + 1)) if objective == "oprd" else []
    teacher = FrozenTeacher(case.teacher, [LayerPair(layer, layer) for layer in layers], final=objective != "oprd")

    def update() -> float:
        selection = select_states(case.mask_BS)
        sampled_T = case.tokens_BS.flatten()[case.mask_BS.flatten()]
        tokens = ResponseTokens(selection.index_T, sampled_T, sampled_T.float())
        if objective == "oprd":
            targets = teacher.targets(case.tokens_BS, selection.index_T)
            stream = loss.stream([LayerPair(layer, layer) for layer in layers], targets.states, selection)
        else:
            final_TC = teacher.targets(case.tokens_BS, selection.index_T, tokens.index_T).final_TC
            stream = loss.stream(heads, final_TC, tokens)
        with layer_taps(case.student, layers or [case.depth], stream):
            total = case.student(case.tokens_BS)
        backward(total, len(tokens))
        return total.item() / len(tokens)

    return update


def plain(case: Case, objective: str) -> Callable[[], float]:
    """The update with whole logits, or whole stacks of states."""
    import torch

    def log_probs(model: Any) -> Any:
        return model(case.tokens_BS)[:, PROMPT - 1 : -1].float().log_softmax(-1)

    def stacked_states(model: Any) -> Any:
        states: list[Any] = []
        blocks = [*model.layers[:-1], model.norm]
        hooks = [block.register_forward_hook(lambda module, inputs, out: states.append(out)) for block in blocks]
        model(case.tokens_BS)  # the logits are computed and dropped
        for hook in hooks:
            hook.remove()
        return torch.stack(states)[:, :, PROMPT - 1 : -1].float()

    def loss() -> Any:
        if objective == "oprd":
            with torch.no_grad():
                target = stacked_states(case.teacher)
            return (stacked_states(case.student) - target).square().mean()
        with torch.no_grad():
            log_q = log_probs(case.teacher)
        log_p = log_probs(case.student)
        if objective == "topk":
            ids = log_p.topk(TOP_K).indices
            log_p, log_q = log_p.gather(-1, ids).log_softmax(-1), log_q.gather(-1, ids).log_softmax(-1)
        if objective in ("topk", "full"):
            return (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        chosen_BT = case.tokens_BS[:, PROMPT:].unsqueeze(-1)
        reward = (log_q.gather(-1, chosen_BT) - log_p.gather(-1, chosen_BT)).detach()
        if objective == "vopd":
            with torch.no_grad():
                reward = reward + (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        return -(reward * log_p.gather(-1, chosen_BT)).mean()

    def update() -> float:
        value = loss()
        value.backward()
        return value.item()

    return update


def updating(case: Case, objective: str, formulation: str) -> Callable[[], float | None]:
    """A function that does one update."""
    if formulation == COMPILED:
        for block in case.student.layers:
            block.compile()
    if objective == "bound":
        return lambda: bound(case)
    if formulation == "plain":
        return plain(case, objective)
    return ours(case, objective, compiled=formulation == COMPILED)


class PeakMemory:
    """Bytes above what is resident at `start`: tensors on CUDA, the process on Linux."""

    def __init__(self, device: Any) -> None:
        self._cuda = device if device.type == "cuda" else None

    def start(self) -> None:
        """Forget earlier peaks."""
        import torch

        gc.collect()
        if self._cuda is not None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._resident = torch.cuda.memory_allocated()
            return
        if not (reset := Path("/proc/self/clear_refs")).exists():
            sys.exit("without CUDA this needs Linux: the process's peak is read from /proc")
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset.write_text("5")
        self._resident = self._status("VmRSS")

    def stop(self) -> int:
        """The peak since, above what was resident then."""
        import torch

        if self._cuda is not None:
            return torch.cuda.max_memory_allocated() - self._resident
        return self._status("VmHWM") - self._resident

    @staticmethod
    def _status(key: str) -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) * 1024


def measure(args: argparse.Namespace) -> None:
    """One case, in this process: print its row."""
    import torch

    device = torch.device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    objective, formulation = args.case
    case = Case(args.layers, device, dtype)
    update = updating(case, objective, formulation)
    memory = PeakMemory(device)
    case.fill(WARM_UP_TOKENS)
    update()
    peaks, seconds, loss = [], [], None
    for _ in range(args.repeats):
        torch.manual_seed(0)
        case.fill(args.tokens[0])
        memory.start()
        started = time.perf_counter()
        loss = update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        peaks.append(memory.stop())
    norm = torch.stack([parameter.grad.float().norm() for parameter in case.student.parameters()]).norm().item()
    row = {"objective": objective, "formulation": formulation, "tokens": args.tokens[0]}
    row |= {"delta_peak_bytes": int(statistics.median(peaks)), "seconds": statistics.median(seconds)}
    if objective == "oprd":  # a target or the gradient made of it, for every layer, until the backward pass comes there
        row["waiting_bytes"] = args.layers * args.tokens[0] * WIDTH * dtype.itemsize
    print(json.dumps(row | {"loss": loss, "grad_norm": norm}))


def fits(objective: str, formulation: str, tokens: int, args: argparse.Namespace) -> bool:
    """Whether a plain formulation has room for its logits; ours always has."""
    import torch

    if formulation != "plain" or objective == "bound":
        return True
    size = {"fp32": 4, "bf16": 2}[args.dtype]
    block = 2 * WIDTH * (WIDTH + 256) + 3 * WIDTH * 8960
    resident = 3 * size * (args.layers * block + VOCABULARY * WIDTH)
    needed = resident + LOGITS_COPIES[objective] * tokens * VOCABULARY * 4
    if args.device == "cuda":
        return needed < 0.9 * torch.cuda.mem_get_info()[1]
    available = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return needed < 0.9 * int(available.split()[1]) * 1024


def run_cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every length, objective and formulation, each in a fresh process."""
    rows = []
    for tokens in args.tokens:
        for objective in args.objectives:
            for formulation in (*FORMULATIONS, *([COMPILED] if args.compiled else [])):
                if objective == "bound" and formulation == "plain":
                    continue
                if not fits(objective, formulation, tokens, args):
                    print(f"{tokens} tokens, {objective}, {formulation}: its logits do not fit here", file=sys.stderr)
                    continue
                words = ["--case", objective, formulation, "--tokens", str(tokens), "--layers", str(args.layers)]
                words += ["--dtype", args.dtype, "--device", args.device, "--repeats", str(args.repeats)]
                # Freed memory goes back at once, so that the process's size follows its tensors.
                environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
                command = [sys.executable, __file__, *words]
                result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if result.returncode:
                    sys.exit(f"{' '.join(words)} ended with {result.returncode}\n{result.stderr}")
                rows.append(json.loads(result.stdout.splitlines()[-1]))
                shown = f"{rows[-1]['delta_peak_bytes'] / MIB:,.0f} MiB, {rows[-1]['seconds']:.1f} s"
                print(f"{tokens} tokens, {objective}, {formulation}: {shown}", file=sys.stderr)
    return rows


def as_table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Ratios first; a column of a length's own bound, OPRD and plain form."""
    by_case = {(r["tokens"], r["objective"], r["formulation"]): r for r in rows}
    lines = [
        "# What one update costs",
        "",
        f"{args.layers} layers of Qwen2.5-1.5B's width, vocabulary {VOCABULARY:,}, {args.dtype}, {args.device}; "
        f"median of {args.repeats}. Δpeak is above parameters and gradient buffers. "
        f"`python benchmarks/update_cost.py {' '.join(sys.argv[1:])}`",
        "",
        "| tokens | objective | Δpeak / plain | time / plain | Δpeak / OPRD | time / OPRD | time / bound "
        "| Δpeak, MiB | seconds | plain: Δpeak, MiB | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def ratio(row: dict[str, Any], key: tuple[int, str, str], what: str) -> str:
        return f"{row[what] / by_case[key][what]:.2f}" if key in by_case else "–"

    for row in rows:
        if row["formulation"] == "plain":
            continue
        tokens, name = row["tokens"], row["objective"]
        shown = f"{name}, compiled" if row["formulation"] == COMPILED else name
        keys = [(tokens, name, "plain"), (tokens, "oprd", "ours")]
        cells = [ratio(row, key, what) for key in keys for what in ("delta_peak_bytes", "seconds")]
        cells.append(ratio(row, (tokens, "bound", "ours"), "seconds"))
        cells += [f"{row['delta_peak_bytes'] / MIB:,.0f}", f"{row['seconds']:.2f}"]
        other = by_case.get(keys[0])
        cells += [f"{other['delta_peak_bytes'] / MIB:,.0f}", f"{other['seconds']:.2f}"] if other else ["–", "–"]
        lines.append(f"| {tokens} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Δpeak and time against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    for i, objective in enumerate(objectives):
        for formulation, style in (("ours", "-"), ("plain", ":")):
            chosen = [r for r in rows if (r["objective"], r["formulation"]) == (objective, formulation)]
            if not chosen:
                continue
            look = {"color": f"C{i}", "linestyle": style, "marker": "o", "markersize": 4}
            look["label"] = objective if objective == "bound" else f"{objective}, {formulation}"
            tokens = [r["tokens"] for r in chosen]
            memory.plot(tokens, [r["delta_peak_bytes"] / 2**30 for r in chosen], **look)
            speed.plot(tokens, [r["seconds"] for r in chosen], **look)
    memory.set(ylabel="peak above parameters and gradients, GiB")
    speed.set(ylabel="seconds an update")
    for axes in (memory, speed):
        axes.set(xlabel="response tokens of a microbatch", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)


def report_launches(args: argparse.Namespace) -> None:
    """Count each update's launches and waits, in this process."""
    import torch

    device, dtype = torch.device(args.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    forms = [("bound", "–"), *((objective, form) for objective in OBJECTIVES[1:] for form in FORMULATIONS)]
    counts = {}
    for objective, form in forms:
        case = Case(args.layers, device, dtype)
        case.fill(args.tokens[0])
        update = updating(case, objective, form)
        update()  # warms up
        counts[objective, form] = count_calls(update)
    least = counts["bound", "–"][0]
    what = "launches" if device.type == "cuda" else "operators, each of which a GPU would launch"
    lines = [
        f"# What an update launches, {args.device}",
        "",
        f"Both models' passes with {args.layers} layers, {args.tokens[0]} tokens; {what}. "
        f"`python benchmarks/update_cost.py {' '.join(sys.argv[1:])}`",
        "",
        "| objective | | launches | beside the bound's | of those, a layer | waits for a result |",
        "|---|---|---|---|---|---|",
    ]
    for (objective, form), (launches, waits) in counts.items():
        layer = f"{(launches - least) / args.layers:.1f}" if objective == "oprd" else "–"
        lines.append(f"| {objective} | {form} | {launches:,} | {launches - least:,} | {layer} | {waits} |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "update_launches.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="fp32 on a CPU, bf16 on CUDA unless given")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--launches", action="store_true", help="count launches instead of measuring")
    parser.add_argument("--compiled", action="store_true", help="also with compiled blocks and losses")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or {"cpu": "fp32", "cuda": "bf16"}[args.device]
    if args.case:
        measure(args)
        return
    if args.launches:
        report_launches(args)
        return
    rows = run_cases(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "update_cost.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = as_table(rows, args)
    (args.out / "update_cost.md").write_text(table)
    plot(rows, args.out / "update_cost.png")
    print(table)


if __name__ == "__main__":
    main()
