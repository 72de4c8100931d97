"""Our metrics: their units, their reductions and their meanings. A recipe or a loss may log any other name too.

`python -m oprd_tune.metrics.names docs/metrics.md` writes the table of that page.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """One metric. In its name, `<…>` stands for a number or a word."""

    name: str
    unit: str
    reduction: str
    meaning: str


# A row is `name | unit | reduction | meaning`. A line that is indented continues the row above it.
_TABLE = """
loss/total | 1 | mean over the step's selected tokens, or responses (`average_over`) |
    The objective: what the gradient belongs to. Of sampled objectives a surrogate: read `token/kl` instead.
loss/<part> | 1 | mean over the part's tokens or responses | A part of a composite, times its weight; they add up.
token/kl | nats/token | mean over the step's response tokens |
    KL(p‖q), student to teacher, exact. Not with `TopKReverseKL` and `TopKMixedKL`.
token/support_kl | nats/token | mean over the step's response tokens |
    KL(p̄‖q̄) on the support 𝒮: what `TopKReverseKL` minimises.
token/student_mass | 1 | mean over the step's response tokens |
    P(𝒮), the student's mass on the support, where its head runs.
token/teacher_mass | 1 | mean over the step's response tokens | Q(𝒮), where the teacher's head runs anyway.
token/logprob_gap | nats | mean over the step's response tokens |
    |log p − log μ| of the sampled tokens, trainer against sampler: rounding, or worse. With sampled objectives.
token/importance_ratio | 1 | mean over the step's response tokens |
    min(p/μ, cap): trainer against sampler; 1 if they agree.
token/reference_nll | nats/token | mean over tokens of reference answers |
    −log p of the token, where `ReferenceCrossEntropy` is a part; beside other token losses `token/<part>/…`.
token/clipped_share | 1 | mean over the step's response tokens |
    Share of positions where `entry_clip` has limited at least one token's share of the divergence.
diagnostics/kl | nats/token | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    KL(p‖q), student to teacher.
diagnostics/student_mass | 1 | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    P(𝒮) of the student's top-k.
diagnostics/teacher_mass | 1 | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    Q(𝒮): what the teacher gives the student's top-k.
diagnostics/top_k_overlap | 1 | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    Share of the student's top-k that is in the teacher's.
diagnostics/student_entropy | nats/token | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    Entropy of p.
diagnostics/teacher_entropy | nats/token | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    Entropy of q.
diagnostics/entropy_gap | nats/token | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    Entropy of q minus entropy of p.
diagnostics/gradient_square | 1 | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    ‖∇KL‖² with respect to a token's logits: the signal.
diagnostics/variance_<estimate> | 1 | mean over a subsample of response tokens, every `diagnostics_every_n_steps` |
    Variance, over the next token, of that gradient's estimate by the sampled token (`sampled`) and with vOPD's
    control variate (`vopd`), exact, whichever loss trains: the noise. Full and top-k KL and OPRD have none.
layers/mse_<layer> | 1 | mean over the step's selected tokens |
    ‖h − g‖²/D at a student layer, whatever the normalisation; over a bridge of rank R ‖z_S − z_T‖²/R.
layers/cosine_<layer> | 1 | mean over the step's selected tokens |
    Cosine of student and teacher state, or of z_S and z_T, at a student layer.
positions/cosine_quarter_<n> | 1 | mean over layers and selected tokens |
    Cosine within the first to fourth quarter of a response: where along it the student still differs.
rollout/response_tokens | tokens | mean over responses | Length of a response, EOS included.
rollout/truncated_share | 1 | mean over responses | Share of responses cut at `max_new_tokens`.
rollout/entropy | nats/token | mean over response tokens |
    Entropy of the student, estimated as the mean of −log p of what it sampled; no head runs for it.
rollout/distinct_4grams | 1 | mean over up to 16 responses of each rank |
    Share of a response's 4-grams that differ from each other; 1 without repetition.
rollout/reference_share | 1 | mean over responses |
    Share of responses that are reference answers (`reference_share`). Other metrics of `rollout` leave them out.
rollout/reward | 1 | mean over sampled responses | The grader's verdict, where `TaskReward` is a part.
rollout/matched_share | 1 | mean over the step's response tokens |
    Share of tokens that end where one of the teacher's ends too, for a teacher with a tokenizer of its own.
