"""What the network learns from: teachers, taps on their modules, losses, the objective."""
