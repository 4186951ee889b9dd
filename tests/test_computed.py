# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Tensors that a model's loader computes with: live weights are, byte for byte, what that loader makes of a version."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from live_layers import Live, linear
from private_stage import PrivateStage, private_stage
from stagingd_vllm.computed import LoaderFailed, Loading
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor
from stagingd_vllm.receiver import LayoutChanged, Receiver
from witness import Witness, witness

from stagingd.boxes import Shape

pytest.importorskip("vllm")

from stagingd_vllm.skeleton import plan_of_skeleton

BF16 = torch.bfloat16
SHAPES: dict[str, Shape] = {"q": (4, 6), "k": (4, 6), "v": (4, 6), "gate": (4, 6), "up": (4, 6), "decay": (8,)}
HOME = {"q": ("qkv", 0), "k": ("qkv", 4), "v": ("qkv", 8), "gate": ("mlp", 0), "up": ("mlp", 4), "decay": ("decay", 0)}
STAGED = {name: StagedTensor("bfloat16", shape) for name, shape in SHAPES.items()}

Weights = Iterable[tuple[str, torch.Tensor]]
Load = Callable[["Small", Weights], None]


class Small(torch.nn.Module):
    """A model with a fused projection, another, and a decay; its loader is the one that it is given."""

    def __init__(self, load: Load, device: str = "cpu", scheme: str = "plain") -> None:
        super().__init__()
        self.load = load
        self.kept: dict[str, Any] = {}
        self.qkv = linear(scheme, 12, 6, device)
        self.mlp = linear("plain", 8, 6, device)
        self.decay = Live(weight=torch.full((8,), 7.0, dtype=BF16, device=device))
        self.register_buffer("table", torch.zeros(8, dtype=BF16, device=device))
        self.view = self.decay.weight.detach()[:4]

    def load_weights(self, weights: Weights) -> None:
        self.load(self, weights)


def put(model: Small, name: str, tensor: torch.Tensor) -> None:
    """As a plain loader does: rows of a fused parameter."""
    layer, row = HOME[name]
    getattr(model, layer).weight.data[row : row + len(tensor)].copy_(tensor)


def transforming(model: Small, weights: Weights) -> None:
    """As Mamba2's decay is: loaded, and then replaced in place by a function of itself."""
    for name, tensor in weights:
        put(model, name, tensor)
        if name == "decay":
            model.decay.weight.data.copy_(-torch.exp(model.decay.weight.float()))


def concatenating(model: Small, weights: Weights) -> None:
    """Three tensors end in one parameter, when the last has come."""
    for name, tensor in weights:
        if name in "qkv":
            model.kept[name] = tensor
        else:
            put(model, name, tensor)
        if name == "v":
            whole = torch.cat([model.kept.pop(which).view(2, 2, 6) for which in "qkv"], dim=1)
            model.qkv.weight.data.copy_(whole.view(12, 6))


def changing_what_it_is_given(model: Small, weights: Weights) -> None:
    for name, tensor in weights:
        put(model, name, tensor.add_(1) if name == "up" else tensor)


def clearing_all_before(model: Small, weights: Weights) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()
    transforming(model, weights)


def taking_a_value(model: Small, weights: Weights) -> None:
    for name, tensor in weights:
        if name == "decay":
            model.decay.weight.data.fill_(tensor[3].item())
        else:
            put(model, name, tensor)


COMPUTED = {
    transforming: {"decay"},
    concatenating: {"q", "k", "v"},
    changing_what_it_is_given: {"gate", "up"},
    clearing_all_before: {"decay"},
    taking_a_value: {"decay"},
}


def plan_of(
    load: Load,
    aliases: dict[str, str] | None = None,
    owners: dict[str, str] | None = None,
    without: str = "",
    kind: type[Small] = Small,
) -> ReadPlan:
    skeleton = kind(load, "meta")
    names = {name: name for name, _ in skeleton.named_parameters()}
    staged = {name: tensor for name, tensor in STAGED.items() if name != without}
    return plan_of_skeleton(skeleton, names | (owners or {}), staged, aliases or {})


def loading(load: Load, kind: type[Small] = Small) -> Loading:
    return Loading(lambda: kind(load, "meta"), contextlib.nullcontext)


