"""Calibration: feeds in, mergeable statistics and quantization ranges out."""

from onnxslim.calibration.data import CalibrationData

__all__ = ["CalibrationData"]

if __name__ != "onnxslim.calibration":
    raise ImportError(f"import onnxslim.calibration, not {__name__}: a second copy would not share its types")
