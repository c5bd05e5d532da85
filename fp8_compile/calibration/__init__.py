"""Ranges of activations over whole generations, for static scales.

- `recorder`: `calibrate`, which watches models run.
- `histogram`: how magnitudes are counted.
- `records`: what is known of a model, a layer and a step.
- `clipping`: from a histogram to a clipping value.
- `result`: `Calibration`, which gives scales, and `load_calibration`.
- `files`: JSON and safetensors.
"""

from .recorder import calibrate
from .result import Calibration, load_calibration

__all__ = ["Calibration", "calibrate", "load_calibration"]
