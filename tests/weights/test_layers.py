"""Which layer a parameter is the weight of: paths, patterns, what a model remembers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fp8_compile
from fp8_compile.weights.layers import Namer, Tree
from fp8_compile.weights.records import record_of
from tests.support.blocks import LOAD, OPTIONS, WIDTH, Model, model, tokens
from tests.support.sqnr import sqnr

BACKEND: dict[str, Any] = {"backend": "fp8_diffusion"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def options(*ignored: str, **more: Any) -> dict[str, Any]:
    return {**OPTIONS, "ignored_layers": list(ignored), **more}


def unquantized(m: nn.Module) -> dict[str, str]:
    return {row.path: row.reason for row in fp8_compile.report(m).layers if row.decision == "unquantized"}


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def opaque(m: nn.Module) -> nn.Module:
    """Give each linear a hook that Dynamo cannot see into, so that each runs in a graph of its own."""
    for linear in m.modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(torch._dynamo.disable(lambda module, args: None))
    return m


# --- however the graph was cut ---


def whole(m: Model) -> Callable[..., Any]:
    m.compile(**BACKEND, options=options("img_mlp"))
    return m


def optimized(m: Model) -> Callable[..., Any]:
    return torch.compile(m, **BACKEND, options=options("img_mlp"))


def regional(m: Model) -> Callable[..., Any]:
    return m.compile_blocks(ignored_layers=["img_mlp"])


def forward(m: Model) -> Callable[..., Any]:
    return torch.compile(m.forward, **BACKEND, options=options("img_mlp"))


def function(m: Model) -> Callable[..., Any]:
    return torch.compile(lambda x: m(x), **BACKEND, options=options("img_mlp"))


def function_of_a_block(m: Model, pattern: str = "img_mlp") -> Callable[..., Any]:
    step = torch.compile(lambda block, x: block(x), **BACKEND, options=options(pattern))

    def run(x: Tensor) -> Tensor:
        for block in m.blocks:
            x = step(block, x)
        return x

    return run


def leaves(m: Model) -> Callable[..., Any]:
    return whole(opaque(m))  # type: ignore[arg-type]


def broken(m: Model) -> Callable[..., Any]:
    inner = m.blocks[0].forward

    def with_a_break(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(x)  # type: ignore[no-any-return]

    m.blocks[0].forward = with_a_break
    return whole(m)


WAYS = [whole, optimized, regional, forward, function, function_of_a_block, leaves, broken]


@pytest.mark.parametrize("way", WAYS)
def test_a_pattern_holds_in_every_way_of_compiling(way: Callable[[Model], Callable[..., Any]]) -> None:
    m, x = model(2), tokens()
    run = way(m)
    first = run(x)
    assert torch.equal(run(x), first)
    kept = unquantized(m)
    assert kept == {
        **dict.fromkeys(
            [path for path, _ in m.named_modules() if path.endswith(("img_mlp.0", "img_mlp.2"))],
            "ignored_layers: img_mlp",
        )
    }
    assert fp8_compile.report(m).totals["quantized"] == 4


@pytest.mark.parametrize("way", [optimized, regional, leaves, broken])
def test_results_are_those_of_the_whole_model_in_one_graph(way: Callable[[Model], Callable[..., Any]]) -> None:
    m, x = model(2), tokens()
    expected = whole(copy.deepcopy(m))(x)
    assert sqnr(expected, way(m)(x)) > 60


@pytest.mark.parametrize("pattern", ["blocks.1.*", r"re:^blocks\.1\.", "blocks.1", "re:1"])
@pytest.mark.parametrize("way", ["whole", "regional", "leaves", "function"])
def test_an_index_names_its_block(pattern: str, way: str) -> None:
    m, x = model(3), tokens()
    run: Callable[..., Any] = m
    if way == "regional":
        m.compile_blocks(ignored_layers=[pattern])
    elif way == "function":
        run = function_of_a_block(m, pattern)
    else:
        (opaque(m) if way == "leaves" else m).compile(**BACKEND, options=options(pattern))
    with torch._dynamo.config.patch(recompile_limit=64):
        run(x)
        run(x)
    assert {path.split(".")[1] for path in unquantized(m)} == {"1"}
    assert len(unquantized(m)) == 4


def test_an_anchored_expression_may_start_in_the_part_that_was_compiled(recwarn: pytest.WarningsRecorder) -> None:
    m, x = model(2), tokens()
    m.compile_blocks(ignored_layers=["re:^img_mlp"])(x)
    assert len(unquantized(m)) == 4
    assert not [w for w in recwarn if issubclass(w.category, fp8_compile.UnmatchedPatternWarning)]

    m = model(2)
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match=r"'re:\^img_mlp' matched none of the 8 linears"):
        m.compile_whole(ignored_layers=["re:^img_mlp"])(x)
    assert unquantized(m) == {}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: nn.DataParallel(m),
        lambda m: nn.Sequential(m)[0],
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.optim.swa_utils.AveragedModel(m),
    ],
    ids=["DataParallel", "none", "OptimizedModule", "AveragedModel"],
)
def test_wrappers_are_no_part_of_a_path(wrap: Callable[[nn.Module], nn.Module]) -> None:
    outer = wrap(model(1))
    m = next(module for module in outer.modules() if isinstance(module, Model))
    names = Tree(outer).names
    assert names == ("blocks.0.to_q", "blocks.0.to_k", "blocks.0.img_mlp.0", "blocks.0.img_mlp.2")
    m.compile(**BACKEND, options=options(r"re:^blocks\.0\.to_q$"))
    outer(tokens())
    assert list(unquantized(m)) == ["blocks.0.to_q"]


def test_a_layer_that_is_called_module_keeps_its_name() -> None:
    m = nn.ModuleDict({"module": nn.Linear(WIDTH, WIDTH), "other": nn.Linear(WIDTH, WIDTH)})
    assert Tree(m).names == ("module", "other")


def test_a_model_that_holds_itself() -> None:
    m = model(1)
    m.blocks[0].parent = m
    m.compile(**BACKEND, options=options("to_q"))
    m(tokens())
    assert list(unquantized(m)) == ["blocks.0.to_q"]
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_q"]})
    assert sum(isinstance(p, fp8_compile.QuantizedWeight) for p in m.parameters()) == 3


class Wrapping(nn.Module):
    """Has a part that is called as that of ``DataParallel`` is, or any other way."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, model(2))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)  # type: ignore[no-any-return]