def a_version(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(BF16) for name, shape in SHAPES.items()}


def by_the_loader(load: Load, version: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model holds that was loaded from scratch."""
    model = Small(load)
    with torch.no_grad():
        model.load_weights((name, tensor.clone()) for name, tensor in version.items())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def stage() -> Iterator[PrivateStage]:
    with private_stage(a_version(0)) as made:
        yield made


@pytest.mark.parametrize("load", COMPUTED, ids=lambda load: load.__name__)
def test_every_version_is_what_the_loader_makes_of_it(stage: PrivateStage, load: Load) -> None:
    plan = plan_of(load)
    assert {tensor.tensor for tensor in plan.computed} == COMPUTED[load]
    live = Small(load)
    receiver = Receiver(live, plan, stage, loading=loading(load))
    for number in (1, 2, 3):
        version = a_version(number)
        lease = stage.write(number, version)
        slot = lease.slot.clone()
        report = receiver.apply(lease)
        assert receiver.version == number
        assert report.bytes_read == sum(tensor.bytes for tensor in STAGED.values())
        for name, wanted in by_the_loader(load, version).items():
            assert torch.equal(live.get_parameter(name), wanted), name
        assert torch.equal(lease.slot, slot)


@pytest.mark.parametrize("load", COMPUTED, ids=lambda load: load.__name__)
def test_live_parameters_stay_the_objects_and_the_addresses_that_they_were(stage: PrivateStage, load: Load) -> None:
    live = Small(load)
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in live.named_parameters()}
    receiver = Receiver(live, plan_of(load), stage, loading=loading(load))
    receiver.apply(stage.write(1, a_version(1)))
    receiver.close()
    receiver.close()
    assert before == {name: (id(parameter), parameter.data_ptr()) for name, parameter in live.named_parameters()}


def test_the_loader_reaches_no_parameter_but_those_that_it_computes(stage: PrivateStage) -> None:
    made: list[Small] = []

    def build() -> Small:
        made.append(Small(clearing_all_before, "meta"))
        return made[-1]

    live = Small(clearing_all_before)
    Receiver(live, plan_of(clearing_all_before), stage, loading=Loading(build, contextlib.nullcontext))
    (second,) = made
    reached = {name: parameter.data_ptr() for name, parameter in second.named_parameters() if not parameter.is_meta}
    assert reached == {"decay.weight": live.decay.weight.data_ptr()}


def test_tensors_come_in_the_stages_order_and_then_under_their_aliases(stage: PrivateStage) -> None:
    """As untied embeddings of a tied checkpoint come: once more, at the end, under another name."""
    handed: list[str] = []

    def doubling_the_alias(model: Small, weights: Weights) -> None:
        for name, tensor in weights:
            handed.append(name)
            if name == "up again":
                put(model, "gate", tensor * 2)
            elif name in HOME and name != "gate":
                put(model, name, tensor)

    plan = plan_of(doubling_the_alias, {"up again": "up", "q again": "q"}, without="gate")
    live = Small(doubling_the_alias)
    receiver = Receiver(live, plan, stage, loading=loading(doubling_the_alias))
    handed.clear()
    version = a_version(1)
    receiver.apply(stage.write(1, version))
    assert handed == ["up", "up again"]
    assert torch.equal(live.mlp.weight, torch.cat([version["up"] * 2, version["up"]]))


def test_no_more_is_held_than_the_tensor_that_the_loader_has(stage: PrivateStage) -> None:
    handed: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def alive() -> int:
        return sum(1 for tensor in handed if tensor() is not None)

    def holding_one(model: Small, weights: Weights) -> None:
        nonlocal most
        for name, tensor in weights:
            if not tensor.is_meta:
                handed.append(weakref.ref(tensor))
                most = max(most, alive())
            put(model, name, tensor + 1)

    receiver = Receiver(Small(holding_one), plan_of(holding_one), stage, loading=loading(holding_one))
    receiver.apply(stage.write(1, a_version(1)))
    assert (len(handed), most, alive()) == (len(STAGED), 1, 0)


def test_what_the_engine_has_around_its_loader_is_there(stage: PrivateStage) -> None:
    within: list[bool] = [False]

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        within[0] = True
        try:
            yield
        finally:
            within[0] = False

    def asking(model: Small, weights: Weights) -> None:
        transforming(model, ((name, tensor + 1 if within[0] else tensor) for name, tensor in weights))

    live = Small(asking)
    made = Loading(lambda: Small(asking, "meta"), around)
    version = a_version(1)
    Receiver(live, plan_of(asking), stage, loading=made).apply(stage.write(1, version))
    assert torch.equal(live.decay.weight, -torch.exp((version["decay"] + 1).float()).to(BF16))
    assert not within[0]


def test_a_loader_that_raises_leaves_no_version_and_the_next_one_mends_it(stage: PrivateStage) -> None:
    broken = False

    def breaking(model: Small, weights: Weights) -> None:
        for name, tensor in weights:
            put(model, name, tensor + 1 if name == "k" else tensor)
            if broken and name == "k":
                raise KeyError("no such layer")

    live = Small(breaking)
    receiver = Receiver(live, plan_of(breaking), stage, loading=loading(breaking))
    receiver.apply(stage.write(1, a_version(1)))
    broken = True
    with pytest.raises(LoaderFailed, match=r"did not take k .* into qkv\.weight: KeyError.*no such layer") as failed:
        receiver.apply(stage.write(2, a_version(2)))
    assert failed.value.context == {"tensor": "k", "parameter": "qkv.weight"}
    assert "vLLM's own loader" in failed.value.remedy
    assert receiver.version is None
    broken = False
    version = a_version(3)
    receiver.apply(stage.write(3, version))
    assert receiver.version == 3
    assert all(torch.equal(live.get_parameter(name), made) for name, made in by_the_loader(breaking, version).items())


def test_a_loader_that_does_not_ask_for_all_tensors_is_told(stage: PrivateStage) -> None:
    lazy = False

    def stopping(model: Small, weights: Weights) -> None:
        for name, tensor in weights:
            put(model, name, tensor + 1 if name in "qkv" else tensor)
            if lazy and name == "k":
                return

    receiver = Receiver(Small(stopping), plan_of(stopping), stage, loading=loading(stopping))
    lazy = True
    with pytest.raises(LoaderFailed, match=r"did not take v .*: it never asked for it"):
        receiver.apply(stage.write(1, a_version(1)))
    assert receiver.version is None


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"])
def test_what_is_computed_into_a_quantized_parameter_is_refused(stage: PrivateStage, scheme: str) -> None:
    live = Small(concatenating, scheme=scheme)
    with pytest.raises(PlanRefused, match=rf"can take q, .* for qkv\.weight: it lives as {scheme}") as refused:
        Receiver(live, plan_of(concatenating), stage, loading=loading(concatenating))
    assert refused.value.context == {"tensor": "q", "parameter": "qkv.weight"}
    assert "unquantized" in refused.value.remedy


def test_a_parameter_that_lives_in_another_order_is_refused(stage: PrivateStage) -> None:
    live = Small(changing_what_it_is_given)
    live.mlp.weight = torch.nn.Parameter(live.mlp.weight.t().contiguous().t(), requires_grad=False)
    with pytest.raises(PlanRefused, match=r"mlp\.weight: it lives as .* with strides \(1, 8\).* strides \(6, 1\)"):
        Receiver(live, plan_of(changing_what_it_is_given), stage, loading=loading(changing_what_it_is_given))


def test_a_receiver_that_is_given_no_loader_refuses(stage: PrivateStage) -> None:
    with pytest.raises(PlanRefused, match=r"can take decay, .* no loader of the model is given"):
        Receiver(Small(transforming), plan_of(transforming), stage)


def test_a_computed_parameter_that_is_replaced_is_noticed_before_anything_is_written(stage: PrivateStage) -> None:
    live = Small(transforming)
    receiver = Receiver(live, plan_of(transforming), stage, loading=loading(transforming))
    live.decay.weight = torch.nn.Parameter(torch.zeros(8, dtype=BF16), requires_grad=False)
    with pytest.raises(LayoutChanged, match=r"decay\.weight was"):
        receiver.apply(stage.write(1, a_version(1)))
    assert (live.qkv.weight == 7).all()


def keeping_in_an_attribute(model: Small, weights: Weights) -> None:
    for name, tensor in weights:
        put(model, name, tensor * 2 if name == "decay" else tensor)
        if name == "decay":
            model.decay.largest = tensor[:1]  # type: ignore[assignment]


def keeping_in_a_buffer(model: Small, weights: Weights) -> None:
    for name, tensor in weights:
        put(model, name, tensor)
        if name == "decay":
            model.table.copy_(tensor)


def by_way_of_a_view(model: Small, weights: Weights) -> None:
    for name, tensor in weights:
        put(model, name, tensor * 2 if name == "decay" else tensor)
        if name == "decay":
            model.view.copy_(tensor[:4] * 3)


def otherwise_the_second_time(model: Small, weights: Weights) -> None:
    swapped = {"gate": "up", "up": "gate"} if model.kept else {}
    for name, tensor in weights:
        put(model, swapped.get(name, name), tensor * 2 if name == "gate" else tensor)
    model.kept["loaded"] = True


def counting_what_comes(model: Small, weights: Weights) -> None:
    """Where the first of the last four goes follows from how many came before it."""
    for number, (name, tensor) in enumerate(weights):
        other = {"gate": "up", "up": "gate"}.get(name, name) if number < 3 else name
        put(model, other, tensor * 2 if name == "up" else tensor)


def waiting_for_another(model: Small, weights: Weights) -> None:
    for name, tensor in weights:
        model.kept[name] = tensor.shape
        put(model, name, tensor * 2 if name == "decay" else tensor)
        if name == "decay" and model.kept.pop("q") != model.kept.pop("k"):
            raise ValueError("heads differ")


REFUSED = {
    keeping_in_an_attribute: r"puts something into attribute decay\.largest",
    keeping_in_a_buffer: r"can take decay, .* the loader writes to buffer table too",
    by_way_of_a_view: r"can take decay, .* for decay\.weight: the loader does otherwise with it",
    otherwise_the_second_time: r"can take gate, .* for mlp\.weight: the loader does otherwise with it",
    counting_what_comes: r"can take up, .* for mlp\.weight: the loader does otherwise with it",
    waiting_for_another: r"does not take computed tensors by themselves: .* refuses decay: KeyError: 'q'",
}


@pytest.mark.parametrize("load", REFUSED, ids=lambda load: load.__name__)
def test_a_loader_that_would_do_otherwise_with_a_version_is_refused_when_the_plan_is_made(load: Load) -> None:
    with pytest.raises(PlanRefused, match=REFUSED[load]):
        plan_of(load)


class Tied(Small):
    """One whose decay has a second name, with memory of its own until the engine ties them after loading."""

    def __init__(self, load: Load, device: str = "cpu") -> None:
        super().__init__(load, device)
        self.tied = Live(weight=torch.full((8,), 7.0, dtype=BF16, device=device))


def test_a_parameter_that_is_tied_after_loading_may_be_loaded_under_its_second_name(stage: PrivateStage) -> None:
    def by_the_second_name(model: Small, weights: Weights) -> None:
        for name, tensor in weights:
            if name == "decay":
                model.get_parameter("tied.weight").data.copy_(-tensor)
            else:
                put(model, name, tensor)

    live = Tied(by_the_second_name)
    live.tied.weight = live.decay.weight
    plan = plan_of(by_the_second_name, owners={"tied.weight": "decay.weight"}, kind=Tied)
    version = a_version(1)
    Receiver(live, plan, stage, loading=loading(by_the_second_name, Tied)).apply(stage.write(1, version))
    assert torch.equal(live.decay.weight, -version["decay"])


def test_two_tensors_for_parameters_that_share_live_memory_are_refused() -> None:
    def both(model: Small, weights: Weights) -> None:
        for name, tensor in weights:
            put(model, name, tensor * 2 if name in ("up", "gate") else tensor)

    plan_of(both)
    with pytest.raises(PlanRefused, match=r"writes (qkv|mlp)\.weight and (qkv|mlp)\.weight, which share one memory"):
        plan_of(both, owners={"qkv.weight": "mlp.weight"})


VOCAB, HIDDEN, LAYERS = 101, 256, 2


def told(config: dict[str, Any], layer: dict[str, Shape], around: dict[str, Shape], path: str) -> dict[str, Any]:
    """A model as the witness is told it: config.json, and its tensors, all in bfloat16."""
    shapes = around | {f"{path}.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    return {"config": sizes | config, "tensors": {name: ("bfloat16", shape) for name, shape in shapes.items()}}


def falcon() -> dict[str, Any]:
    """Its loader takes fused heads apart and concatenates them anew: 4 of queries, 2 of keys and of values."""
    config = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "alibi": False,
        "bias": False,
        "parallel_attn": True,
    }
    layer: dict[str, Shape] = {
        "self_attention.query_key_value.weight": (2 * HIDDEN, HIDDEN),
        "self_attention.dense.weight": (HIDDEN, HIDDEN),
        "mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
        "mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
    }
    layer |= {f"{name}.{kind}": (HIDDEN,) for name in ("ln_attn", "ln_mlp") for kind in ("weight", "bias")}
    around: dict[str, Shape] = {"transformer.word_embeddings.weight": (VOCAB, HIDDEN)}
    around |= {f"transformer.ln_f.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
    return told(config, layer, around, "transformer.h")


def mamba2() -> dict[str, Any]:
    """Its loader replaces the logarithm of the decay by the decay, in place, after it has been cut for the rank."""
    inner, heads, groups, state = 2 * HIDDEN, 8, 2, 16
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "num_heads": heads,
        "head_dim": 64,
        "n_groups": groups,
        "state_size": state,
        "expand": 2,
        "conv_kernel": 4,
        "tie_word_embeddings": False,
    }
    convolved = inner + 2 * groups * state
    layer: dict[str, Shape] = {f"mixer.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
    layer |= {"mixer.conv1d.weight": (convolved, 1, 4), "mixer.conv1d.bias": (convolved,)}
    layer |= {"mixer.in_proj.weight": (inner + convolved + heads, HIDDEN), "mixer.out_proj.weight": (HIDDEN, inner)}
    layer |= {"mixer.norm.weight": (inner,), "norm.weight": (HIDDEN,)}
    around: dict[str, Shape] = {"backbone.embeddings.weight": (VOCAB, HIDDEN), "backbone.norm_f.weight": (HIDDEN,)}
    return told(config, layer, around | {"lm_head.weight": (VOCAB, HIDDEN)}, "backbone.layers")


TOLD = {"falcon": falcon(), "mamba2": mamba2()}
BY_LOADER = {
    "falcon": [f"transformer.h.{layer}.self_attention.query_key_value.weight" for layer in range(LAYERS)],
    "mamba2": [f"backbone.layers.{layer}.mixer.A_log" for layer in range(LAYERS)],
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    with witness("exactness_witness.py", tmp_path_factory.mktemp("models")) as made:
        yield made


def ask(asked: Witness, model: str, mode: str | None, ranks: int) -> Any:
    question = {"model": model, "mode": mode, "ranks": ranks, "expert": False, "cut": "rows of 3 ranks"}
    return asked.ask(question | {"told": TOLD[model]})


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("model", "mode"), [("falcon", None), ("mamba2", None), ("mamba2", "fp8_per_channel")])
def test_every_byte_is_that_of_vllms_own_loading(asked: Witness, model: str, mode: str | None, ranks: int) -> None:
    outcomes = ask(asked, model, mode, ranks)
    assert isinstance(outcomes, list), outcomes
    assert [outcome["wrong"] for outcome in outcomes] == [[]] * ranks
    assert [outcome["computed"] for outcome in outcomes] == [BY_LOADER[model]] * ranks
    assert all(outcome["as a live worker plans"] for outcome in outcomes)
    assert all(outcome["schemes"] == ([mode] if mode else []) for outcome in outcomes)


def test_a_model_that_is_quantized_where_its_loader_computes_is_refused(asked: Witness) -> None:
    said = ask(asked, "falcon", "fp8_per_channel", 2)["refused"]
    assert "can take transformer.h.0.self_attention.query_key_value.weight" in said
    assert "it lives as fp8_per_channel" in said
