"""The fast form of a trained network, and predictions with it."""