def test_a_pattern_that_the_conversion_does_not_follow_is_no_silence() -> None:
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="'module.blocks.0' matched none"):
        fp8_compile.quantize_(Wrapping("module"), {**LOAD, "ignored_layers": ["module.blocks.0"]})


def test_the_linears_that_a_pattern_does_not_match_are_counted_once() -> None:
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="matched none of the 8 linears of this model"):
        model(2).compile_blocks(ignored_layers=["zzz"])(tokens())
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="matched none of the 1 linears of this graph"):
        torch.compile(Holder().product, **BACKEND, options=options("zzz"))(tokens())


@pytest.mark.parametrize(("name", "pattern"), [("module", "module.blocks.0"), ("part", r"re:^blocks\.0")])
def test_a_pattern_that_means_no_path_but_one_in_the_graph_is_no_silence(name: str, pattern: str) -> None:
    m = Wrapping(name)
    part = getattr(m, name)
    part.forward = torch.compile(part.forward, **BACKEND, options=options(pattern))
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="matched none of the 8 linears"):
        m(tokens())
    assert unquantized(m) == {}


@pytest.mark.parametrize(("pattern", "kept"), [((), set()), (("second",), {"first", "second"})])
def test_a_module_with_two_paths_is_no_shared_weight(
    pattern: tuple[str, ...], kept: set[str], recwarn: pytest.WarningsRecorder
) -> None:
    m, shared = nn.Sequential(), nn.Linear(WIDTH, WIDTH)
    for name, part in {"first": shared, "between": nn.Linear(WIDTH, WIDTH), "second": shared}.items():
        m.add_module(name, part)
    fp8_compile.quantize_(m.bfloat16(), {**LOAD, "ignored_layers": list(pattern)})
    assert set(unquantized(m)) == kept
    assert not [w for w in recwarn if issubclass(w.category, fp8_compile.UnmatchedPatternWarning)]


