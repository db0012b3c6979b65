"""RIFormers by matrix products of this package's own, in C++, on a CPU."""
