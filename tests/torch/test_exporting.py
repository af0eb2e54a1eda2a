"""Static passes as exported programs and as ONNX, run by others and compared number by number."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import models
from tests.torch.hosts import FOREIGN, SIZE
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature
from tokenexit.schedule import Exit, Merge, Schedule
from tokenexit_torch.inference import export as exporting

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnxscript = pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

opset20 = onnxscript.opset20

pytestmark = [
    pytest.mark.usefixtures("unchecked"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # of PyTorch's own exporter
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


# What is exported takes long to trace, so that networks are no deeper than the plans need.
AFTER = (1, 2)
NEIGHBOURS = schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.4, per_class=1)
FEATURES = Schedule(schedule.paumer(after=AFTER, threshold=0.6).exits, Feature("last block"), cell=2)


def static(plan, capacities=0.5):
    return tet.StaticModel(models.wrapped(models.timm_vit, plan, after=AFTER, depth=4), capacities=capacities)


def run(file, images, names=tet.inference.EXPORTED):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(names)
    return [dict(zip(names, session.run(None, {"images": one.numpy()}), strict=True)) for one in images]


def assert_same(found, out):
    np.testing.assert_allclose(found["logits"], out.logits.numpy(), rtol=1e-4, atol=1e-4)
    for name in ("exit_depth", "tokens_per_block", "overflow"):
        np.testing.assert_array_equal(found[name], getattr(out, name).numpy())


@torch.no_grad()
@pytest.mark.parametrize(
    "plan",
    [NEIGHBOURS, FEATURES],
    ids=["neighbours", "features and cells"],
)
def test_onnx_is_pytorch_on_ten_images_with_other_exits(plan, tmp_path):
    model = static(plan)
    inputs = [models.images(2, seed=seed) for seed in range(10)]
    tet.export_onnx(model, inputs[0], tmp_path / "model.onnx")
    outputs = [model(images) for images in inputs]
    assert len({tuple(out.exit_depth.flatten().tolist()) for out in outputs}) == 10
    for found, out in zip(run(tmp_path / "model.onnx", inputs), outputs, strict=True):
        assert_same(found, out)


@torch.no_grad()
def test_onnx_of_a_model_that_merges_and_of_its_decoder(tmp_path):
    agreed = Merge(1, 2, 0.7, agreed=policies.ConfidenceAbove(0.3))
    plan = Schedule((Exit(1, policies.ConfidenceAbove(0.6)),), Feature(), merges=(agreed,))
    model = tet.wrap(models.timm_vit(depth=2), plan, decoder=models.Convolving(48), num_classes=3).eval()
    one = tet.StaticModel(model, capacities=0.3)
    inputs = [models.pictures(2, seed=seed) for seed in range(4)]
    tet.export_onnx(one, inputs[0], tmp_path / "model.onnx")
    names = ("decoded.map", "exit_depth", "tokens_per_block", "overflow")
    seen = set()
    for found, images in zip(run(tmp_path / "model.onnx", inputs, names), inputs, strict=True):
        out = one(images)
        np.testing.assert_allclose(found["decoded.map"], out.decoded["map"].numpy(), rtol=1e-4, atol=1e-4)
        for name in names[1:]:
            np.testing.assert_array_equal(found[name], getattr(out, name).numpy())
        seen.add(tuple(out.overflow.tolist() + out.tokens_per_block.flatten().tolist()))
    assert len(seen) > 2


def test_what_a_decoder_gives_is_named():
    number, nothing = torch.zeros(()), torch.zeros(0)
    found = exporting._tensors({"map": number, "more": [nothing, None, (number,)]}, "decoded")
    assert list(found) == ["decoded.map", "decoded.more.0", "decoded.more.2.0"]
    assert list(exporting._tensors(number, "decoded")) == ["decoded"]
    with pytest.raises(TokenExitError, match="`static` must have a decoder that gives tensors, .*, got str"):
        exporting._tensors({"map": "none"}, "decoded")


@torch.no_grad()
def test_onnx_of_a_host_with_rotary_positions(tmp_path):
    heads = {after: nn.Linear(32, 5) for after in (1, 2)}
    plan = Schedule((Exit(2, policies.MarginAbove(0.1)),), merges=(Merge(1, 2, 0.5),))
    model = tet.wrap(FOREIGN["transformers DINOv3"].make(), plan, head=nn.Linear(32, 5), exit_heads=heads).eval()
    images = [models.images(2, SIZE, seed=seed) for seed in range(2)]
    one = tet.StaticModel(model, capacities=0.7)
    tet.export_onnx(one, images[0], tmp_path / "model.onnx")
    for found, some in zip(run(tmp_path / "model.onnx", images), images, strict=True):
        assert_same(found, one(some))


@torch.no_grad()
def test_no_topk_is_longer_than_tensorrt_takes(tmp_path):
    # 4,225 tokens: rows are sorted in parts, and merged.
    host = models.plain_host(width=16, heads=1, depth=2)
    plan = schedule.neighbours(radius={1: 1}, threshold=0.3, per_class=2)
    model = models.wrapped(host, plan, after=(1,))
    images = models.images(1, (8 * 65, 8 * 65))
    one = tet.StaticModel(model, capacities=0.6)
    tet.export_onnx(one, images, tmp_path / "model.onnx")
    assert_same(run(tmp_path / "model.onnx", [images])[0], one(images))
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    lengths = [shapes[node.output[0]][-1].dim_value for node in graph.node if node.op_type == "TopK"]
    assert max(lengths) == exporting.MOST_IN_TOPK == 3840


@given(
    values=st.lists(st.integers(-2, 2), min_size=1, max_size=9),
    descending=st.booleans(),
    most=st.integers(2, 10),
)
@strategies.fewer(6)
def test_parts_merge_to_one_stable_sort(values, descending, most):
    # Called on arrays, the operators run one by one.
    row = np.array([values, values[::-1]], dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "MOST_IN_TOPK", most)
        parts = exporting._sorted_parts(opset20, onnxscript.tensor.Tensor(row), -1, descending)
    value, index = exporting._merged(opset20, parts, descending)
    wanted = torch.sort(torch.from_numpy(row), dim=-1, stable=True, descending=descending)
    np.testing.assert_array_equal(value.value, wanted.values.numpy())
    np.testing.assert_array_equal(index.value, wanted.indices.numpy())


@pytest.mark.parametrize("options", [{}, {"right": True}, {"side": "right"}, {"side": "left"}])
def test_places_among_sorted_values(options):
    ascending, wanted = torch.tensor([0, 0, 1, 3, 3, 3, 7]), torch.tensor([-1, 0, 1, 2, 3, 7, 8])
    translated = exporting._translations()[torch.ops.aten.searchsorted.Tensor]
    found = translated(*(onnxscript.tensor.Tensor(x.numpy()) for x in (ascending, wanted)), **options)
    np.testing.assert_array_equal(found.value, torch.searchsorted(ascending, wanted, **options).numpy())


@torch.no_grad()
def test_an_exported_program_is_saved_and_loaded(tmp_path):
    model, images = static(NEIGHBOURS), models.images(2)
    torch.export.save(tet.export_program(model, images), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for seed in range(3):
        images = models.images(2, seed=seed)
        out, wanted = dict(zip(tet.inference.EXPORTED, loaded(images), strict=True)), model(images)
        torch.testing.assert_close(out["logits"], wanted.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(out["exit_depth"], wanted.exit_depth)
        assert torch.equal(out["overflow"], wanted.overflow)


def test_bad_input_is_named(tmp_path):
    model, images = static(NEIGHBOURS), models.images(1)
    with pytest.raises(TokenExitError, match="`static` must be a StaticModel, got ExitingModel"):
        tet.export_onnx(model.model, images, tmp_path / "model.onnx")
    with pytest.raises(TokenExitError, match="`file` must lie in a folder that is there, got .*nowhere"):
        tet.export_onnx(model, images, tmp_path / "nowhere" / "model.onnx")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_depends_on_the_data_is_refused_with_the_call_that_works():
    plan = schedule.paumer(keep={1: 0.5})
    model, images = models.wrapped(models.timm_vit, plan, after=(1,), depth=2), models.images(2)
    gates = tet.wrap_gates(models.timm_vit(depth=2), schedule.svit(after=(1,))).eval()
    with pytest.raises(TokenExitError, match="`model` must be static to be exported: use export_program"):
        torch.export.export(model, (images,))
    with pytest.raises(TokenExitError, match="`model` must be static to be exported: .*`masked`, got GatedModel"):
        torch.export.export(gates, (images,))
    for run in (model, gates, tet.StaticModel(model, capacities=1.0)):
        with pytest.raises(
            TokenExitError, match="`model` must not be traced by torch.jit where tokens leave: .*export"
        ):
            torch.jit.trace(run, (images,), check_trace=False, strict=False)