class Own(nn.Module):
    """A linear that is no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_pattern_for_what_is_no_nn_linear_is_not_misspelt(recwarn: pytest.WarningsRecorder) -> None:
    parts = nn.Sequential(nn.ModuleDict({"q_proj": nn.Linear(WIDTH, WIDTH)}), nn.ModuleDict({"k_proj": Own()}))
    m, x = parts.bfloat16(), tokens()
    for part, name in zip(m, ("q_proj", "k_proj"), strict=True):
        part.forward = torch.compile(lambda x, p=part[name]: p(x), **BACKEND, options=options("k_proj"))
    m(x)
    assert unquantized(m) == {"1.k_proj": "ignored_layers: k_proj"}
    assert not [w for w in recwarn if issubclass(w.category, fp8_compile.UnmatchedPatternWarning)]


class Listed(nn.Module):
    """A block with a list of layers, which knows its model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))


def test_a_list_in_a_block_that_knows_its_model_keeps_its_name() -> None:
    m = nn.Module()
    m.blocks = nn.ModuleList(Listed() for _ in range(2)).bfloat16()
    for block in m.blocks:
        block.parent = m
    assert Tree(m).names == tuple(f"blocks.{i}.layers.{j}" for i in range(2) for j in range(2))


class Scripted(nn.Module):
    """A part of it is TorchScript, whose containers are no dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.script = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_k(self.to_q(x))
        torch._dynamo.graph_break()
        return self.script(x)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("at_load", [False, True])
def test_a_part_that_is_torchscript(at_load: bool) -> None:
    m, x = Scripted().bfloat16(), tokens()
    if at_load:
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_q"]})
    m.compile(**BACKEND, options=OPTIONS if at_load else options("to_q"))
    assert torch.equal(m(x), m(x))
    assert unquantized(m) == {"to_q": "ignored_layers: to_q"}


class TiedToItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)  # type: ignore[no-any-return]


def test_a_model_whose_own_parameter_is_tied_is_freed() -> None:
    m = TiedToItself()
    tree = Tree(m)
    assert tree.layer(m.head, "weight").paths == ("head", "") or tree.layer(m.head, "weight").paths == ("", "head")
    m.compile(**BACKEND, options=options())
    m.bfloat16()(tokens())
    gone = weakref.ref(m)
    del m, tree
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


class Outer(nn.Module):
    """Runs a model that is no part of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.own, self.inner = nn.Linear(WIDTH, WIDTH), [inner]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)  # type: ignore[no-any-return]