rollout/logprob_gap | nats/token | mean over up to 128 sampled tokens of each rank |
    Absolute difference of the sampler's and the trainer's log p, at each rollout of an engine with weights of its
    own: the proof that it has this step's. About 1e-5 or less in fp32, below 1e-2 in bf16.
rollout/logprob_gap_max | nats | maximum over those tokens, over ranks | The same at the worst token.
rollout/proof_seconds | seconds | of the step |
    What that comparison took, a part of `time/rollout`, or with `rollout.ahead` of `time/optimizer`.
head/drift | 1 | over up to 1,024 evenly spaced rows |
    ‖W − W₀‖/‖W₀‖ of an embedding that is also the LM head: representation matching moves it unseen.
optimizer/grad_norm | 1 | over all parameters | Gradient norm before clipping.
optimizer/lr | 1 | last | Learning rate of the step.
optimizer/skipped_steps | steps | sum since the start | Steps without update: nothing selected, or not finite.
time/<phase> | seconds | sum over the step |
    Time of rollout, teacher, student (forward and backward), optimizer, sync, and of the diagnosis in runs without a
    token loss, every `diagnostics_every_n_steps`; with `rollout.ahead` of the wait for responses instead of
    rollout. time/step is the sum. On CUDA by the device's own clock.
speed/rollout | tokens/s | step | Sampled tokens per second of rollout.
speed/teacher | tokens/s | step | Prompt and response tokens per second of the teacher's forward.
speed/student | tokens/s | step | Prompt and response tokens per second of forward and backward.
speed/step | tokens/s | step | Response tokens per second of the whole step.
teacher/quantization_error_<layer> | 1 | over the tokens of a few prompts, once at the start |
    ‖g_quantised − g‖ / ‖g‖ of the teacher's hidden states, errors of the layers below included.
memory/peak | GiB | maximum since the start, over ranks | On CUDA what tensors took, on a CPU the process's peak.
eval/accuracy | 1 | mean over held-out samples | Share of right answers, sampled at temperature 1.
eval/teacher_accuracy | 1 | mean over held-out samples | The same of the teacher, measured once.
eval/gap_closed | 1 | last | (student − student before) / (teacher − student before), in accuracy.
eval/<set>/avg_at_k | 1 | mean over the benchmark's problems |
    Avg@k of the section `eval`: the share of right answers among the k sampled to a problem.
eval/<set>/best_at_k | 1 | mean over the benchmark's problems | Share of problems with a right answer among the k.
eval/<set>/tokens | tokens | mean over the benchmark's answers | Length of an answer, EOS included.
eval/<set>/truncated_share | 1 | mean over the benchmark's answers | Share of answers cut at `eval.max_new_tokens`.
eval/<set>/teacher_avg_at_k | 1 | mean over the benchmark's problems | Avg@k of the teacher, measured once.
teachers/<name>/loss | 1 | as `loss/total` |
    What of `loss/total` comes from the tokens that this teacher reads; they add up.
teachers/<name>/<metric> | as the metric | over what this teacher reads |
    With several teachers: any metric of `token`, `layers`, `positions`, `rollout`, `diagnostics`, `teacher`, and
    `eval/accuracy` and `eval/teacher_accuracy` on the held-out prompts that this teacher reads.
eval/perplexity | 1 | over held-out answer tokens | exp of the mean −log p of the reference answers.
"""
METRICS = [Metric(*row.split(" | ", 3)) for row in re.sub(r"\n +", " ", _TABLE).strip().splitlines()]
# If a composite has several token losses, the metrics of each are called token/<part>/….
_NAMES = [re.sub(r"<\w+>", r"\\w+", m.name.replace("<metric>", r"[\w/]+")) for m in METRICS]
_PATTERNS = [re.compile(name.replace("token/", r"token/(\w+/)?") + r"\Z") for name in _NAMES]
_HEAD = "| name | unit | reduction | meaning |\n|---|---|---|---|\n"


def is_described(name: str) -> bool:
    """Whether a metric is one of ours."""
    return any(pattern.match(name) for pattern in _PATTERNS)


def as_markdown() -> str:
    """The table of docs/metrics.md."""
    return _HEAD + "".join(f"| `{m.name}` | {m.unit} | {m.reduction} | {m.meaning} |\n" for m in METRICS)


def write_page(page: Path) -> None:
    """Replace the table of a page."""
    before, _, rest = page.read_text().partition(_HEAD)
    after = rest.partition("\n\n")[2]
    page.write_text(before + as_markdown() + ("\n" + after if after else ""))


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
