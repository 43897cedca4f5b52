"""From ranked lists to numbers: metrics, validation, result files, and the Recommender API."""