def test_the_tree_of_a_module_that_runs_and_owns_nothing_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    m, made = model(3), []
    init = Tree.__init__

    def counted(self: Tree, root: nn.Module) -> None:
        made.append(type(root))
        init(self, root)

    monkeypatch.setattr(Tree, "__init__", counted)
    m.compile(**BACKEND, options=options("to_q"))
    outer = Outer(m)
    outer(tokens())
    assert made.count(Outer) <= 2
    assert len(unquantized(m)) == 3


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_k(self.to_q(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pattern", ["own", "re:^to_q$"])
def test_two_modules_on_the_stack_that_own_a_layer_by_different_paths(pattern: str) -> None:
    m = Pair().bfloat16()
    outer = Outer(m)
    outer.own = m.to_q
    m.compile(**BACKEND, options=options(pattern))
    before, x = graphs(), tokens()
    first = outer(x)
    assert torch.equal(outer(x), first)
    assert (graphs() - before, set(unquantized(m))) == (1, {"to_q"} if pattern == "own" else set())


class Unregistered(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = list(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_part_that_ran_by_itself_before_it_ran_in_a_list_that_is_no_module() -> None:
    blocks, x = [Pair().bfloat16() for _ in range(2)], tokens()
    torch.compile(blocks[0], **BACKEND, options=options("blocks.0"))(x)
    run = torch.compile(Unregistered(*blocks), **BACKEND, options=options("blocks.0"))
    before, expected = graphs(), run(x)
    assert torch.equal(run(x), expected)
    assert graphs() - before == 1


ODD = ["a-b", "a b", "é", "é✨", "it's", 'a"b', "x]y", "1a", "a:b", "a/b", "\n", "a\\b", "weight", "up-blocks", "a[0]"]


class Odd(nn.Module):
    def __init__(self, name: str, how: str) -> None:
        super().__init__()
        self.how, self.name = how, name
        parts = {name: nn.Linear(WIDTH, WIDTH), "other": nn.Linear(WIDTH, WIDTH)}
        if how == "attribute":
            for key, part in parts.items():
                self.add_module(key, part)
        else:
            self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute":
            return self.other(getattr(self, self.name)(x))  # type: ignore[no-any-return]
        for part in self.parts.values():
            x = part(x)
        return x


@pytest.mark.parametrize("how", ["dict", "attribute"])
@pytest.mark.parametrize("name", ODD)
def test_a_name_that_is_no_identifier(name: str, how: str) -> None:
    m = Odd(name, how).bfloat16()
    path = name if how == "attribute" else f"parts.{name}"
    m.compile(**BACKEND, options=options(path))
    m(tokens())
    assert list(unquantized(m)) == [path]
    assert fp8_compile.report(m).totals["quantized"] == 1


@pytest.mark.parametrize("pattern", ["first", "second.*", "re:^second"])
def test_a_tied_weight_stays_if_any_of_its_names_is_named(pattern: str) -> None:
    m = nn.Sequential()
    m.add_module("first", nn.Linear(WIDTH, WIDTH))
    m.add_module("second", nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    m.add_module("third", nn.Linear(WIDTH, WIDTH))
    m.bfloat16()
    m.second[0].weight = m.first.weight
    opaque(m).compile(**BACKEND, options=options(pattern))
    m(tokens())
    m(tokens())
    assert unquantized(m) == dict.fromkeys(["first", "second.0"], f"ignored_layers: {pattern}")


# --- one graph, several decisions ---


def test_one_graph_serves_the_blocks_that_agree() -> None:
    m, x = model(6), tokens()
    before = graphs()
    m.compile_blocks(ignored_layers=["blocks.2.*", "blocks.4.img_mlp"])
    first = m(x)
    assert graphs() - before == 3
    assert torch.equal(m(x), first)
    assert graphs() - before == 3
    assert {path for path in unquantized(m)} == {
        *(f"blocks.2.{name}" for name in ("to_q", "to_k", "img_mlp.0", "img_mlp.2")),
        *(f"blocks.4.{name}" for name in ("img_mlp.0", "img_mlp.2")),
    }


def test_two_lists_of_patterns_on_one_model() -> None:
    m, x = model(2), tokens()
    outputs = {}
    for pattern in ("to_q", "img_mlp", "to_q", "img_mlp"):
        for block in m.blocks:
            block._compiled_call_impl = None
        m.compile_blocks(ignored_layers=[pattern])
        again = m(x)
        assert torch.equal(outputs.setdefault(pattern, again), again)
    assert not torch.equal(outputs["to_q"], outputs["img_mlp"])


def test_a_module_that_moves_to_another_place_is_decided_on_anew() -> None:
    m, x = model(2), tokens()
    m.compile_blocks(ignored_layers=["blocks.0.*"])(x)
    m.blocks = nn.ModuleList(reversed(m.blocks))
    for block in m.blocks:
        block._compiled_call_impl = None
    m.compile_whole(ignored_layers=["blocks.0.*"])
    expected = copy.deepcopy(m).compile_whole(ignored_layers=["blocks.0.*"])
    assert torch.equal(m(x), expected(x))
    assert torch.equal(m(x), expected(x))


def test_threads_that_bind_at_once() -> None:
    models, x = [model(2) for _ in range(4)], tokens()
    expected = [copy.deepcopy(m) for m in models]
    for m in expected:
        m.compile_blocks(ignored_layers=["blocks.0.img_mlp"])
    wanted = [[m(x), m(x)][1] for m in expected]  # the first may run as written
    outputs: dict[int, Tensor] = {}

    def run(i: int) -> None:
        with torch.no_grad():
            outputs[i] = models[i](x)

    for m in models:
        m.compile_blocks(ignored_layers=["blocks.0.img_mlp"])
    for _ in range(3):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [torch.equal(outputs[i], wanted[i]) for i in range(4)] == [True] * 4
    assert [sorted(unquantized(m)) for m in models] == [["blocks.0.img_mlp.0", "blocks.0.img_mlp.2"]] * 4


@pytest.mark.inductor
def test_the_one_call_as_written_in_a_mode_with_cuda_graphs() -> None:
    """On a CPU there are no CUDA graphs; the mode's other settings and the order of calls are the same."""
    m, other, x = model(1), model(1), tokens()
    other.load_state_dict(m.state_dict())
    inductor = {"min_features": WIDTH, "mode": "reduce-overhead"}
    fp8_compile.quantize_(m, LOAD)
    fp8_compile.quantize_(other, {**LOAD, "ignored_layers": ["img_mlp"]})
    for one in (m, other):
        opaque(one).compile(**BACKEND, options=inductor)
    with torch._dynamo.config.patch(recompile_limit=64):
        outputs = [one(x) for one in (m, other, m, other, m, other)]
    assert torch.equal(outputs[0], outputs[4])
    assert torch.equal(outputs[3], outputs[5])
    assert sorted(unquantized(other)) == ["blocks.0.img_mlp.0", "blocks.0.img_mlp.2"]


def test_dynamo_is_at_its_limit() -> None:
    m = nn.Sequential(*(nn.Linear(WIDTH, WIDTH + 16 * i) for i in range(4)), nn.Flatten()).bfloat16()
    each = opaque(nn.ModuleList(m[:4]))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each = each

        def forward(self, x: Tensor) -> list[Tensor]:
            return [linear(x) for linear in self.each]  # type: ignore[operator]

    m = Model()
    m.compile(**BACKEND, options=OPTIONS)
    with (
        torch._dynamo.config.patch(recompile_limit=3),
        pytest.warns(fp8_compile.RecompileLimitWarning, match=r"compiled 3 graphs of Linear.forward"),
    ):
        m(tokens())
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert [rows[f"each.{i}"].decision for i in range(4)] == ["quantized"] * 3 + ["unquantized"]
    assert "recompile_limit of 3 was reached in Linear.forward" in rows["each.3"].reason


# --- parameters that no module holds ---


class Holder:
    """No module, though it holds a parameter by a name that no pattern can mean."""

    def __init__(self) -> None:
        self.weight = loose()

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_what_nothing_names_stays_where_patterns_were_given() -> None:
    held, x = Holder(), tokens()
    expected = held.product(x)
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="nothing names this layer, and a pattern may"):
        assert torch.equal(torch.compile(held.product, **BACKEND, options=options("img_mlp"))(x), expected)
    assert not torch.equal(torch.compile(held.product, **BACKEND, options=options())(x), expected)
    with pytest.raises(BackendCompilerFailed, match="'img_mlp': nothing names the layers of"):
        torch.compile(held.product, **BACKEND, options=options("img_mlp", strict=True))(x)


def test_a_variable_of_a_function_is_a_name() -> None:
    def product(x: Tensor, to_q: Tensor, to_k: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, to_q), to_k)

    weights = [loose() for _ in range(2)]
    seen = torch.compile(product, **BACKEND, options=options("to_q"))
    expected = torch.compile(product, **BACKEND, options=options())
    x = tokens()
    outputs = seen(x, *weights), expected(x, *weights), product(x, *weights)
    assert len({output.float().sum().item() for output in outputs}) == 3


def loose() -> nn.Parameter:
    return nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16), requires_grad=False)


# --- what a model remembers ---


def copied(m: Model, folder: Path) -> Model:
    return copy.deepcopy(m)


def pickled(m: Model, folder: Path) -> Model:
    return pickle.loads(pickle.dumps(m))  # type: ignore[no-any-return]


def saved(m: Model, folder: Path) -> Model:
    torch.save(m, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)  # type: ignore[no-any-return]


def assigned(m: Model, folder: Path) -> Model:
    m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    return m


def new_parameters(m: Model, folder: Path) -> Model:
    for block in m.blocks:
        block.to_q.weight = nn.Parameter(block.to_q.weight * 1.0, requires_grad=False)
    return m


def swapped(m: Model, folder: Path) -> Model:
    return applied(m, torch.__future__.set_swap_module_params_on_conversion)


def overwritten(m: Model, folder: Path) -> Model:
    return applied(m, torch.__future__.set_overwrite_module_params_on_conversion)


def applied(m: Model, switch: Callable[[bool], None]) -> Model:
    switch(True)
    try:
        return m._apply(lambda t: t.clone())
    finally:
        switch(False)


@pytest.mark.parametrize("act", [copied, pickled, saved, assigned, new_parameters, swapped, overwritten])
@pytest.mark.parametrize("way", [whole, leaves])
def test_what_was_kept_stays_kept(
    act: Callable[[Model, Path], Model], way: Callable[[Model], Callable[..., Any]], tmp_path: Path
) -> None:
    m = model(2)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_q"]})
    m = act(m, tmp_path)
    (opaque(m) if way is leaves else m).compile(**BACKEND, options=OPTIONS)
    with torch._dynamo.config.patch(recompile_limit=64):
        m(tokens())
        m(tokens())
    assert unquantized(m) == dict.fromkeys(["blocks.0.to_q", "blocks.1.to_q"], "ignored_layers: to_q")


def test_a_fused_layer_stays_if_one_that_it_was_made_of_would() -> None:
    for pattern, stays in (("to_q", True), ("to_qkv", True), ("img_mlp", False)):
        m = model(1)
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": [pattern]})
        m.blocks[0].to_qkv = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.bfloat16)
        m.blocks[0].forward = lambda x, block=m.blocks[0]: block.to_qkv(x)
        m.compile(**BACKEND, options=OPTIONS)
        m(tokens())
        m(tokens())
        assert ("blocks.0.to_qkv" in unquantized(m)) == stays


