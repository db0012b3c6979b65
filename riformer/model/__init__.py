"""What the network is: backbones, token mixers, the exact fuse, weights."""
