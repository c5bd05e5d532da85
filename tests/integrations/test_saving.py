"""Files that are written: whole, with the model's own names, or refused in words."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fp8_compile
from fp8_compile import QuantizedWeight
from tests.support.blocks import LOAD, WIDTH, Model, model, tokens

FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def quantized() -> Model:
    m = model(1)
    fp8_compile.quantize_(m, LOAD)
    return m


def test_an_interrupted_save_leaves_the_old_file_whole(
    quantized: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()
    original = safetensors.torch.save_file

    def interrupted(tensors: Any, path: str, **how: Any) -> None:
        original(tensors, path, **how)
        with open(path, "r+b") as file:
            file.truncate(1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    quantized.blocks[0].to_q.weight.mul_(2)
    with pytest.raises(KeyboardInterrupt):
        fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_a_killed_process_left_goes_with_the_next_save(quantized: Model, tmp_path: Path) -> None:
    code = f"""
        import os, signal, fp8_compile
        from tests.support.blocks import LOAD, model
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        fp8_compile.quantize_(m := model(1), LOAD)
        fp8_compile.save_fp8_checkpoint(m, {str(tmp_path / FILE)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / FILE).exists()
    fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_save_leaves_the_scratch_folder_of_one_that_is_still_at_work(
    quantized: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = safetensors.torch.save_file

    def with_another_inside(tensors: Any, path: str, **how: Any) -> None:
        monkeypatch.setattr(safetensors.torch, "save_file", original)
        fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
        assert Path(path).parent.exists()
        original(tensors, path, **how)

    monkeypatch.setattr(safetensors.torch, "save_file", with_another_inside)
    fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    quantized: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    assert Path(done[0]).parent.parent == tmp_path
    assert [Path(done[0]).name, *done[1:]] == [FILE, "replace", str(tmp_path)]


def test_a_link_stays_a_link_and_rights_stay_as_they_were(quantized: Model, tmp_path: Path) -> None:
    target, link = tmp_path / FILE, tmp_path / "link.safetensors"
    target.write_bytes(b"")
    target.chmod(0o640)
    link.symlink_to(target)
    fp8_compile.save_fp8_checkpoint(quantized, link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    fp8_compile.load_fp8_checkpoint(model(1), target)


def test_a_new_file_is_as_readable_as_any_other(quantized: Model, tmp_path: Path) -> None:
    fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / FILE).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_is_no_file_is_not_replaced(quantized: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(fp8_compile.CheckpointError, match="is no regular file") as error:
            fp8_compile.save_fp8_checkpoint(quantized, path)
        assert error.value.files == (str(path),)
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), safetensors.SafetensorError("IoError")])
def test_what_cannot_be_written_is_named(
    quantized: Model, tmp_path: Path, problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(fp8_compile.CheckpointError, match=rf"{FILE}: cannot be written: .*(No space|IoError)"):
        fp8_compile.save_fp8_checkpoint(quantized, tmp_path / FILE)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(fp8_compile.CheckpointError, match=r"cannot be written: .*No such file or directory"):
        fp8_compile.save_fp8_checkpoint(quantized, tmp_path / "missing" / FILE)


def test_a_model_without_values_is_refused_and_one_without_fp8_is_said(tmp_path: Path) -> None:
    with torch.device("meta"):
        m = Model(1).bfloat16()
    with pytest.raises(fp8_compile.CheckpointError, match=r"'blocks.0.to_q.weight' of the model is on the meta device"):
        fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="no weight of the model is in FP8") as told:
        fp8_compile.save_fp8_checkpoint(model(1), tmp_path / FILE)
    assert told[0].filename == __file__


def test_of_a_directory_with_several_variants_one_is_asked_for(quantized: Model, tmp_path: Path) -> None:
    for name in ("a.fp8.safetensors", "a.safetensors"):
        fp8_compile.save_fp8_checkpoint(quantized, tmp_path / name)
    with pytest.raises(
        fp8_compile.CheckpointError, match=r"is also in .*; of the files of several variants, give those"
    ):
        fp8_compile.load_fp8_checkpoint(model(1), tmp_path)


def compiled_blocks(m: nn.Module) -> nn.Module:
    for i, block in enumerate(m.blocks):  # type: ignore[arg-type,union-attr]
        m.blocks[i] = torch.compile(block, backend="eager")  # type: ignore[operator,union-attr]
    return m


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda m: m,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "compiled blocks": compiled_blocks,
    "DataParallel": nn.DataParallel,
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("writer", WRAPPERS)
@pytest.mark.parametrize("reader", ["nothing", "both"])
def test_names_in_a_file_are_the_models_own_whatever_is_around_it(writer: str, reader: str, tmp_path: Path) -> None:
    wrapped = WRAPPERS[writer](model(2))
    fp8_compile.quantize_(wrapped, LOAD)
    fp8_compile.save_fp8_checkpoint(wrapped, tmp_path / FILE)
    names = {name.removesuffix("_scale") for name in load_file(tmp_path / FILE)}
    assert names == set(model(2).state_dict())
    back = model(2)
    fp8_compile.load_fp8_checkpoint(WRAPPERS[reader](back), tmp_path / FILE)
    x = tokens()
    inside = wrapped.module if isinstance(wrapped, nn.DataParallel) else wrapped
    assert torch.equal(back(x), inside(x))


