"""Solves as compiled programs.

How the parts fit:

- `attempt.py`: one attempt at a step with the control of its length, in tensors alone. `pull.py`: cotangents through
  one accepted step. Both are ordinary torch operations and run without compilation as well.
- `trace.py`: a function of tensors as a graph whose inputs are all the tensors that it uses. `loop.py`: a traced body,
  repeated by a compiled program. `replayed.py`: how that is done on a GPU.
- `fingerprint.py`: whether a field is the one that was compiled. `engine.py`: the compiled loops, kept between solves.
- `steps.py`: the driver. `trajectory.py`: the adjoint that solves by it. `reasons.py`: why it does not.
"""
