"""ONNX Runtime behind one door: targets, sessions, times, limits, made-up inputs."""