def test_a_peft_model_is_written_as_the_model_that_its_adapters_are_in(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
    m: Any = get_peft_model(model(2), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    fp8_compile.quantize_(m, LOAD)
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    other = model(2)
    inject_adapter_in_model(config, other)
    again: Any = get_peft_model(model(2), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    assert {name.removesuffix("_scale") for name in load_file(tmp_path / FILE)} == set(other.state_dict())
    x = tokens()
    for reader in (other, again):
        fp8_compile.load_fp8_checkpoint(reader, tmp_path / FILE)
        assert torch.equal(reader(x), m(x))


def test_safetensors_alone_refuses_a_quantized_weight_and_says_what_can_write_it(
    quantized: Model, tmp_path: Path
) -> None:
    with pytest.raises(fp8_compile.QuantizedWeightError, match=r"save_fp8_checkpoint.*quantize_\(model\)"):
        save_file(quantized.state_dict(), tmp_path / FILE)


def tied() -> Model:
    m = model(2)
    m.blocks[1].to_q.weight = m.blocks[0].to_q.weight
    return m


@pytest.mark.parametrize("build", [tied, lambda: model(2)])
def test_tied_weights_are_tied_when_they_are_read(build: Callable[[], Model], tmp_path: Path) -> None:
    fp8_compile.quantize_(m := tied(), LOAD)
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    assert "blocks.1.to_q.weight" in load_file(tmp_path / FILE)  # for readers that know nothing of this
    fp8_compile.load_fp8_checkpoint(back := build(), tmp_path / FILE)
    assert isinstance(back.blocks[0].to_q.weight, QuantizedWeight)
    assert back.blocks[0].to_q.weight is back.blocks[1].to_q.weight
    assert back.blocks[0].to_k.weight is not back.blocks[1].to_k.weight
    x = tokens()
    assert torch.equal(back(x), m(x))


def test_a_tie_that_the_file_does_not_bear_out_is_none(tmp_path: Path) -> None:
    fp8_compile.quantize_(m := tied(), LOAD)
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    with safetensors.safe_open(tmp_path / FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / FILE)
    tensors["blocks.1.to_q.weight_scale"] *= 2
    save_file(tensors, tmp_path / FILE, metadata)
    fp8_compile.load_fp8_checkpoint(back := tied(), tmp_path / FILE)
    first, second = (back.blocks[i].to_q.weight for i in range(2))
    assert torch.equal(first.scale * 2, second.scale)  # type: ignore[union-attr]


# --- in the formats of others ---


@pytest.mark.parametrize(
    ("format", "granularity", "static", "scheme"),
    [
        ("compressed-tensors", "row", False, "fp8-row"),
        ("compressed-tensors", "row", True, "fp8-row-static"),
        ("compressed-tensors", "tensor", True, "fp8-tensor-static"),
        ("modelopt", "row", False, "fp8-row"),
        ("modelopt", "tensor", True, "fp8-tensor-static"),
        ("comfyui", "tensor", False, "fp8-tensor"),
        ("comfyui", "tensor", True, "fp8-tensor-static"),
    ],
)
def test_what_is_written_for_others_is_read_as_theirs_is(
    format: str, granularity: str, static: bool, scheme: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"activation_scheme": "static", "input_scale": 0.01} if static else {}
    fp8_compile.quantize_(m := model(1), {**LOAD, "granularity": granularity, **options})
    fp8_compile.save_fp8_checkpoint(m, file := tmp_path / "theirs.safetensors", format=format)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        name = "blocks.0.to_q"
        shapes = {n: opened.get_slice(n).get_shape() for n in opened.keys() if n.startswith(name)}  # noqa: SIM118
    one = [1] if format == "compressed-tensors" else []
    rows = [WIDTH, 1] if format == "compressed-tensors" else [WIDTH]
    assert shapes == {
        f"{name}.weight": [WIDTH, WIDTH],
        f"{name}.bias": [WIDTH],
        f"{name}.weight_scale": rows if granularity == "row" else one,
        **({f"{name}.input_scale": one} if static else {}),
        **({f"{name}.comfy_quant": [27]} if format == "comfyui" else {}),
    }
    fp8_compile.load_fp8_checkpoint(again := model(1), file)
    x = tokens()
    assert torch.equal(m(x), again(x))
    eager = {"inner_backend": "eager"}  # quicker to compile
    assert torch.equal(m.compile_whole(**eager)(x), again.compile_whole(**eager)(x))
    assert {row.scheme for row in fp8_compile.report(again).layers} == {scheme}


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("comfyui", {}, r"'blocks.0.to_q.weight' has a scale per row, and ComfyUI reads one in all"),
        ("modelopt", {"granularity": "tensor"}, "has one scale in all and dynamic activations"),
        ("modelopt", {"activation_scheme": "static", "input_scale": 0.1}, "with dynamic activations only"),
        ("compressed-tensors", {"method": "int8"}, r"is of Int8\(.*; compressed-tensors has FP8 weights with one"),
        ("comfyui", {"weight_block_size": [128, 128]}, "comfyui has FP8 weights with one scale in all or one per row"),
    ],
)
def test_what_others_cannot_read_is_refused(format: str, options: Any, message: str, tmp_path: Path) -> None:
    fp8_compile.quantize_(m := model(1), {**LOAD, **options})
    with pytest.raises(fp8_compile.QuantizedWeightError, match=message):
        fp8_compile.save_fp8_checkpoint(m, tmp_path / "theirs.safetensors", format=format)
    assert not list(tmp_path.iterdir())


def test_a_format_that_nobody_knows(quantized: Model, tmp_path: Path) -> None:
    with pytest.raises(fp8_compile.OptionError, match=r"format='comfy' is not valid, did you mean 'comfyui'\?"):
        fp8_compile.save_fp8_checkpoint(quantized, tmp_path / "theirs.safetensors", format="comfy")
