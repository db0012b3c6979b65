"""How the network is trained: data, the loop, evaluation, the run folder."""
