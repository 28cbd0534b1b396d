"""fedmed: federated learning across hospitals, on Flower and PyTorch."""

__version__ = "0.1.0"
