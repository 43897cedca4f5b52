"""From ranked lists to numbers: metrics, validation, result files, and the Python API for recommending."""
