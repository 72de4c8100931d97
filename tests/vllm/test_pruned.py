"""vLLM loads pruned students as they lie there."""

import json

import pytest
import torch

from oprd_tune.pruning.pruner import prune
from oprd_tune.pruning.request import Request, check_request, read_source
from tests.distributed.spawn import run_ranks
from tests.modeling.test_families import load
from tests.vllm.students import PROMPTS, write_for_vllm
from tests.vllm.test_exports import NAMES, greedy_tokens

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.long]


def sample(rank, folder):
    """Both engines' tokens for each pruned student."""
    results = {}
    for name in NAMES:
        write_for_vllm(folder / name, name)
        source, request = read_source(folder / name), Request((2,), width=64, heads=2, feed_forward=128)
        check_request(request, source)
        small, cpu = folder / f"{name} small", torch.device("cpu")
        prune(source, request, PROMPTS.tokens, small, dtype=torch.float32, device=cpu)
        results[name] = greedy_tokens(small, load(small))
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    run_ranks(sample, 1, folder, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_it_samples_as_the_native_engine_does(results, name):
    found, wanted = results[name]
    assert found == wanted
    assert len({tuple(tokens) for tokens in wanted}) > 1
