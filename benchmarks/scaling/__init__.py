"""How N models of S bytes merge on K nodes: a simulation with stated assumptions, its bound, and a check of both.

    python -m benchmarks.scaling --help

`machine` says what there is, `workload` what there is to do (from the planner itself), `simulate` how long it takes,
`bound` how long it takes at least, and `check` what a real run takes beside what is predicted for it.
"""