def test_quantized_weights_without_a_record_leave_their_neighbours_alone() -> None:
    m = model(1)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_q"]})
    other = model(1)
    other.load_state_dict(m.state_dict(), assign=True)
    other.compile(**BACKEND, options=OPTIONS)
    other(tokens())
    assert unquantized(other) == {
        "blocks.0.to_q": "the model holds quantized weights, and no record of what was to be kept"
    }


def test_a_part_that_was_quantized_says_nothing_of_the_others() -> None:
    m = model(2)
    fp8_compile.quantize_(m.blocks[0], {**LOAD, "ignored_layers": ["to_k"]})
    m.compile(**BACKEND, options=OPTIONS)
    m(tokens())
    assert unquantized(m) == {"blocks.0.to_k": "ignored_layers: to_k"}


def test_options_of_both_conversions_are_remembered() -> None:
    m = model(2)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_k", "blocks.1.*"]})
    record = record_of(m)
    assert record is not None
    assert record.options == {"min_features": WIDTH, "ignored_layers": ["to_k", "blocks.1.*"]}
    assert len(record.kept) == 5
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["blocks.1.img_mlp"]})
    record = record_of(m)
    assert record is not None
    assert record.options["ignored_layers"] == ["to_k", "blocks.1.*", "blocks.1.img_mlp"]
    assert len(record.kept) == 5


