"""The student with its optimizer and schedule: what trains, what is recomputed, how it is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from oprd_tune.config import OPRDSettings, Parts, construct
from oprd_tune.metrics.step import Metrics
from oprd_tune.modeling.freezing import freeze
from oprd_tune.modeling.row_attention import takes_rows
from oprd_tune.modeling.sharding import Sharding, choose_sharding, one_if_it_fits, sync_gradients
from oprd_tune.modeling.weights import Builder, build_on_meta, load_weights
from oprd_tune.preflight.pair import ModelPair
from oprd_tune.protocols import Projections
from oprd_tune.ranks import Ranks
from oprd_tune.teacher.frozen import FrozenTeacher, TappedTeacher
from oprd_tune.teacher.self_teaching import MovingAverage
from oprd_tune.torchtune_compat import compile_backend
from oprd_tune.training.drift import TiedHeadDrift
from oprd_tune.training.gradients import FiniteGuard, backward, clip_gradients, split_alike
from oprd_tune.types import Rollout


class Student:
    """The student as it trains. The constructor loads the weights; see `load_student` for its arguments.

    Attributes:
        model: the model, sharded or whole.
        optimizer: holds the parameters that train.
        lr_scheduler: advances once a step; None keeps the rate constant.
        guard: refuses updates that are not finite.
        drift: measures how far a head that is tied to the embedding has moved.
        average: a teacher that follows the student, or None.
    """

    def __init__(
        self,
        parts: Parts,
        settings: OPRDSettings,
        files: FullModelHFCheckpointer,
        ranks: Ranks,
        *,
        top: int,
        trains_head: bool,
    ) -> None:
        s, sharding = settings, choose_sharding(settings, ranks)
        self.model = load_student(
            parts.model, files, s, top=top, trains_head=trains_head, device=ranks.device, sharding=sharding
        )
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer: Optimizer = parts.optimizer(self._trainable)
        self.lr_scheduler = construct(parts.lr_scheduler, self.optimizer, num_training_steps=s.max_steps)
        self.guard = FiniteGuard(s.max_nonfinite_steps)
        self.drift = TiedHeadDrift(self.model, ranks)
        self.average: MovingAverage | None = None
        self._ranks, self._settings, self._one_if_it_fits = ranks, s, one_if_it_fits(s, sharding)
        self._loss_P: Tensor | None = None
        self._loss_of: dict[str, Tensor] = {}  # by teacher, if there are several

    def taught_by(
        self, model: TransformerDecoder, pair: ModelPair, *, final: bool = False, bridge: Projections | None = None
    ) -> TappedTeacher:
        """The teacher with this model, which may be the student's own. See `FrozenTeacher` for the arguments.

        If its settings say so, the model, which then has the student's first weights, follows the student from here on.
        """
        if model is self.model:
            return TappedTeacher(model, pair.layers)
        if (decay := pair.settings.teacher_decay) is not None:
            self.average = MovingAverage(self.model, model, decay)  # while the teacher has its head
        return FrozenTeacher(model, pair.layers, final=final, bridge=bridge)

    def micro_batches(self, rollout: Rollout) -> list[Rollout]:
        """The microbatches of a step, equally many on every rank; see `split_alike` and `one_if_it_fits`.

        They are packed if the model can read them so.
        """
        budget, fits = self._settings.tokens_per_micro_batch, self._one_if_it_fits
        return split_alike(rollout, budget, self._ranks, one_if_it_fits=fits, packed=takes_rows(self.model))

    def backward(self, sum_P: Tensor, count_P: float | Tensor, *, last: bool, teacher: str | None = None) -> None:
        """Backpropagate one microbatch's share of the global mean, Σ over parts of sum / count.

        Args:
            sum_P: the microbatch's loss as a sum over tokens, or one sum for each part of the loss.
            count_P: N of the whole step, over all microbatches and ranks; one for each part.
            last: whether this is the step's last microbatch. Gradients are then averaged over processes.
            teacher: the name of the teacher that has read it, if there are several.
        """
        sync_gradients(self.model, self._settings.sync_every_micro_batch or last)
        backward(sum_P, count_P, world_size=self._ranks.world_size)
        share_P = sum_P.detach() / count_P
        self._loss_P = share_P if self._loss_P is None else self._loss_P + share_P
        if teacher is not None:
            self._loss_of[teacher] = self._loss_of.get(teacher, 0) + share_P.sum()

    def update(self, step: int, metrics: Metrics, part_names: Iterable[str] = ()) -> float | None:
        """Finish an optimizer step: clip the gradient, and update the parameters if loss and gradient are finite.

        Args:
            step: the number of the step, from 1, for messages.
            metrics: gets the loss, what of it comes from each part and from each teacher if there are several, and the
                gradient norm before clipping.
            part_names: the names of the parts whose sums `backward` got.

        Returns:
            The loss over all ranks; None if the student was not changed.

        Raises:
            FloatingPointError: if too many steps in a row were not finite.
        """
        assert self._loss_P is not None
        parts = self._ranks.total(self._loss_P.flatten().tolist())
        if self._loss_of:
            shares = self._ranks.total(torch.stack([*self._loss_of.values()]).tolist())
            for name, share in zip(self._loss_of, shares, strict=True):
                metrics.set(f"teachers/{name}/loss", share)
        self._loss_P, self._loss_of = None, {}
        loss = torch.tensor(parts, dtype=torch.float32).sum().item()
        grad_norm = clip_gradients(self._trainable, self._settings.clip_grad_norm)
        finite = self.guard.allows(step, loss=loss, grad_norm=grad_norm)
        if finite:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        metrics.set("loss/total", loss)
        if len(parts) > 1:
            for name, part in zip(part_names, parts, strict=True):
                metrics.set(f"loss/{name}", part)
        metrics.set("optimizer/grad_norm", grad_norm)
        return loss if finite else None

    def finish_step(self, metrics: Metrics) -> None:
        """Record the step's learning rate and the drift of a tied head, and advance the schedule. Every rank calls."""
        metrics.set("optimizer/lr", self.optimizer.param_groups[0]["lr"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if (drift := self.drift.measure(self.model)) is not None:
            metrics.set("head/drift", drift)


def load_student(
    build: Builder,
    files: FullModelHFCheckpointer,
    settings: OPRDSettings,
    *,
    top: int,
    trains_head: bool,
    device: torch.device,
    sharding: Sharding | None = None,
) -> TransformerDecoder:
    """Load a student's model, ready to train, and print what stays frozen.

    Args:
        build: builds the model. If it has LoRA or DoRA adapters, only the adapters train.
        settings: set precision, what is frozen, recomputed and compiled, and the seed of the adapters' first values.
        top: the highest layer that a loss reads, from 1.
        trains_head: whether a loss reaches the LM head. A tied head is the embedding and trains with it.
        sharding: spreads each block over ranks as soon as it is loaded; None leaves the model whole.
    """
    s, every = settings, settings.activation_checkpointing
    model = build_on_meta(build)
    if frozen := freeze(model, top=top, trains_head=trains_head, freeze_embedding=s.freeze_embedding):
        print(frozen)

    def prepare(number: int, block: nn.Module) -> nn.Module:
        if s.compile:
            block.compile(backend=compile_backend())
        if every and number % every == 0:
            has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in block.modules())
            block = checkpoint_wrapper(block, preserve_rng_state=has_dropout)
        if sharding is not None:
            sharding.block(block)
        return block

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(s.seed)
        precision = {"dtype": s.torch_dtype, "trained_dtype": s.torch_master_dtype}
        load_weights(model, files, device=device, on_block=prepare, **precision)
    if sharding is not None:
        sharding.rest(model, gathered_head=trains_head)
    return model.train()
