"""Operations that stand three times under one contract: a Python reference that defines them, and one C++ source.

`parse_prompts` reads replies, `postprocess_masks` makes masks of logits. Logic is in `__host__ __device__` functions;
g++ compiles it for the host (`build`), nvcc for a device. `backend` says which build is used. Importing this compiles
and loads nothing.
"""
