"""One thread per test process: small models gain nothing from more, and lose much when the machine is shared."""

import torch

torch.set_num_threads(1)
