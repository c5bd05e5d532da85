"""FP8 beside BF16: both are held, and a request says which one draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from fp8_compile.measure.quality import psnr
from fp8_compile.pipelines.denoisers import PipelineError
from fp8_compile.pipelines.session import Session
from tests.support.serving import MODEL, PROMPT, Served, WatchedSession, decoded, serving

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    session = Session.load(MODEL, at_load={"strict": True}, text_encoders="fp8")
    session = dataclasses.replace(session, twin=session.unquantized_twin())
    watched = WatchedSession(**{f.name: getattr(session, f.name) for f in dataclasses.fields(session)})
    with serving(watched, tmp_path_factory.mktemp("pictures")) as made:
        yield made


def test_a_request_says_which_weights_draw(both: Served, session: WatchedSession) -> None:
    (fp8,), (bf16,) = both.draw(seed=3), both.draw(seed=3, unquantized=True)
    direct = session.call(3, **session.arguments(prompt=PROMPT)).images[0]
    assert decoded(bf16.b64_json).tobytes() == direct.tobytes()
    assert 20 < psnr(decoded(fp8.b64_json), direct) < 60
    assert fp8.seconds > 0
    assert both.get("/ready").json() == {"status": "ready", "weights": ["FP8", "BF16"]}
    stream = both.openai().images.generate(
        prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 3, "unquantized": True}
    )
    last = list(stream)[-1]
    assert last.b64_json == bf16.b64_json
    assert last.seconds > 0  # type: ignore[union-attr]


def test_a_server_without_a_twin_says_so(served: Served) -> None:
    assert served.get("/ready").json()["weights"] == ["BF16"]
    served.draw(unquantized=False)
    with pytest.raises(openai.BadRequestError, match=r"this server has no unquantized twin \(serve --compare\)"):
        served.draw(unquantized=True)


def test_what_is_not_quantized_is_shared(tmp_path: Path) -> None:
    session = Session.load(MODEL, at_load={"strict": True}, cache="taylorseer-lite")
    twin = session.unquantized_twin()
    assert twin.pipe.text_encoder is session.pipe.text_encoder
    assert twin.pipe.vae is session.pipe.vae
    assert twin.pipe.scheduler is not session.pipe.scheduler
    assert (session.weights, twin.weights, twin.cache) == ("FP8", "BF16", "taylorseer-lite")
    session.pipe.save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="has FP8 weights, so it has no unquantized twin"):
        Session.load(str(tmp_path)).unquantized_twin()
