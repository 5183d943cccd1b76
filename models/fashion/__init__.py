"""Three Fashion-MNIST networks with calibration and test images, as package data."""
