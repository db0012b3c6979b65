"""How the network is used after training: parity checks and predictions."""
