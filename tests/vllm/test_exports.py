"""vLLM loads exported students as they lie there."""

import json
import os

import pytest
import torch

from oprd_tune.modeling import hugging_face_checkpointer
from oprd_tune.run.export import export_model
from tests.distributed.spawn import run_ranks
from tests.modeling.test_families import load
from tests.vllm.students import PROMPTS, move, native, write_for_vllm

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
NAMES = ("Qwen2", "Qwen3", "Llama 3.2", "Mistral")
LENGTH = 8


def greedy_tokens(folder, model):
    """Greedy tokens from a folder by vLLM, and from a model by the native engine."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams

    options = SamplingParams(temperature=0, max_tokens=LENGTH, stop_token_ids=[1], detokenize=False)
    arguments = {"dtype": "float32", "max_model_len": 24, "skip_tokenizer_init": True, "enforce_eager": True}
    engine = LLM(str(folder), generation_config="vllm", **arguments)
    found = engine.generate([{"prompt_token_ids": list(tokens)} for tokens in PROMPTS.tokens], options)
    wanted = native(model, temperature=0).sample(PROMPTS)
    rows = zip(wanted.tokens_BS, wanted.response_mask_BS, strict=True)
    own = [tokens_S[mask_S].tolist() for tokens_S, mask_S in rows]
    return [list(one.outputs[0].token_ids) for one in found], own


def sample(rank, folder):
    """Both engines' tokens for each export."""
    results = {}
    for name in NAMES:
        source = folder / name
        write_for_vllm(source, name)
        model = load(source)
        move(model, "", by=0.02)  # what is exported is not what was loaded

        def make_checkpointer(output_dir, source=source):
            return hugging_face_checkpointer(str(source), output_dir)

        target = export_model(model.state_dict(), model, make_checkpointer, folder / "final", dtype=torch.float32)
        results[name] = greedy_tokens(target, model)
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    run_ranks(sample, 1, folder, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_it_samples_as_the_model_that_was_exported(results, name):
    found, wanted = results[name]
    assert found == wanted
    assert len({tuple(tokens) for tokens in wanted}) > 1