def test_a_conversion_after_compilation_is_asked_for_by_graphs_that_exist() -> None:
    """The graph of the layer that is kept now was made, and bound, when it was not."""
    m, x = opaque(model(1)), tokens()
    m.compile(**BACKEND, options=OPTIONS)
    m(x)
    assert unquantized(m) == {}
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_q"]})
    to_q = m.blocks[0].to_q
    expected = to_q.forward(x)
    seen = []
    to_q.register_forward_hook(torch._dynamo.disable(lambda module, args, output: seen.append((args[0], output))))
    with torch._dynamo.config.patch(recompile_limit=64):
        m(x)
        m(x)
    assert [torch.equal(nn.functional.linear(a, to_q.weight, to_q.bias), y) for a, y in seen] == [True, True]
    assert expected.shape == seen[0][1].shape


class Blocks(nn.Module):
    """What cache-dit puts in place of a list of blocks while the model runs."""

    def __init__(self, owner: nn.Module, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.owner, self.list = owner, blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.list:
            x = block(x)
        return x


def test_a_stand_in_for_a_list_of_blocks_is_no_part_of_a_path() -> None:
    m = model(2)
    m.blocks = nn.ModuleList([Blocks(m, m.blocks)])
    assert Tree(m).names[:2] == ("blocks.0.to_q", "blocks.0.to_k")
    assert Tree(m).names[4:6] == ("blocks.1.to_q", "blocks.1.to_k")


def test_a_pattern_that_is_misspelt_is_an_error_wherever_the_graph_breaks() -> None:
    m = opaque(model(1))
    m.compile(**BACKEND, options=options("img_mpl"))
    with pytest.raises(BackendCompilerFailed, match="did you mean 'img_mlp'"):
        m(tokens())


def test_the_strict_option_asks_of_the_model_and_not_of_each_piece() -> None:
    m = opaque(model(1))
    m.compile(**BACKEND, options=options("img_mlp", strict=True))
    m(tokens())
    assert len(unquantized(m)) == 2
    m = opaque(model(1))
    m.compile(**BACKEND, options=options("*", strict=True))
    with pytest.raises(BackendCompilerFailed, match="none of the 1 linears of this graph was quantized"):
        m(tokens())


@pytest.mark.filterwarnings("ignore::fp8_compile.NothingConvertedWarning")
def test_a_part_that_runs_by_itself_still_knows_what_stays() -> None:
    m, x = model(2), tokens()
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["blocks.0"]})
    for part in (m.blocks[0], copy.deepcopy(m.blocks[0])):
        expected = part(x)
        part.compile(**BACKEND, options=OPTIONS)
        assert torch.equal(part(x), expected)
        assert set(unquantized(part).values()) == {"ignored_layers: blocks.0"}


