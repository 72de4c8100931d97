"""Dense token losses compiled, and the size of their chunks."""

import pytest
import torch
from torch._inductor import metrics as inductor

from oprd_tune.losses import (
    Composite,
    ControlVariateReverseKL,
    ForwardKL,
    FullReverseKL,
    GeneralisedJSD,
    HiddenStateMSE,
    PerTokenLoss,
    ReferenceCrossEntropy,
    SampledReverseKL,
    TailedTopKKL,
)
from oprd_tune.ranks import Ranks
from tests.losses.token_losses import Case

MAKERS = {
    "full": FullReverseKL,
    "forward, clipped": lambda **given: ForwardKL(entry_clip=0.1, **given),
    "JSD": GeneralisedJSD,
    "sampled": SampledReverseKL,
    "vOPD": ControlVariateReverseKL,
    "top-k with tail": lambda **given: TailedTopKKL(k=3, **given),
}


def found(loss, case, weighted):
    tokens = case.tokens
    if weighted:
        tokens = type(tokens)(**{**vars(tokens), "weight_T": torch.rand(len(tokens)) + 0.5})
    torch.manual_seed(1)
    stream = case.stream(loss, tokens)
    return [stream.total.detach(), *case.gradients(stream.total), *stream.metrics.reduce(Ranks()).values()]


@pytest.mark.parametrize("name", MAKERS)
def test_a_compiled_loss_gives_the_same_numbers(name):
    torch._dynamo.reset()
    inductor.reset()
    temperature = 0.7 if name in ("full", "JSD") else 1.0
    eager, fused = (MAKERS[name](student_temperature=temperature, chunk_tokens=4) for _ in range(2))
    fused.compile()
    for lengths in ((2, 7), (3, 11)):
        case = Case(lengths, dtype=torch.float32)
        for weighted in (False, True):
            torch.manual_seed(2)
            wanted = found(eager, case, weighted)
            torch.manual_seed(2)
            for got, expected in zip(found(fused, case, weighted), wanted, strict=True):
                torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-5)
    assert inductor.generated_kernel_count > 0


def test_what_a_user_wrote_and_hidden_states_are_compiled_as_before():
    own = PerTokenLoss(per_token=lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(-1))
    loss = Composite({"own": own, "sft": ReferenceCrossEntropy(), "oprd": HiddenStateMSE()})
    loss.compile()
    assert "scored" not in vars(own)
    assert "scored" in vars(loss.parts["sft"])


def test_chunks_grow_to_what_a_device_holds_unless_their_size_is_given():
    vocabulary, width = 1000, 16
    for room, wanted in ((0, 512), (3 * 1024 * 4000, 512), (3 * 2048 * 4000 + 128_000, 2048), (10**12, 4096)):
        loss = Composite({"full": FullReverseKL(), "given": FullReverseKL(chunk_tokens=64)})
        loss.fit(room, vocabulary, width)
        assert [part.at_once for part in loss.parts.values()] == [wanted, 64]
        assert loss.parts["full"].working_bytes(vocabulary, width) == 3 * wanted * 4000
