"""implicitdiff beside its peers, workload by workload: ``python -m benchmarks.peers``, in the environment that
``benchmarks/setup`` makes."""
