"""The command lines, ours and diffusers', on the embedded pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fp8_compile

pytestmark = pytest.mark.pipeline

PROMPT = "a red circle on a white background"
COMMAND = [sys.executable, "-m", "fp8_compile", "text-to-image", PROMPT]
SMALL = ["--height", "64", "--width", "64", "--steps", "2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, *arguments: object, status: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def difference(a: Path, b: Path) -> float:
    from PIL import ImageChops, ImageStat

    pictures = [Image.open(path).convert("RGB") for path in (a, b)]
    return max(ImageStat.Stat(ImageChops.difference(*pictures)).mean)


def test_a_picture_in_fp8_and_its_unquantized_twin(cache: Path, tmp_path: Path) -> None:
    fp8, again, plain = (tmp_path / f"{name}.png" for name in ("fp8", "again", "plain"))
    told = run(cache, *SMALL, "--quantization", "fp8", "--ignored-layers", "img_mlp", "--output", fp8)
    assert re.search(
        r"transformer: 24 layers quantized, 10 unquantized; weights read per step 10\.2 MB -> 6\.5 MB, both in memory",
        told,
    )
    assert re.search(r"compiling \d+\.\d s, \d\.\d{3} s per step", told)
    run(cache, *SMALL, "--ignored-layers", "img_mlp", "--output", again)
    told = run(cache, *SMALL, "--no-quantization", "--output", plain)
    assert "unquantized" in told
    assert Image.open(fp8).size == (64, 64)
    assert difference(fp8, again) == 0
    assert 0 < difference(fp8, plain) < 6


@pytest.mark.slow
def test_a_pipeline_of_the_users_own_compiled_whole_with_a_table_of_layers(cache: Path, tmp_path: Path) -> None:
    from bench.tiny import build_qwen_image

    build_qwen_image(seed=1).save_pretrained(tmp_path / "own")
    options = ["--model", tmp_path / "own", "--whole", "--granularity", "tensor", "--show-layers", "--steps", 2]
    told = run(cache, *options, "--height", 64, "--width", 64, "--output", tmp_path / "own.png")
    assert re.search(r"transformer_blocks\.\*\.attn\.to_q +2 +256 +256 +quantized +fp8-tensor", told)
    assert "s per step" in told


def test_options_reach_the_backend_and_what_others_keep_stays_by_default(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bench.tiny import build_qwen_image
    from fp8_compile.cli.main import app

    build_qwen_image().save_pretrained(tmp_path / "own")
    arguments = ["text-to-image", PROMPT, "--model", tmp_path / "own", "--steps", 2, "--height", 64, "--width", 64]
    arguments += ["--inner-backend", "eager", "--output", tmp_path / "own.png"]
    told = []
    for more in ([], ["--small-m", "keep", "--ignored-layers", "txt_mlp"], ["--ignored-layers", "none"]):
        done = CliRunner().invoke(app, [str(a) for a in [*arguments, *more]])
        assert done.exit_code == 0, done.output
        told.append(done.output)
    assert "QwenImageTransformer2DModel: keeps img_mlp, as others recommend" in told[0]
    assert "24 layers quantized, 10 unquantized" in told[0]
    # Without the four of txt_mlp and the four of modulation.
    assert "20 layers quantized, 14 unquantized" in told[1]
    assert "28 layers quantized, 6 unquantized" in told[2]
    assert "as others recommend" not in told[1] + told[2]


def test_a_step_cache_and_a_text_encoder_in_fp8_are_told(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fp8_compile.cli.main import app

    arguments = ["text-to-image", PROMPT, "--inner-backend", "eager", "--output", str(tmp_path / "out.png")]
    arguments.append("--no-quantization")  # of the transformer
    more = ["--cache", "taylorseer-lite", "--text-encoder-quantization", "fp8"]
    with torch._dynamo.config.patch(recompile_limit=8):  # as it was, afterwards
        done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 0, done.output
    assert "step cache taylorseer-lite: steps that change little are not computed in full" in done.output
    told = (
        r"text_encoder \(Qwen2_5_VLForConditionalGeneration\): \d+ weights quantized, (.*) MB -> (.*) MB, which saves"
    )
    found = re.search(told, done.output)
    assert found is not None, done.output
    assert float(found[2]) < float(found[1])
    for bad, message in (
        (["--cache", "faster"], "'faster' is not offered"),
        (["--cache", "tea"], "'tea' is not valid"),
    ):
        done = CliRunner().invoke(app, [*arguments, *bad])
        assert done.exit_code == 2
        assert message in done.output


def test_a_plan_from_a_file_and_block_scales(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bench.tiny import build_qwen_image
    from fp8_compile.cli.main import app

    build_qwen_image().save_pretrained(tmp_path / "own")
    (tmp_path / "plan.toml").write_text('"img_mod" = "keep"\n["transformer_blocks.0.txt_mlp"]\nmethod = "int8"\n')
    (tmp_path / "plan.json").write_text('{"img_mod": "keep", "transformer_blocks.0.txt_mlp": {"method": "int8"}}')
    arguments = ["text-to-image", PROMPT, "--model", tmp_path / "own", "--steps", 2, "--height", 64, "--width", 64]
    arguments += ["--inner-backend", "eager", "--output", tmp_path / "own.png", "--weight-block-size", "128x128"]
    told = []
    for file in ("plan.toml", "plan.json"):
        torch.compiler.reset()  # a block that meets a graph for other layers runs as written for a step
        done = CliRunner().invoke(
            app, [str(a) for a in [*arguments, "--show-layers", "--layers", tmp_path / file]], env={"COLUMNS": "300"}
        )
        assert done.exit_code == 0, done.output
        told.append("\n".join(line for line in done.output.splitlines() if "transformer_blocks." in line))
    assert told[0] == told[1]
    assert re.search(r"img_mod\.1 .* layers: img_mod: keep", told[0])
    assert re.search(r"transformer_blocks\.0\.txt_mlp\.net\.2 .* int8-row", told[0])
    assert re.search(r"img_mlp\.net\.2 .* fp8-128x128", told[0])  # a plan stands in the place of the recipe


def test_static_activations_from_a_file(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bench.tiny import build_qwen_image
    from fp8_compile.cli.main import app

    pipe = build_qwen_image()
    pipe.save_pretrained(tmp_path / "own")
    with fp8_compile.calibrate(transformer=pipe.transformer, progress=False) as calibration:
        pipe(PROMPT, num_inference_steps=2, height=64, width=64)
    calibration.save(tmp_path / "scales.json")
    torch.compiler.reset()
    arguments = ["text-to-image", PROMPT, "--model", tmp_path / "own", "--steps", 2, "--height", 64, "--width", 64]
    arguments += [
        "--inner-backend",
        "eager",
        "--output",
        tmp_path / "own.png",
        "--show-layers",
        "--ignored-layers",
        "none",
    ]
    static = ["--activation-scheme", "static", "--activation-scales", tmp_path / "scales.json"]
    done = CliRunner().invoke(app, [str(a) for a in [*arguments, *static]], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert re.search(r"img_mlp\.net\.2 .* fp8-row-static", done.output)
    assert "static input scales: amax of QwenImageTransformer2DModel" in done.output
    done = CliRunner().invoke(app, [str(a) for a in [*arguments, *static[2:]]])
    assert done.exit_code == 2
    assert "activation_scales is of use with activation_scheme='static'" in done.output


def test_guidance_and_a_negative_prompt_reach_the_pipeline(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fp8_compile.cli.main import app

    arguments = ["text-to-image", PROMPT, "--model", "embedded:z-image", "--steps", "2", "--inner-backend", "eager"]
    drawn = []
    for i, more in enumerate(([], ["--guidance-scale", "3"], ["--guidance-scale", "3", "--negative-prompt", "green"])):
        done = CliRunner().invoke(app, [*arguments, *more, "--output", str(tmp_path / f"{i}.png")])
        assert done.exit_code == 0, done.output
        drawn.append((tmp_path / f"{i}.png").read_bytes())
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "/proc/picture.png"], "cannot be written: "),
        (["--output", "."], "'.' is a folder; expected a file, such as 'out.png'"),
        (["--output", "out.mp4"], "the model draws pictures; use for example .png"),
        (["--seeds", "1,b"], "--seeds '1,b': expected numbers and commas"),
        (["--seeds", "1,2", "--seed", "3"], "--seeds and --seed exclude each other"),
        (["--prompts-file", "nowhere.txt"], "PROMPT and --prompts-file exclude each other"),
        (["--lora", "nowhere.safetensors:0.5"], "there is no file 'nowhere.safetensors'"),
        (["--image", "nowhere.png"], "--image nowhere.png: cannot be read as a picture"),
        (["--strength", "0.5"], "--strength needs --image"),
        (["--scheduler", "Euler2"], "diffusers has none of this name; near: "),
        (["--scheduler", "DDIM"], "predicts a flow, for which it is not made"),
        (["--load", "slow"], "--load 'slow' is not valid; valid: compile, fp8"),
        (["--load", "fp8", "--no-quantization"], "--load fp8 and --no-quantization exclude each other"),
        (["--offload", "disk"], "offload='disk' is not valid; valid: model, group, sequential"),
        (["--offload", "model", "--device", "cpu"], "weights are kept in the CPU's memory"),
        (["--cache", "sea", "--batch-size", "2"], "with --cache pictures are drawn one by one"),
        (["--from", "nowhere.png"], "--from nowhere.png: cannot be read as a picture"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: cannot be read as TOML"),
        (["--quiet", "--verbose"], "--quiet and --verbose exclude each other"),
        (["--json", "--show-layers"], "--json and --show-layers exclude each other"),
        (["--quantization", "int4"], "method='int4' is not valid"),
        (["--quantization", "fp8", "--no-quantization"], "exclude each other"),
        (["--ignored-layers", "img_mlp", "--no-quantization"], "--ignored-layers and --no-quantization exclude"),
        (["--granularity", "column"], "granularity='column' is not valid"),
        (["--weight-block-size", "128"], "--weight-block-size '128': expected ROWSxCOLUMNS, for example 128x128"),
        (["--weight-block-size", "64x64"], "weight_block_size=[64, 64] is not valid; valid: [128, 128], [1, 128]"),
        (["--activation-scheme", "fixed"], "activation_scheme='fixed' is not valid; valid: dynamic, static, none"),
        ([*SMALL, "--activation-scheme", "static"], "no input scale for transformer_blocks.0."),
        (["--layers", "nowhere.json"], "--layers nowhere.json: cannot be read as JSON"),
        (["--layers", "nowhere.json", "--no-quantization"], "--layers and --no-quantization exclude each other"),
        (["--dtype", "float8"], "'float8' is not valid; valid: bfloat16, float16, float32"),
        (["--compile-mode", "fast"], "mode='fast' is not valid"),
        (["--output", "picture.xyz"], "no picture format ends in '.xyz'"),
        (["--output", "nowhere/picture.png"], "there is no directory 'nowhere'"),
        (["--model", "no/such/model"], "'no/such/model' could not be loaded"),
        (["--ignored-layers", "img_mlp,"], "ignored_layers: '': expected a module path"),
        (["--ignored-layers", "none,img_mlp"], "--ignored-layers none excludes other patterns"),
        (["--height", "40", "--model", "embedded:z-image"], "Height must be divisible by 16 (got 40)"),
        (["--height", "1000000", "--width", "1000000"], "decoding takes 64000.0 GB at the least, and cpu has"),
        (["--height", "50000000000"], "decoding takes 204800.0 GB at the least, and cpu has"),
        (["--fps", "12"], "--fps 12 is for videos, and QwenImagePipeline draws pictures"),
        (["--batch-size", "2", "--attention", "fp8"], "with --attention pictures are drawn one by one"),
        (["--true-cfg-scale", "4", "--model", "embedded:z-image"], "ZImagePipeline takes no true_cfg_scale; it takes"),
        (["--true-cfg-scale", "4"], "true_cfg_scale=4 needs a negative_prompt"),
        (["--true-cfg-scale", "1", "--negative-prompt", "x"], "is no guidance, but negative_prompt needs some"),
        (
            ["--guidance-scale", "0", "--negative-prompt", "x", "--model", "embedded:z-image"],
            "guidance_scale=0 is no guidance",
        ),
        (["--guidance-scale", "4"], "this QwenImageTransformer2DModel takes none (no guidance_embeds)"),
        (["--guidance-scale", "nan", "--model", "embedded:z-image"], "guidance_scale=nan: expected a finite number"),
        ([*SMALL, "--ignored-layers", "img_mpl"], "did you mean 'img_mlp'"),
        ([*SMALL, "--ignored-layers", "transformer_blocks,attn,*_mlp,*_mod"], "no layer of the model was quantized"),
    ],
)
def test_bad_input_ends_with_a_message_and_no_picture(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """In this process: in one of its own, each would take longer to import than to fail."""
    from typer.testing import CliRunner

    from fp8_compile.cli.main import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    torch.compiler.reset()
    done = CliRunner().invoke(app, ["text-to-image", PROMPT, *map(str, arguments)])
    failed_at_work = "no layer of the model was quantized" in message
    assert done.exit_code == (1 if failed_at_work else 2), done.output
    assert isinstance(done.exception, SystemExit)  # else a traceback would be shown
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_both_ways_to_run_it_tell_the_version() -> None:
    script = "from fp8_compile.cli.main import main; main()"  # what the installed command runs
    for way in (["-c", script], ["-m", "fp8_compile"]):
        done = subprocess.run([sys.executable, *way, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"fp8-diffusion {fp8_compile.__version__}\n"


def test_what_to_install_is_said_where_typer_is_not() -> None:
    script = "import runpy, sys; sys.modules['typer'] = None; runpy.run_module('fp8_compile', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "typer is not installed; the command line needs: pip install 'fp8-compile[cli]'\n"


@pytest.mark.parametrize("arguments", [["generate", PROMPT], ["inspect"], ["inspect", "embedded:z-image"]])
def test_what_to_install_is_said_where_the_embedded_pipelines_are_not(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from fp8_compile.cli.main import app

    monkeypatch.setitem(sys.modules, "fp8_compile_embedded", None)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert (
        "in the package fp8-compile-embedded, which is not installed: pip install fp8-compile-embedded" in done.output
    )
    assert not list(tmp_path.iterdir())


def test_the_command_line_of_diffusers_needs_nothing_but_the_entry_point(tmp_path: Path) -> None:
    from bench.tiny import build_qwen_image

    build_qwen_image().save_pretrained(tmp_path / "model")
    chosen = {"ignored_layers": ["img_mlp"], "inner_backend": "aot_eager", "dump_graphs": str(tmp_path / "graphs")}
    compilation = json.dumps({"backend": "fp8_diffusion", "fullgraph": True, "options": chosen})
    call = json.dumps({"prompt": PROMPT, "num_inference_steps": 2, "height": 64, "width": 64})
    diffusers_cli = [sys.executable, "-c", "from diffusers.commands.diffusers_cli import main; main()"]
    options = ["--model", tmp_path / "model", "--dtype", "bf16", "--device-map", "cpu", "--seed", "0"]
    options += ["--compile", compilation, "--pipeline-kwargs", call]
    done = subprocess.run(
        [*diffusers_cli, "--format", "human", "run", *map(str, options), "--output", str(tmp_path / "picture.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    (graph,) = (tmp_path / "graphs").iterdir()
    assert "scaled_linear" in (graph / "after_quantize_linears.py").read_text()