def test_a_compiled_model_is_converted_for_itself() -> None:
    m = model(1)
    fp8_compile.quantize_(torch.compile(m, backend="eager"), {**LOAD, "ignored_layers": ["to_q"]})
    record = record_of(m)
    assert record is not None
    assert record.kept == {"blocks.0.to_q": "ignored_layers: to_q"}


class Taking(nn.Module):
    """Hands its weights to a compiled function, which takes them out of no module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.product = torch.compile(lambda x, w: nn.functional.linear(x, w), **BACKEND, options=options("a"))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.product(x, self.a.weight), self.b.weight)  # type: ignore[no-any-return]


def test_parameters_that_a_function_is_given_find_their_graphs(caplog: pytest.LogCaptureFixture) -> None:
    m, x = Taking().bfloat16(), tokens()
    for _ in range(3):
        m(x)
    rows = {row.path: row.decision for row in fp8_compile.report(m).layers}
    assert rows == {"a": "unquantized", "b": "quantized"}
    caplog.set_level("INFO", logger="fp8_compile")
    m(x)
    assert "run once as written" not in caplog.text


class Pipe:
    """As a pipeline: no module, though it calls one."""

    def __init__(self, m: Model) -> None:
        self.model = m

    def __call__(self) -> bool:
        latents = tokens()
        alive = weakref.ref(latents)
        self.model(tokens())
        del latents
        return alive() is not None


def test_the_variables_of_callers_are_not_kept_alive() -> None:
    assert not Pipe(model(1).compile_whole())()


def test_a_second_conversion_decides_on_what_could_not_be_converted() -> None:
    m = model(1)
    to_q = m.blocks[0].to_q
    kept = to_q.weight[0, 0].clone()
    to_q.weight[0, 0] = float("nan")
    with pytest.raises(fp8_compile.NonFiniteWeightError):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_k"]})
    to_q.weight[0, 0] = kept
    fp8_compile.quantize_(m, LOAD)
    assert unquantized(m) == {"blocks.0.to_k": "ignored_layers: to_k"}
    m = model(1)
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        fp8_compile.quantize_(m, {"min_features": 512})
    fp8_compile.quantize_(m, LOAD)
    assert unquantized(m) == {}


def test_a_function_whose_code_has_no_hash_may_call_a_graph() -> None:
    """As those that Dynamo writes to go on after a graph break, with a dict among their constants."""

    def calling() -> object:
        return "asked", Namer({}).find({})

    constants: tuple[Any, ...] = (*calling.__code__.co_consts, {"no": "hash"})
    calling.__code__ = calling.__code__.replace(co_consts=constants)
    with pytest.raises(TypeError, match="unhashable"):
        hash(calling.__code__)
    assert calling() == ("asked", ({}, []))
