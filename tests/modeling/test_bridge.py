"""A bridge as a file, and which runs it may serve."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oprd_tune.errors import ConfigError
from oprd_tune.losses import BridgedMSE
from oprd_tune.losses.masking import select_states
from oprd_tune.modeling.bridge import Bridge, BridgePlan
from oprd_tune.types import LayerPair
from tests.modeling.bridges import BELONGS, CPU, PAIRS, make_bridge

PLAN = BridgePlan(rank=3)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "bridge.safetensors"
    make_bridge(PAIRS).save(path)
    return path


def loss_and_gradient(bridge, normalisation):
    generator = torch.Generator().manual_seed(3)
    selection = select_states(torch.ones(2, 6, dtype=torch.bool), anchor="consume")
    student = {p.student: torch.randn(2, 6, 5, generator=generator).requires_grad_() for p in PAIRS}
    targets = {p.student: bridge.teacher(p.student, torch.randn(12, 7, generator=generator)) for p in PAIRS}
    stream = BridgedMSE(normalisation).stream(PAIRS, targets, selection, bridge)
    for layer, state in student.items():
        total = stream(layer, state)
    return total, *torch.autograd.grad(total, list(student.values()))


@pytest.mark.parametrize("normalisation", ["l2", "variance", "none"])
def test_a_saved_bridge_gives_the_same_loss_and_gradient_bit_by_bit(file, normalisation):
    made, loaded = make_bridge(PAIRS), Bridge.load(file, device=CPU)
    both = [loss_and_gradient(bridge, normalisation) for bridge in (made, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert all(tensor.abs().max() > 1e-3 for tensor in both[0])
    assert not torch.equal(both[0][0], loss_and_gradient(make_bridge(PAIRS, seed=1), normalisation)[0])


def test_a_loaded_bridge_is_the_saved_one_and_can_be_saved_again(file, tmp_path):
    made, loaded = make_bridge(PAIRS), Bridge.load(file, device=CPU)
    for name in ("pairs", "rank", "plan", "belongs", "report"):
        assert getattr(loaded, name) == getattr(made, name)
    loaded.save(tmp_path / "again.safetensors")
    one, other = (load_file(path) for path in (file, tmp_path / "again.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", file.name]


def test_the_file_says_everything_to_whoever_has_safetensors_alone(file):
    made = make_bridge(PAIRS)
    with safe_open(file, framework="pt") as opened:
        metadata, names = opened.metadata(), set(opened.keys())
    assert metadata["format"] == "oprd-tune bridge 1"
    facts = json.loads(metadata["bridge"])
    assert facts["pairs"] == [[1, 2], [3, 2], [4, 6]]
    assert facts["rank"] == 3
    assert facts["plan"] == {
        "rank": 3,
        "basis": "pca",
        "intercept": True,
        "ridge": 1e-4,
        "ridge_scale": "trace",
        "prompts": 2000,
    }
    assert (facts["student"], facts["teacher"]) == (BELONGS.student, BELONGS.teacher)
    assert facts["conventions"] == BELONGS.conventions
    for layer in (1, 3, 4):
        fit = made.report[layer]
        found = facts["report"][str(layer)]
        assert found["r_squared"] == fit.r_squared
        assert found["held_out_r_squared"] == fit.held_out_r_squared
        assert found["cosine"] == fit.cosine
        assert len(found["spectrum"]) == 7
        assert list(found["cosine_by_rank"]) == list(found["r_squared_by_rank"]) == ["1", "2", "3", "4", "7"]
    shapes = {
        "student_RD": (3, 5),
        "student_mean_D": (5,),
        "teacher_RC": (3, 7),
        "teacher_mean_C": (7,),
        "variance": (),
    }
    assert names == {f"layers.{layer}.{name}" for layer in (1, 3, 4) for name in shapes}
    for name, tensor in load_file(file).items():
        assert tensor.shape == shapes[name.split(".")[2]]
        assert tensor.dtype == torch.float32


def test_a_bridge_of_lower_rank_is_the_beginning_of_a_wider_one():
    narrow, wide = make_bridge(PAIRS, rank=2), make_bridge(PAIRS, rank=5)
    state_TD, state_TC = torch.randn(9, 5), torch.randn(9, 7)
    for layer in (1, 3, 4):
        torch.testing.assert_close(narrow.student(layer, state_TD), wide.student(layer, state_TD)[:, :2])
        torch.testing.assert_close(narrow.teacher(layer, state_TC), wide.teacher(layer, state_TC)[:, :2])
        spectrum = narrow.report[layer].spectrum
        assert narrow.variance(layer).item() == pytest.approx(sum(spectrum[:2]), rel=1e-6)
        assert wide.variance(layer).item() == pytest.approx(sum(spectrum[:5]), rel=1e-6)


def test_projections_of_low_precision_states_are_fp32_and_those_of_fp64_stay_fp64():
    bridge = make_bridge(PAIRS)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        state = torch.randn(4, 5).to(dtype)
        projected = bridge.student(1, state)
        assert projected.dtype == expected
        assert bridge.teacher(1, torch.randn(4, 7).to(dtype)).dtype == expected
        torch.testing.assert_close(projected.float(), bridge.student(1, state.float()), rtol=1e-5, atol=1e-5)


def test_files_that_hold_no_bridge_are_refused(file, tmp_path):
    damaged, foreign, text = (tmp_path / name for name in ("damaged", "foreign", "text"))
    damaged.write_bytes(file.read_bytes()[:-100])
    save_file({"weight": torch.ones(3)}, foreign, metadata={"format": "pt"})
    text.write_text("a bridge")
    for path, message in (
        (damaged, "bridge.file: .*damaged is damaged or incomplete"),
        (foreign, "bridge.file: .*foreign holds no bridge of this version"),
        (text, "bridge.file: .*text is damaged or incomplete"),
        (tmp_path / "nowhere", "bridge.file: .*nowhere is damaged or incomplete"),
    ):
        with pytest.raises(ConfigError, match=message):
            Bridge.load(path, device=CPU)


def edited(file, *, metadata=None, facts=None, **tensors):
    """The file with other metadata, facts or tensors; None removes one."""
    with safe_open(file, framework="pt") as opened:
        kept = {**opened.metadata(), **(metadata or {})}
    if facts is not None:
        kept["bridge"] = json.dumps({k: v for k, v in {**json.loads(kept["bridge"]), **facts}.items() if v is not None})
    given = {f"layers.3.{name}": tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in {**load_file(file), **given}.items() if tensor is not None}
    save_file(found, file, metadata={name: text for name, text in kept.items() if text is not None})


BROKEN = {
    "no facts": ({"metadata": {"bridge": None}}, "its metadata has no readable entry `bridge`"),
    "no JSON": ({"metadata": {"bridge": "{"}}, "its metadata has no readable entry `bridge`"),
    "another kind": ({"metadata": {"bridge": "[]"}}, "its metadata lacks 'pairs', or it is no list"),
    "no rank": ({"facts": {"rank": None}}, "its metadata lacks 'rank', or it is no int"),
    "rank as text": ({"facts": {"rank": "3"}}, "its metadata lacks 'rank', or it is no int"),
    "no student": ({"facts": {"student": None}}, "its metadata lacks 'student', or it is no dict"),
    "no width": ({"facts": {"teacher": {"name": "x"}}}, "its metadata is not what this version writes: KeyError"),
    "no pairs": ({"facts": {"pairs": []}}, "it has rank 3 and 0 layer pairs; at least 1 of each"),
    "half a pair": ({"facts": {"pairs": [[1]]}}, "its metadata is not what this version writes: ValueError"),
    "another report": ({"facts": {"report": {"1": {}}}}, "its metadata is not what this version writes: KeyError"),
    "no tensor": ({"student_RD": None}, "it lacks layers.3.student_RD"),
    "shape": ({"teacher_RC": torch.ones(3, 5)}, "layers.3.teacher_RC is [3, 5] in float32, not [3, 7] in float32"),
    "dtype": ({"variance": torch.tensor(1.0).half()}, "layers.3.variance is [] in float16, not [] in float32"),
    "infinite": ({"student_mean_D": torch.full((5,), torch.inf)}, "layers.3.student_mean_D has values that are not"),
    "undefined": ({"variance": torch.tensor(torch.nan)}, "layers.3.variance has values that are not finite"),
    "no variance": ({"variance": torch.tensor(0.0)}, "layers.3.variance is not positive"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_with_anything_wrong_in_it_is_refused_in_one_line(file, case):
    changes, message = BROKEN[case]
    edited(file, **changes)
    with pytest.raises(ConfigError) as refused:
        Bridge.load(file, device=CPU)
    assert f"bridge.file: {file} is no bridge that can be used: {message}" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_bridge_serves_its_own_run_and_fewer_layers_of_it(file):
    bridge = Bridge.load(file, device=CPU)
    bridge.check(PAIRS, BELONGS, PLAN)
    bridge.check(PAIRS[1:], BELONGS, PLAN)
    bridge.check(PAIRS, replace(BELONGS, student=BELONGS.student | {"name": "moved"}), PLAN)


OTHERS = {
    "student's depth": ({"student": {"depth": 5}}, "student depth 4 in the file, 5 in this run"),
    "student's width": ({"student": {"width": 6}}, "student width 5 in the file, 6 in this run"),
    "student's weights": (
        {"student": {"fingerprint": "x", "name": "new"}},
        "its student, small, has other weights than new",
    ),
    "teacher's depth": ({"teacher": {"depth": 7}}, "teacher depth 6 in the file, 7 in this run"),
    "teacher's width": ({"teacher": {"width": 9}}, "teacher width 7 in the file, 9 in this run"),
    "teacher's weights": (
        {"teacher": {"fingerprint": "x", "name": "new"}},
        "its teacher, large, has other weights than new",
    ),
    "positions": (
        {"conventions": {"positions": "all"}},
        "conventions positions 'last_k' in the file, 'all' in this run",
    ),
    "their number": ({"conventions": {"positions_k": 3}}, "conventions positions_k 20 in the file, 3 in this run"),
    "anchor": ({"conventions": {"anchor": "consume"}}, "conventions anchor 'predict' in the file, 'consume' in this"),
    "tokens": ({"conventions": {"own_tokens": True}}, "conventions own_tokens False in the file, True in this run"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("same_weights", [True, False])
def test_a_bridge_of_others_is_refused_by_what_is_other(case, same_weights):
    changes, message = OTHERS[case]
    belongs = replace(BELONGS, **{part: getattr(BELONGS, part) | new for part, new in changes.items()})
    plan = BridgePlan(rank=3, same_weights=same_weights)
    if "weights" in case and not same_weights:
        make_bridge(PAIRS).check(PAIRS, belongs, plan)
        return
    with pytest.raises(ConfigError) as refused:
        make_bridge(PAIRS).check(PAIRS, belongs, plan)
    assert f"does not belong to this run: {message}" in str(refused.value)
    assert ("same_weights=false" in str(refused.value)) == same_weights


def test_other_layers_and_another_rank_are_refused():
    bridge = make_bridge(PAIRS)
    with pytest.raises(
        ConfigError, match=r"lacks the layer pairs \[\[3, 4\]\]; it has \[\[1, 2\], \[3, 2\], \[4, 6\]\]"
    ):
        bridge.check([LayerPair(1, 2), LayerPair(3, 4)], BELONGS, PLAN)
    with pytest.raises(ConfigError, match="its rank is 3, bridge.rank is 2"):
        bridge.check(PAIRS, BELONGS, BridgePlan(rank=2))


REFUSED = {
    "no direction": ({"rank": 0}, "bridge.rank is 0; it must be a whole number, at least 1"),
    "half a direction": ({"rank": 2.5}, "bridge.rank is 2.5; it must be a whole number"),
    "a yes": ({"rank": True}, "bridge.rank is True; it must be a whole number"),
    "no prompt": ({"prompts": 0}, "bridge.prompts is 0"),
    "none held out": ({"held_out_prompts": 0}, "bridge.held_out_prompts is 0"),
    "basis": ({"basis": "svd"}, "bridge.basis is 'svd'; allowed are pca, reduced_rank, predictive"),
    "ridge scale": ({"ridge_scale": "mean"}, "bridge.ridge_scale is 'mean'; allowed are trace, diagonal"),
    "dtype": ({"moments_dtype": "bf16"}, "bridge.moments_dtype is 'bf16'; allowed are fp32, fp64"),
    "device": ({"moments_device": "gpu"}, "bridge.moments_device 'gpu' cannot be used"),
    "intercept": ({"intercept": "no"}, "bridge.intercept is 'no'; allowed are true and false"),
    "weights": ({"same_weights": 0}, "bridge.same_weights is 0; allowed are true and false"),
    "fit only": ({"fit_only": None}, "bridge.fit_only is None; allowed are true and false"),
    "negative ridge": ({"ridge": -1e-4}, "bridge.ridge is -0.0001; it must be a finite number, 0 or above"),
    "no ridge": ({"ridge": None}, "bridge.ridge is None"),
    "endless ridge": ({"ridge": float("inf")}, "bridge.ridge is inf"),
    "undefined ridge": ({"ridge": float("nan")}, "bridge.ridge is nan"),
    "missing file": ({"file": "nowhere.safetensors"}, "bridge.file: there is no file nowhere.safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_cannot_be_is_refused(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigError) as refused:
        BridgePlan(**arguments)
    assert str(refused.value).startswith(message)


def test_a_plan_either_fits_or_loads(file):
    with pytest.raises(ConfigError, match="give one of them"):
        BridgePlan(file=str(file), fit_only=True)
    assert BridgePlan(basis="predictive").needs_final_state
    assert not BridgePlan(basis="predictive", file=str(file)).needs_final_state
    assert not BridgePlan().needs_final_state
    assert BridgePlan().dtype == torch.float32
    assert BridgePlan(moments_dtype="fp64").dtype == torch.float64
